import jax
import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.lm import LanguageModel
from gpt2_jax.model import GPT2
from gpt2_jax.score import Row, length_bucket, score_rows, sliding_rows
from gpt2_jax.sharding import make_mesh, tree_shardings
from gpt2_jax.tokenizer import ByteTokenizer
from gpt2_jax.weights import quantize
from shapes import TINY, random_params

CFG = GPT2Config.from_dict({**TINY.__dict__, "vocab_size": 264})  # 257, padded
RNG = np.random.default_rng(0)
TEXT = "The quick brown fox jumps over the lazy dog; then it sleeps. " * 3  # 183 bytes


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(GPT2(CFG), random_params(CFG, 0.2), ByteTokenizer(), step=0)


def reference(lm, ids):
    """Log-probabilities [T, 257] of what follows each of the ids, of plain logits."""
    padded = np.zeros((1, CFG.n_positions), np.int64)
    padded[0, : len(ids)] = ids
    logits = np.asarray(lm.logits(padded), np.float64)[0, : len(ids), :257]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check(lm, score, ids, n):
    """Of the last n ids."""
    table = reference(lm, ids[:-1])[-n:]
    expected = table[np.arange(n), ids[-n:]]
    np.testing.assert_array_equal(score.token_ids, ids[-n:])
    # float32 sums of 32 to 64 products, softmax of 257: rounding
    np.testing.assert_allclose(score.logprobs, expected, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(score.is_greedy, table.argmax(-1) == ids[-n:])
    assert score.total == pytest.approx(expected.sum(), abs=1e-4)


def test_every_token_of_a_text_given_the_end_of_text_before(lm):
    text = TEXT[:50]
    score = lm.score(text)
    check(lm, score, [256, *text.encode()], 50)
    assert score.perplexity == pytest.approx(np.exp(-score.logprobs.mean()), rel=1e-5)
    ids = lm.score(list(text.encode()))
    np.testing.assert_array_equal(ids.logprobs, score.logprobs)


CHOICES = [
    ("one two three", " four"), ("one two three", " five six seven"),
    ("one two three", " x"), ("something else", " entirely"), ("a", "b"), ("a", "c"),
    ("z" * 50, "yx"), ("z" * 50, "yxw"), ("z" * 50, "q"), ("z" * 60, "yx"),
]  # fmt: skip


def expected_of(lm, prompt, completion):
    ids = [*prompt.encode(), *completion.encode()]
    return ids, len(completion)


def test_completions_given_their_prompts(lm):
    prompts, completions = zip(*CHOICES, strict=True)
    scores = lm.logprobs(list(prompts), list(completions))
    for score, (prompt, completion) in zip(scores, CHOICES, strict=True):
        check(lm, score, *expected_of(lm, prompt, completion))
    one = lm.logprobs(*CHOICES[0])
    np.testing.assert_allclose(one.logprobs, scores[0].logprobs, rtol=0, atol=2e-5)
    three = lm.logprobs(prompts[0], list(completions[:3]))
    assert [len(s.logprobs) for s in three] == [5, 15, 2]
    ids = lm.logprobs([list(b"one two three")], list(b" four"))
    np.testing.assert_array_equal(ids[0].logprobs, one.logprobs)
