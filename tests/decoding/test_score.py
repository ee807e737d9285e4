import dataclasses
import re

import jax
import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.decoding import score
from gpt2_jax.decoding.score import Row, sliding_rows
from gpt2_jax.decoding.weights import quantize
from gpt2_jax.lm import LanguageModel
from gpt2_jax.model import GPT2
from gpt2_jax.runtime.sharding import make_mesh, tree_shardings
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer
from shapes import TINY, random_params

CFG = GPT2Config.from_dict({**TINY.__dict__, "vocab_size": 264})  # 257, padded
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


def test_log_probabilities_that_are_no_numbers_are_refused(lm):
    params = jax.tree.map(lambda x: x * np.nan, lm.params)
    spoilt = LanguageModel(GPT2(CFG), params, ByteTokenizer(), step=0)
    with pytest.raises(ValueError, match="probabilities that are not numbers"):
        list(spoilt.score_rows([Row([1, 2, 3], 2)]))


def check(lm, found, ids, n):
    """Of the last n ids."""
    table = reference(lm, ids[:-1])[-n:]
    expected = table[np.arange(n), ids[-n:]]
    np.testing.assert_array_equal(found.token_ids, ids[-n:])
    # float32 sums of 32 to 64 products, softmax of 257: rounding
    np.testing.assert_allclose(found.logprobs, expected, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(found.is_greedy, table.argmax(-1) == ids[-n:])
    assert found.total == pytest.approx(expected.sum(), abs=1e-4)


def test_every_token_of_a_text_given_the_end_of_text_before(lm):
    text = TEXT[:50]
    found = lm.score(text)
    check(lm, found, [256, *text.encode()], 50)
    assert found.perplexity == pytest.approx(np.exp(-found.logprobs.mean()), rel=1e-5)
    ids = lm.score(np.frombuffer(text.encode(), np.uint8))
    np.testing.assert_array_equal(ids.logprobs, found.logprobs)
    both = lm.score([text, "", "x"])
    assert [len(s.logprobs) for s in both] == [50, 0, 1]
    np.testing.assert_allclose(both[0].logprobs, found.logprobs, rtol=0, atol=2e-5)


def test_without_an_end_of_text_the_first_token_is_not_scored(lm):
    characters = CharTokenizer([chr(i) for i in range(32, 127)], end_of_text=False)
    bare = dataclasses.replace(lm, tokenizer=characters)
    ids = characters.encode(TEXT[:20])
    found = bare.score(TEXT[:20])
    np.testing.assert_array_equal(found.token_ids, ids[1:])
    given = bare.logprobs(ids[:1], ids[1:])
    np.testing.assert_array_equal(found.logprobs, given.logprobs)


@pytest.mark.parametrize("stride", [64, 32, 7])
def test_a_long_text_in_windows(lm, stride):
    ids = [256, *TEXT.encode()]
    found = lm.score(TEXT, stride=stride)
    assert len(found.logprobs) == 183
    at = 0
    for start in [0, *range(64, 183, stride)]:
        end = min(start + (stride if start else 64), 183)
        table = reference(lm, ids[max(0, end - 64) : end])[start - end :]
        expected = table[np.arange(end - start), ids[start + 1 : end + 1]]
        got = found.logprobs[start:end]
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)  # rounding
        at = end
    assert at == 183


def test_windows_score_each_token_once_with_all_the_context_there_is():
    ids = np.arange(20)
    rows = sliding_rows(ids, 8, 3)
    scored = np.concatenate([ids[-n:] for ids, n in rows])
    np.testing.assert_array_equal(scored, ids[1:])
    assert [(r.ids[0], r.ids[-1], r.n_scored) for r in rows] == [
        (0, 8, 8), (3, 11, 3), (6, 14, 3), (9, 17, 3), (11, 19, 2)
    ]  # fmt: skip
    assert sliding_rows(ids[:1], 8, 3) == []


CHOICES = [
    ("one two three", " four"), ("one two three", " five six seven"),
    ("one two three", " x"), ("something else", " entirely"), ("a", "b"), ("a", "c"),
    ("z" * 50, "yx"), ("z" * 50, "yxw"), ("z" * 50, "q"), ("z" * 60, "yxwvu"),
]  # fmt: skip


def test_completions_given_their_prompts(lm):
    prompts, completions = map(list, zip(*CHOICES, strict=True))
    scores = lm.logprobs(prompts, completions)
    for found, (prompt, completion) in zip(scores, CHOICES, strict=True):
        check(lm, found, [*prompt.encode(), *completion.encode()], len(completion))
    one = lm.logprobs(*CHOICES[0])
    np.testing.assert_allclose(one.logprobs, scores[0].logprobs, rtol=0, atol=2e-5)
    three = lm.logprobs(prompts[0], completions[:3])
    assert [len(s.logprobs) for s in three] == [5, 15, 2]
    ids = lm.logprobs([list(b"one two three")], list(b" four"))
    np.testing.assert_array_equal(ids[0].logprobs, one.logprobs)
    check(lm, lm.logprobs("", "x"), [256, ord("x")], 1)


def test_rows_share_a_window_and_what_they_begin_with(lm, monkeypatch):
    seen, hidden = [], score._hidden

    def call(model, params, tokens_BT, segment_BT2):
        held = segment_BT2[..., 0] >= 0
        seen.append((tokens_BT.shape, held.sum(1).tolist()))
        return hidden(model, params, tokens_BT, segment_BT2)

    monkeypatch.setattr(score, "_hidden", call)
    prompts, completions = ["z" * 40, "y" * 10], ["a", "bb", "ccc", "dd"]
    scores = lm.logprobs(prompts[0], completions)
    assert seen == [((1, 64), [39 + 8])]
    seen.clear()
    scores += lm.logprobs([prompts[1]] * 4, completions)
    assert seen == [((1, 32), [9 + 8])]
    seen.clear()
    both = lm.logprobs([p for p in prompts for _ in range(4)], completions * 2)
    assert seen == [((1, 64), [39 + 8 + 9 + 8])]
    for found, apart in zip(both, scores, strict=True):
        np.testing.assert_allclose(found.logprobs, apart.logprobs, rtol=0, atol=2e-5)
    for i, found in enumerate(both):
        text = prompts[i // 4] + completions[i % 4]
        check(lm, found, list(text.encode()), len(completions[i % 4]))
    seen.clear()
    # 50 tokens before, and four times 10 that are scored, in windows of 64
    many = lm.logprobs("z" * 51, [c * 10 for c in "abcd"])
    assert [held for _, held in seen] == [[60] * 4]
    check(lm, many[3], list(b"z" * 51 + b"d" * 10), 10)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_on_a_mesh(lm, shape):
    mesh = make_mesh(*shape)
    placed = jax.device_put(lm.params, tree_shardings(lm.params, mesh))
    spread = dataclasses.replace(lm, params=placed, mesh=mesh)
    prompts, completions = map(list, zip(*CHOICES, strict=True))
    pairs = zip(
        spread.logprobs(prompts, completions),
        lm.logprobs(prompts, completions),
        strict=True,
    )
    for ours, one_device in pairs:  # rounding, as above
        np.testing.assert_allclose(ours.logprobs, one_device.logprobs, atol=2e-5)
    ours, one_device = spread.score(TEXT), lm.score(TEXT)
    np.testing.assert_allclose(ours.logprobs, one_device.logprobs, atol=2e-5)


def test_weights_are_those_that_were_loaded(lm):
    params = quantize(random_params(CFG, 0.2))
    rounded = dataclasses.replace(lm, params=params)
    check(rounded, rounded.score(TEXT[:40]), [256, *TEXT[:40].encode()], 40)
    assert abs(rounded.score(TEXT[:40]).total - lm.score(TEXT[:40]).total) > 1e-2


def test_few_programs_are_compiled(lm, compilations):
    other = GPT2(dataclasses.replace(CFG, layer_norm_epsilon=1e-6))  # not seen yet
    lm = dataclasses.replace(lm, model=other)
    rng = np.random.default_rng(1)
    rows = [Row(rng.integers(0, 257, n), 1 + n // 3) for n in range(3, 66)]
    with compilations() as n:
        first = dict(lm.score_rows(rows))
        # one of the model, and for each number of targets, a multiple of 8, one
        assert 0 < n() <= 1 + 8
    with compilations() as n:
        again = dict(lm.score_rows(rows[::-1]))
        assert n() == 0
    for i, found in first.items():
        mirror = again[len(rows) - 1 - i]
        np.testing.assert_allclose(mirror.logprobs, found.logprobs, atol=2e-5)
    small = dict(lm.score_rows(rows[:9], batch_size=2))
    np.testing.assert_allclose(small[8].logprobs, first[8].logprobs, atol=2e-5)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda lm: lm.score("x", stride=0), "stride=0 must be in [1, 64]"),
        (lambda lm: lm.score("x", stride=65), "stride=65 must be in [1, 64]"),
        (lambda lm: lm.score([1, 257]), "token id 257 is outside [0, vocab_size=257)"),
        (lambda lm: lm.logprobs("x", ""), "completion 0 is empty"),
        (lambda lm: lm.logprobs(["a", "b"], ["c"] * 3), "2 prompts do not go with 3"),
        (
            lambda lm: lm.logprobs("x" * 60, ["y", "y" * 6]),
            "row 1: 65 tokens before the last exceed n_positions=64",
        ),
        (
            lambda lm: list(lm.score_rows([Row([1, 2], 2)])),
            "row 0: 2 of 2 ids scored",
        ),
    ],
)
def test_bad_input_is_one_line(lm, call, line):
    with pytest.raises(ValueError, match=re.escape(line)) as error:
        call(lm)
    assert "\n" not in str(error.value)
