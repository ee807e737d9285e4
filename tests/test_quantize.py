import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import sharding
from gpt2_jax.config import GPT2Config
from gpt2_jax.model import GPT2, project_int8
from gpt2_jax.quantize import check_dtype, model_of, quantize
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
    for module, axes in (
        (("attn", "c_attn"), (0,)),
        (("attn", "c_proj"), (0, 1)),
        (("mlp", "c_fc"), (0,)),
        (("mlp", "c_proj"), (0,)),
    ):
        leaf, kernel = block, exact_block
        for name in module:
            leaf, kernel = leaf[name], kernel[name]
        kernel = np.asarray(kernel["kernel"])
        assert leaf["kernel"].dtype == jnp.int8
        assert leaf["kernel"].shape == kernel.shape
        scale = np.asarray(leaf["scale"]).reshape(kernel.shape[len(axes) :])
        np.testing.assert_allclose(scale, np.abs(kernel).max(axes) / 127, rtol=1e-6)
        error = np.abs(np.asarray(leaf["kernel"]) * scale - kernel)
        assert (error <= 0.5001 * scale).all()
    wte = rounded["wte"]
    assert wte["embedding"].dtype == jnp.int8
    assert wte["scale"].shape == (TINY.vocab_size,)
    for name in ("wpe", "ln_f"):
        jax.tree.map(np.testing.assert_array_equal, rounded[name], exact[name])


@pytest.mark.parametrize("n_rows", [1, 2, 5])
def test_the_product_is_that_of_rows_and_channels_rounded_to_int8(n_rows):
    x = RNG.normal(size=(n_rows, 3, 4)).astype(np.float32)
    x[0] = 0  # no scale of zero
    kernel = RNG.integers(-127, 128, (3, 4, 6)).astype(np.int8)
    scale = RNG.uniform(0.1, 1, 6).astype(np.float32)
    step = np.abs(x).max(axis=(1, 2)) / 127
    whole = np.round(x / np.maximum(step, 1e-30)[:, None, None])
    expected = np.einsum("bhk,hko->bo", whole, kernel) * step[:, None] * scale
    out = project_int8(jnp.asarray(x), jnp.asarray(kernel), scale, (0, 1))
    # the integers are exact, the two scales are float32
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    table = kernel.reshape(12, 6).T.copy()
    flat = project_int8(jnp.asarray(x.reshape(n_rows, 12)), table, scale, (1,))
    np.testing.assert_array_equal(flat, out)


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
    model = model_of(TINY, "bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(TINY, 0.2))
    whole = jax.jit(model.apply)({"params": params}, TOKENS[:1])[0]
    alone = jax.jit(model.apply)({"params": params}, TOKENS[:1, :1])[0]
    # the same products of bfloat16, summed in float32
    np.testing.assert_allclose(alone[0, 0], whole[0, 0], atol=1e-2)


def test_dtypes_by_name():
    for name in ("float32", "bfloat16", "int8"):
        check_dtype(name)
    assert model_of(TINY, "int8").dtype == jnp.float32  # on CPU
    with pytest.raises(ValueError, match=r"'int4' is not one of .*bfloat16 or int8"):
        check_dtype("int4")
