"""Our numbers beside those that transformers on torch gave make_goldens.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.commands.verify import CFG, OPTIM, weights
from gpt2_jax.formats.names import their_name
from gpt2_jax.formats.params import matrices
from gpt2_jax.lm import LanguageModel
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.training.optim import make_optimizer
from gpt2_jax.training.step import TrainState, gradients, train_step

MODEL = GPT2(CFG)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "goldens/gpt2_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(golden):
    return weights(golden, "the goldens")


def check(tree, golden, group, relative):
    count = 0
    for path, x in matrices(tree):
        expected = golden[group + their_name(path)]
        if path.endswith("c_attn/bias"):
            x, expected = without_keys(x), without_keys(expected)
        error = np.abs(x - expected).max() / np.abs(expected).max()
        assert error <= relative, path
        count += 1
    assert count == 28


def without_keys(bias):
    """Of q, k and v: attention is the same whatever the keys' bias, so that its
    gradient is nothing but rounding, and Adam makes whole steps of that."""
    q, _, v = np.split(bias, 3)
    return np.concatenate([q, v])


def test_logits_and_hidden_states(golden, params):
    logits, state = MODEL.apply(
        {"params": params},
        golden["tokens"],
        capture_intermediates=lambda module, _: type(module).__name__ == "Block",
        mutable=["intermediates"],
    )
    assert np.abs(logits[0] - golden["logits"]).max() <= 1e-5  # float32 sums of 64
    first = state["intermediates"]["h_0"]["__call__"][0][0]
    assert np.abs(first - golden["hidden"][0]).max() <= 1e-5
    last, _ = MODEL.apply({"params": params}, golden["tokens"], method="hidden")
    assert np.abs(last - golden["hidden"][1]).max() <= 1e-5


def test_loss_and_gradients(golden, params):
    tokens = jnp.asarray(golden["batches"][:1], jnp.int32)
    loss, grads = gradients(params, tokens, None, model=MODEL)
    assert float(loss) == pytest.approx(golden["losses"][0], rel=1e-5)
    check(grads, golden, "gradients/", 1e-4)  # float32 sums over 64 tokens


def test_greedy_continuation(golden, params):
    lm = LanguageModel(MODEL, params, NoTokenizer(61, 0, "a golden"), None)
    ids = lm.generate(golden["tokens"][0, :4], max_new_tokens=28, temperature=0)
    expected = golden["greedy"].tolist()
    if 0 in expected:  # the end of text
        expected = expected[: expected.index(0)]
    assert ids == expected


def test_ten_updates(golden, params):
    optimizer = make_optimizer(OPTIM, 10)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    step = jax.jit(
        lambda s, t: train_step(s, t, model=MODEL, optimizer=optimizer, seed=0)
    )
    for i, tokens in enumerate(golden["batches"]):
        state, metrics = step(state, jnp.asarray(tokens, jnp.int32)[None])
        assert float(metrics["loss"]) == pytest.approx(golden["losses"][i], rel=1e-4)
        assert float(metrics["grad_norm"]) == pytest.approx(
            golden["norms"][i], rel=1e-4
        )
    check(state.params, golden, "trained/", 1e-4)  # ten times Adam's 1 / sqrt(v)
