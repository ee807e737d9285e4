import dataclasses
import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from gpt2_jax.cache import KVCache
from gpt2_jax.config import GPT2Config
from gpt2_jax.layout import count_params, dtype_named, stack_layers, unstack_layers
from gpt2_jax.model import GPT2, abstract_params, init
from gpt2_jax.ops.activation import activate
from gpt2_jax.ops.attention import QUERIES
from gpt2_jax.ops.linear import affine
from gpt2_jax.ops.norm import normalize
from gpt2_jax.runtime.platform import traced_for
from plain_decoding import reference_logits
from shapes import TINY, random_params

TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 64))


def test_logits_equal_the_reference(tiny):
    model, params = tiny
    logits, cache = jax.jit(model.apply)({"params": params}, TOKENS)
    assert cache is None
    assert logits.dtype == jnp.float32
    expected = reference_logits(TINY, params, TOKENS)
    # float32 against float64, logits of size 5
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_without_biases_it_is_the_same_function_of_zero_biases(tiny):
    _, params = tiny
    cfg = dataclasses.replace(TINY, bias=False)
    kept = abstract_params(cfg)

    def zeroed(path, x):
        return 0 * x if "bias" in jax.tree_util.keystr(path) else x

    params = jax.tree_util.tree_map_with_path(zeroed, params)
    expected = reference_logits(TINY, params, TOKENS)
    alone = jax.tree_util.tree_map_with_path(
        lambda path, _: functools.reduce(lambda t, k: t[k.key], path, params), kept
    )
    assert len(jax.tree.leaves(alone)) == 2 + 1 + 6 * TINY.n_layer
    logits, _ = jax.jit(GPT2(cfg).apply)({"params": alone}, TOKENS)
    # float32 against float64, logits of size 5
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "count", "tensors"),
    [
        ("gpt2", 124_439_808, 148),
        ("gpt2-medium", 354_823_168, 292),
        ("gpt2-large", 774_030_080, 436),
        ("gpt2-xl", 1_557_611_200, 580),
    ],
)
def test_parameter_counts_of_the_four_sizes(name, count, tensors):
    params = abstract_params(GPT2Config.named(name))
    assert count_params(params) == count
    assert len(jax.tree.leaves(params)) == tensors


def test_init_statistics():
    cfg = dataclasses.replace(TINY, n_embd=256, vocab_size=500, n_layer=2)
    params = jax.jit(partial(init, GPT2(cfg)))(jax.random.key(0))
    stds = jax.tree.map(np.std, params)
    # at least 16,384 draws each: 3 deviations of a sample's std are under 2%
    for drawn in (
        stds["wte"]["embedding"],
        stds["wpe"]["embedding"],
        stds["h_0"]["attn"]["c_attn"]["kernel"],
        stds["h_1"]["mlp"]["c_fc"]["kernel"],
    ):
        assert drawn == pytest.approx(0.02, rel=0.02)
    for part in ("attn", "mlp"):
        drawn = stds["h_1"][part]["c_proj"]["kernel"]
        assert drawn == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.02)
    for name, x in jax.tree_util.tree_leaves_with_path(params):
        key = jax.tree_util.keystr(name)
        if "bias" in key:
            assert not x.any()
        if "scale" in key:
            assert (x == 1).all()


@pytest.mark.parametrize(("vocab_size", "n_embd"), [(66, 128), (2048, 192)])
def test_initial_loss_is_near_that_of_chance(vocab_size, n_embd):
    cfg = dataclasses.replace(TINY, vocab_size=vocab_size, n_embd=n_embd, n_layer=4)
    assert _initial_loss(cfg) == pytest.approx(math.log(vocab_size), abs=0.1)


@pytest.mark.slow
def test_initial_loss_of_124m():
    # Logits of unit-norm features and N(0, 0.02) embeddings have a variance of
    # 0.02**2 * n_embd, of which the mean log-sum-exp takes a half.
    expected = math.log(50257) + 0.02**2 * 768 / 2
    assert _initial_loss(GPT2Config(embd_pdrop=0)) == pytest.approx(expected, abs=0.05)


def _initial_loss(cfg: GPT2Config) -> float:
    model = GPT2(cfg)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab_size, (4, min(257, cfg.n_positions + 1)))
    params = jax.jit(partial(init, model))(jax.random.key(0))
    logits, _ = jax.jit(model.apply)({"params": params}, tokens[:, :-1])
    return float(cross_entropy(logits, tokens[:, 1:]).mean())


def test_no_output_depends_on_a_later_input(tiny):
    model, params = tiny
    T = 12

    def logits_of(wte_TD):
        # the gradient with respect to each input's own embedding
        table = jnp.concatenate([wte_TD, jnp.zeros((TINY.vocab_size - T, 32))])
        p = {**params, "wte": {"embedding": table}}
        hidden, _ = model.apply({"params": p}, jnp.arange(T)[None], method="hidden")
        return hidden[0].sum(-1)  # [T]

    jacobian = jax.jit(jax.jacrev(logits_of))(params["wte"]["embedding"][:T])
    for t in range(T):
        assert not jacobian[t, t + 1 :].any()  # exactly zero
        assert jnp.abs(jacobian[t, : t + 1]).max(-1).min() > 1e-6


def test_scanned_layers_are_the_same_function(tiny):
    _, params = tiny
    dropping = dataclasses.replace(
        TINY, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1
    )
    loop, scan = (
        jax.jit(partial(model.apply, deterministic=False))(
            {"params": params}, TOKENS, rngs={"dropout": jax.random.key(3)}
        )[0]
        for model in (GPT2(dropping), GPT2(dropping, scan_layers=True))
    )
    # the same sums in another order, logits of size 5
    np.testing.assert_allclose(loop, scan, atol=2e-5)
    scanned = jax.eval_shape(
        partial(init, GPT2(TINY, scan_layers=True)), jax.random.key(0)
    )
    assert jax.tree.structure(scanned) == jax.tree.structure(params)


def test_stacked_layers_are_the_same_parameters(tiny):
    _, params = tiny
    stacked = stack_layers({"params": params, "step": jnp.zeros(())})
    assert set(stacked["params"]) == {"wte", "wpe", "ln_f", "h"}
    assert stacked["params"]["h"]["mlp"]["c_fc"]["kernel"].shape == (3, 32, 128)
    jax.tree.map(
        np.testing.assert_array_equal, unstack_layers(stacked)["params"], params
    )
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(params), params)
    model = GPT2(TINY, scan_layers=True)
    logits, expected = (
        jax.jit(model.apply)({"params": p}, TOKENS)[0]
        for p in (stacked["params"], params)
    )
    np.testing.assert_array_equal(logits, expected)
    fresh = init(model, jax.random.key(1))
    jax.tree.map(
        np.testing.assert_array_equal,
        unstack_layers(init(model, jax.random.key(1), stacked=True)),
        fresh,
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_rematerialisation_takes_time_for_memory_and_changes_nothing(scan_layers):
    cfg = dataclasses.replace(TINY, n_layer=4, attn_pdrop=0.1, resid_pdrop=0.1)
    params, inputs = random_params(cfg, stddev=0.2), TOKENS.reshape(8, 16)

    def loss(params, tokens, remat):
        model = GPT2(cfg, scan_layers=scan_layers, remat=remat)
        rngs = {"dropout": jax.random.key(3)}
        logits, _ = model.apply(
            {"params": params}, tokens, deterministic=False, rngs=rngs
        )
        return jnp.square(logits).mean()

    step = jax.jit(jax.grad(loss), static_argnums=2)
    names = ["none", "dots", "block"]
    compiled = [step.lower(params, inputs, name).compile() for name in names]
    none, dots, block = (c.cost_analysis()["flops"] for c in compiled)
    assert none < dots < block
    if scan_layers or jax.__version_info__ >= (0, 11):
        # else XLA:CPU computes again, but long before it needs to
        none, dots, block = (c.memory_analysis().temp_size_in_bytes for c in compiled)
        assert none > 1.5 * dots
        assert dots > 1.2 * block
    expected, *others = (c(params, inputs) for c in compiled)
    for grads in others:  # the same operations, fused otherwise
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), grads, expected
        )


def test_an_unknown_rematerialisation_is_refused(tiny):
    _, params = tiny
    with pytest.raises(ValueError, match="remat='all' is not one of none, dots, block"):
        GPT2(TINY, remat="all").apply({"params": params}, TOKENS)


@pytest.mark.parametrize("place", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_dropout_at_each_of_its_places(tiny, place):
    _, params = tiny
    cfg = dataclasses.replace(TINY, n_layer=1, **{place: 0.5})
    apply = jax.jit(GPT2(cfg).apply, static_argnames="deterministic")

    def run(key, deterministic=False):
        rngs = {"dropout": jax.random.key(key)}
        return apply({"params": params}, TOKENS, deterministic=deterministic, rngs=rngs)

    assert (run(0)[0] == run(0)[0]).all()
    assert (run(0)[0] != run(1)[0]).any()
    plain = dataclasses.replace(TINY, n_layer=1)
    expected = reference_logits(plain, params, TOKENS)
    # float32 against float64, logits of size 5
    np.testing.assert_allclose(run(0, deterministic=True)[0], expected, atol=2e-5)


def test_compute_dtype_is_apart_from_parameter_dtype(tiny):
    _, params = tiny
    model, args = GPT2(TINY, dtype=jnp.bfloat16), ({"params": params}, TOKENS)
    hidden = jax.eval_shape(partial(model.apply, method="hidden"), *args)[0]
    assert hidden.dtype == jnp.bfloat16
    logits, _ = jax.jit(model.apply)(*args)
    assert logits.dtype == jnp.float32
    fresh = jax.eval_shape(partial(init, model), jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    exact = reference_logits(TINY, params, TOKENS)
    # bfloat16 has 8 bits: about 1% of logits whose spread is about 2
    assert float(jnp.abs(logits - exact).mean()) < 0.05


def test_too_many_tokens_are_refused(tiny):
    model, params = tiny
    with pytest.raises(ValueError, match="T=65 tokens exceed n_positions=64"):
        model.apply({"params": params}, np.zeros((1, 65), np.int32))
    cache = KVCache.empty(TINY, 1, 8, jnp.float32)
    with pytest.raises(ValueError, match="T=9 tokens exceed the cache size=8"):
        model.apply({"params": params}, np.zeros((1, 9), np.int32), cache)


def test_dtype_names():
    assert dtype_named("bfloat16") == jnp.bfloat16
    with pytest.raises(ValueError, match="dtype='fp16' is not one of float32"):
        dtype_named("fp16")


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    ("n_in", "kernel"), [(1, (6, 3, 2, 4)), (1, (6, 3, 4)), (2, (3, 4, 6)), (1, (9, 2))]
)
def test_the_gradient_of_an_affine_map_is_the_usual_one(
    platform, use_bias, n_in, kernel
):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, *kernel[:n_in])).astype(np.float32)
    kernel = rng.normal(size=kernel).astype(np.float32)
    out = kernel.shape[n_in:]
    bias = rng.normal(size=math.prod(out)).astype(np.float32)
    dy = rng.normal(size=(2, 5, *out)).astype(np.float32)
    args = (x, kernel, bias) if use_bias else (x, kernel)

    def usual(x, kernel, bias=None):
        y = jnp.tensordot(x, kernel, n_in)
        return y if bias is None else y + bias.reshape(out)

    def ours(x, kernel, bias=None):
        return affine(x, kernel, bias, n_in)

    with traced_for(platform):
        y, backward = jax.vjp(ours, *args)
        gradients = backward(dy)
    expected, usual_backward = jax.vjp(usual, *args)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)  # rounding
    for got, wanted in zip(gradients, usual_backward(dy), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-5)  # rounding


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize("kernel", [(64, 3, 2, 4), (64, 8)])
def test_in_bfloat16_sums_are_float32(platform, kernel):
    """Of 64 ones that bfloat16, which ends at 256, would lose beside it."""
    x = np.ones((1, 64), jnp.bfloat16)
    x[0, 0] = 256
    kernel = np.ones(kernel, np.float32)
    bias = np.full(kernel[0].size, 4, np.float32)
    with traced_for(platform):
        y, backward = jax.vjp(lambda *args: affine(*args, 1), x, kernel, bias)
        dx, dkernel, dbias = backward(jnp.ones_like(y))
    assert y.dtype == (jnp.float32 if platform == "cpu" else jnp.bfloat16)
    np.testing.assert_array_equal(y, np.full(y.shape, 323).astype(y.dtype))
    assert [v.dtype for v in (dx, dkernel, dbias)] == [x.dtype, np.float32, np.float32]
    np.testing.assert_array_equal(dkernel[:2].reshape(2, -1)[:, 0], [256, 1])
    np.testing.assert_array_equal(dbias, np.ones_like(bias))


@pytest.mark.parametrize("name", ["gelu_new", "gelu", "silu"])
def test_of_an_activation_accelerators_keep_what_went_in(name):
    x = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    f = partial(activate, name=name)
    y, usual = jax.vjp(f, x)
    for platform in ("tpu", "gpu"):
        with traced_for(platform):
            got, backward = jax.vjp(f, x)
            np.testing.assert_allclose(got, y, rtol=0, atol=1e-6)  # rounding
            np.testing.assert_allclose(
                *(b(np.ones_like(x))[0] for b in (backward, usual)), rtol=0, atol=1e-6
            )
        kept = [v for v in jax.tree.leaves(backward) if np.ndim(v)]
        assert [v.shape for v in kept] == [x.shape]
    assert len([v for v in jax.tree.leaves(usual) if np.ndim(v)]) > 1


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_gradient_of_a_layer_norm_is_the_usual_one(monkeypatch, backend, use_bias):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(1, 2, (2, 3, 5, 8)).astype(np.float32)
    scale, bias = rng.normal(1, 1, (2, 8)).astype(np.float32)
    args = (x, scale, bias) if use_bias else (x, scale)

    def plain(x, scale, bias=0.0):
        variance = x.var(-1, keepdims=True)
        normal = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(variance + 1e-5)
        return normal * scale + bias

    def ours(x, scale, bias=None):
        return normalize(x, scale, bias, 1e-5)

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    (y, backward), (expected, expected_backward) = (
        jax.vjp(f, *args) for f in (ours, plain)
    )
    # the rounding of sums of 15 numbers of size 1
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    for got, want in zip(backward(dy), expected_backward(dy), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_layer_norm_in_bfloat16_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (4, 8)), jnp.bfloat16)
    y, backward = jax.vjp(lambda x: normalize(x, jnp.ones(8), jnp.zeros(8), 1e-5), x)
    exact = np.asarray(x, np.float64)
    exact -= exact.mean(-1, keepdims=True)
    exact /= np.sqrt(np.square(exact).mean(-1, keepdims=True) + 1e-5)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-6)
    assert backward(y)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_form_for_cpus_is_the_form_for_accelerators(platform):
    """Logits and gradients, with more tokens than attend together."""
    cfg = dataclasses.replace(TINY, n_positions=QUERIES + 30)
    model = GPT2(cfg)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, QUERIES + 30))
    params = random_params(cfg, stddev=0.2)

    def loss(params):
        logits, _ = model.apply({"params": params}, tokens)
        return jnp.sin(logits).sum(), logits

    def run():
        grad = jax.jit(lambda p: jax.value_and_grad(loss, has_aux=True)(p))
        text = grad.lower(params).as_text()
        return text, jax.tree.leaves(grad(params))

    here, ours = run()
    with traced_for(platform):
        there, theirs = run()
    assert here != there
    for got, expected in zip(ours, theirs, strict=True):
        # sums of up to 316 terms in another order
        scale = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)
