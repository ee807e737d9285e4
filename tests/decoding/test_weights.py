import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.decoding.weights import (
    build_model,
    check_dtype,
    quantize,
    transpose_kernels,
)
from gpt2_jax.model import GPT2
from gpt2_jax.ops import linear
from gpt2_jax.ops.linear import FEW_ROWS, project_rows
from gpt2_jax.runtime import sharding
from shapes import TINY, random_params

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, TINY.vocab_size, (2, 40))


def int8_params(cfg=TINY):
    return quantize(random_params(cfg, 0.2))


@jax.jit
def logits(params, tokens):
    return GPT2(TINY).apply({"params": params}, tokens)[0]


def test_a_weight_moves_by_half_a_step_of_its_channel_at_most():
    exact, rounded = random_params(TINY, 0.2), int8_params()
    block, exact_block = rounded["h_1"], exact["h_1"]
    for module, n_in in (
        (("attn", "c_attn"), 1),
        (("attn", "c_proj"), 2),
        (("mlp", "c_fc"), 1),
        (("mlp", "c_proj"), 1),
    ):
        leaf, kernel = block, exact_block
        for name in module:
            leaf, kernel = leaf[name], kernel[name]
        kernel = np.asarray(kernel["kernel"])
        out = kernel.shape[n_in:]
        weight_OI = kernel.reshape(-1, math.prod(out)).T
        assert leaf["weight"].dtype == jnp.int8
        assert leaf["weight"].shape == out + kernel.shape[:n_in]
        scale = np.asarray(leaf["scale"])
        np.testing.assert_allclose(scale, np.abs(weight_OI).max(1) / 127, rtol=1e-6)
        scaled = np.asarray(leaf["weight"]).reshape(weight_OI.shape) * scale[:, None]
        assert (np.abs(scaled - weight_OI) <= 0.5001 * scale[:, None]).all()
        assert leaf.keys() == {"weight", "scale", "bias"}
    wte = rounded["wte"]
    assert wte["embedding"].dtype == jnp.int8
    assert wte["scale"].shape == (TINY.vocab_size,)
    for name in ("wpe", "ln_f"):
        jax.tree.map(np.testing.assert_array_equal, rounded[name], exact[name])


N_ROWS = pytest.mark.parametrize("n_rows", [1, 2, 5, FEW_ROWS + 1])


@N_ROWS
def test_the_product_is_that_of_rows_and_channels_rounded_to_int8(n_rows):
    x = RNG.normal(size=(n_rows, 12)).astype(np.float32)
    x[0] = 0  # no scale of zero
    weight = RNG.integers(-127, 128, (6, 12)).astype(np.int8)
    scale = RNG.uniform(0.1, 1, 6).astype(np.float32)
    step = np.maximum(np.abs(x).max(axis=1, keepdims=True) / 127, 1e-30)
    expected = np.round(x / step) @ weight.T.astype(float) * step * scale
    out = project_rows(jnp.asarray(x), jnp.asarray(weight), scale)
    # the integers are exact, the two scales are float32
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@N_ROWS
@pytest.mark.parametrize("has_unit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_turned_weight_gives_the_same_product(n_rows, dtype, has_unit, monkeypatch):
    monkeypatch.setattr(linear, "has_matrix_unit", lambda: has_unit)
    x = jnp.asarray(RNG.normal(size=(n_rows, 12)), dtype)
    weight = jnp.asarray(RNG.normal(size=(6, 12)), dtype)
    out = project_rows(x, weight)
    assert out.dtype == jnp.float32
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    np.testing.assert_allclose(out, expected, atol=1e-5)  # sums of 12 in float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_a_large_weight_goes_by_blocks_to_the_same_product(n_rows, dtype, monkeypatch):
    x = jnp.asarray(RNG.normal(size=(n_rows, 12)), jnp.float32)
    weight = jnp.asarray(RNG.integers(-127, 128, (6, 12))).astype(dtype)
    scale = jnp.ones(6) if dtype == jnp.int8 else None
    x = x if dtype == jnp.int8 else x.astype(dtype)
    whole = project_rows(x, weight, scale)
    monkeypatch.setattr(linear, "BLOCK", 24)
    monkeypatch.setattr(linear, "has_matrix_unit", lambda: True)
    assert linear._n_blocks(6, 12) == 3
    blocks = project_rows(x, weight, scale)
    np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-3)  # values to 500


def test_a_weight_has_few_equal_blocks_or_is_one():
    assert linear._n_blocks(50257, 768) == 29  # of 1733 rows
    assert linear._n_blocks(50304, 1600) == 6
    assert linear._n_blocks(3072, 768) == 1
    assert linear._n_blocks(50261, 768) == 1  # a prime


def test_turned_parameters_are_the_same_model():
    params = random_params(TINY, 0.2)
    weights = transpose_kernels(params)
    assert "kernel" in params["h_0"]["mlp"]["c_fc"], "the argument is left alone"
    assert "kernel" not in str(jax.tree.structure(weights))
    np.testing.assert_allclose(
        logits(weights, TOKENS), logits(params, TOKENS), atol=1e-5
    )


def test_the_model_differs_little_and_a_cache_changes_nothing():
    exact = logits(random_params(TINY, 0.2), TOKENS)
    params = int8_params()
    rounded = logits(params, TOKENS)
    logp, logq = jax.nn.log_softmax(exact), jax.nn.log_softmax(rounded)
    kl = jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1).mean()
    assert 0 < kl < 1e-3  # nats; measured 2e-4, logits of size 4
    alone = jax.jit(GPT2(TINY).apply)({"params": params}, TOKENS[:1, :1])[0]
    np.testing.assert_allclose(alone[0, 0], rounded[0, 0], atol=1e-5)


def test_on_a_mesh_the_logits_are_the_same():
    cfg = GPT2Config.from_dict({**TINY.__dict__, "vocab_size": 64})
    expected = GPT2(cfg).apply({"params": int8_params(cfg)}, TOKENS)[0]
    mesh = sharding.make_mesh(2, 2, 2)
    params = random_params(cfg, 0.2)
    params = jax.device_put(params, sharding.tree_shardings(params, mesh))
    params = quantize(params)
    params = jax.device_put(params, sharding.tree_shardings(params, mesh))
    out = jax.jit(GPT2(cfg).apply)({"params": params}, TOKENS)[0]
    # a float32 sum in another order may round a row to another integer
    np.testing.assert_allclose(out, expected, atol=0.05)
    assert np.median(np.abs(out - expected)) < 1e-5


def test_bfloat16_of_one_row_is_that_of_many():
    model = build_model(TINY, "bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(TINY, 0.2))
    params = transpose_kernels(params)
    whole = jax.jit(model.apply)({"params": params}, TOKENS[:1])[0]
    alone = jax.jit(model.apply)({"params": params}, TOKENS[:1, :1])[0]
    # the same products of bfloat16, summed in float32
    np.testing.assert_allclose(alone[0, 0], whole[0, 0], atol=1e-2)


def test_dtypes_by_name():
    for name in ("float32", "bfloat16", "int8"):
        check_dtype(name)
    assert build_model(TINY, "int8").dtype == jnp.float32  # on CPU
    with pytest.raises(ValueError, match=r"'int4' is not one of .*bfloat16, int8"):
        check_dtype("int4")
