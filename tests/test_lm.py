import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.lm import LanguageModel
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizer import ByteTokenizer
from shapes import TINY, random_params


@pytest.fixture(scope="module")
def lm():
    cfg = GPT2Config.from_dict({**TINY.__dict__, "vocab_size": 264})  # 257, padded
    return LanguageModel(GPT2(cfg), random_params(cfg, 0.2), ByteTokenizer(), step=0)


def test_text_in_text_out_and_ids_in_ids_out(lm):
    text = lm.generate("hello", max_new_tokens=12, temperature=0)
    assert isinstance(text, str)
    ids = lm.generate(list(b"hello"), max_new_tokens=12, temperature=0)
    assert isinstance(ids, list)
    assert all(isinstance(i, int) for i in ids)
    assert text == bytes(ids).decode(errors="replace")
    array = np.frombuffer(b"hello", np.uint8)
    assert lm.generate(array, max_new_tokens=12, temperature=0) == ids


def test_a_list_of_prompts_of_different_lengths(lm):
    prompts = ["a", "hello there", ""]
    texts = lm.generate(prompts, max_new_tokens=10, temperature=0)
    assert texts == [lm.generate(p, max_new_tokens=10, temperature=0) for p in prompts]
    rows = [list(p.encode()) or [256] for p in prompts]
    ids = lm.generate(rows, max_new_tokens=10, temperature=0)
    assert [len(i) for i in ids] == [10] * 3
    assert [bytes(i).decode(errors="replace") for i in ids] == texts


def test_seeds(lm):
    kwargs = dict(max_new_tokens=20, top_k=50, top_p=0.95)
    assert lm.generate("x", seed=3, **kwargs) == lm.generate("x", seed=3, **kwargs)
    fresh = {lm.generate("x", **kwargs) for _ in range(3)}
    assert len(fresh) == 3


def test_logits(lm):
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    logits = lm.logits(ids)
    assert logits.shape == (2, 3, 264)
    assert logits.dtype == jnp.float32
    expected, _ = lm.model.apply({"params": lm.params}, ids)
    # the same float32 computation, compiled as a whole or op by op, logits of size 5
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    assert lm.config.vocab_size == 264


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], r"shape \[B, T\] with B, T >= 1, not \(2,\)"),
        (np.zeros((1, 0), int), r"not \(1, 0\)"),
        ([[1.0]], "token ids must be integers, not float64"),
        ([[264]], "token id 264 is outside"),
        ([[0] * 65], "T=65 tokens exceed n_positions=64"),
    ],
)
def test_bad_ids_are_refused(lm, ids, message):
    with pytest.raises(ValueError, match=message):
        lm.logits(ids)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        (["a", 1], {}, "a prompt is text, a list of ids, or a list of such"),
        ([[1], "a"], {}, "a prompt is text, a list of ids, or a list of such"),
        ([260], {}, "token id 260 is outside"),
        ("a" * 60, {"max_new_tokens": 5}, "exceeds n_positions=64"),
        ("a", {"temperature": -1}, "temperature=-1"),
        ("a", {"top_p": 2}, "top_p=2"),
    ],
)
def test_bad_prompts_and_options_are_refused(lm, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(prompt, **{"max_new_tokens": 1, **options})


def test_an_unknown_option_is_refused(lm):
    with pytest.raises(TypeError, match="topk"):
        lm.generate("a", topk=3)
