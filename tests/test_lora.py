import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from test_optim import CFG

from gpt2_jax.layout import count_params, stack_layers, unstack_layers
from gpt2_jax.lora import LoraConfig, init_adapters, merged, with_adapters
from gpt2_jax.model import GPT2
from gpt2_jax.runtime.sharding import make_mesh
from gpt2_jax.training.optim import make_optimizer
from gpt2_jax.training.step import gradients, init_state, train_step
from shapes import TINY

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0, kernels=("c_attn", "c_proj", "c_fc"))
RNG = np.random.default_rng(0)


def trained_adapters(lora=LORA):
    """As they may be after training: B is no longer 0."""
    adapters = init_adapters(lora, TINY, jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.05 * RNG.normal(size=x.shape), adapters)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_merged_and_unmerged_compute_the_same(tiny, scan_layers):
    model, params = tiny
    adapters = trained_adapters()
    tokens = RNG.integers(0, TINY.vocab_size, (2, 30))
    layout = stack_layers if scan_layers else lambda x: x
    beside = with_adapters(layout(params), layout(adapters), LORA)
    apply = jax.jit(GPT2(TINY, scan_layers=scan_layers).apply)
    logits, _ = apply({"params": beside}, tokens)
    whole = merged(params, adapters, LORA)
    expected, _ = jax.jit(model.apply)({"params": whole}, tokens)
    # the bar; logits reach 10
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    without, _ = model.apply({"params": params}, tokens)
    assert np.abs(logits - without).max() > 0.1


def test_a_kernel_gets_alpha_over_rank_times_the_product(tiny):
    _, params = tiny
    adapters = trained_adapters()
    for part, name, n_in in [("attn", "c_proj", 2), ("attn", "c_attn", 1)]:
        a, b = (
            np.asarray(adapters["h_1"][part][name][f"lora_{x}"], np.float64)
            for x in "ab"
        )
        kernel = np.asarray(params["h_1"][part][name]["kernel"])
        product = a.reshape(-1, 4) @ b.reshape(4, -1)
        got = merged(params, adapters, LORA)["h_1"][part][name]["kernel"]
        assert kernel.shape[:n_in] == a.shape[:-1]
        # float32 products of four terms
        np.testing.assert_allclose(
            got, kernel + 2 * product.reshape(kernel.shape), atol=1e-6
        )


def test_fresh_adapters_change_nothing_and_are_the_same_in_either_layout(tiny):
    model, params = tiny
    adapters = init_adapters(LORA, TINY, jax.random.key(0))
    tokens = RNG.integers(0, TINY.vocab_size, (2, 9))
    got, _ = model.apply({"params": with_adapters(params, adapters, LORA)}, tokens)
    expected, _ = model.apply({"params": params}, tokens)
    np.testing.assert_array_equal(got, expected)
    stacked = init_adapters(LORA, TINY, jax.random.key(0), stacked=True)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), adapters)
    a = np.asarray(adapters["h_0"]["mlp"]["c_proj"]["lora_a"])
    # 512 draws of deviation 1 / sqrt(128)
    assert a.std() == pytest.approx(128**-0.5, rel=0.1)


def test_only_the_chosen_kernels_are_adapted():
    lora = dataclasses.replace(LORA, kernels=("c_attn", "mlp/c_proj"))
    adapters = init_adapters(lora, TINY, jax.random.key(0))
    assert sorted(adapters) == ["h_0", "h_1", "h_2"]
    assert {(k, *v) for k, v in adapters["h_1"].items()} == {
        ("attn", "c_attn"),
        ("mlp", "c_proj"),
    }
    # rank times inputs and outputs: 32 + 96 and 128 + 32
    assert count_params(adapters) == 3 * 4 * (32 + 96 + 128 + 32)


def test_gradients_are_those_of_the_merged_kernels(tiny):
    """By the chain rule: dA = scale dW B', dB = scale A' dW."""
    model, params = tiny
    adapters = trained_adapters()
    tokens = RNG.integers(0, TINY.vocab_size, (2, 3, 17))
    step = partial(gradients, model=model, lora=LORA)
    loss, grads = jax.jit(step)(adapters, tokens, None, None, params)
    whole = merged(params, adapters, LORA)
    expected_loss, expected = jax.jit(partial(gradients, model=model))(
        whole, tokens, None
    )
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    dw = np.asarray(expected["h_2"]["mlp"]["c_fc"]["kernel"])
    pair, got = adapters["h_2"]["mlp"]["c_fc"], grads["h_2"]["mlp"]["c_fc"]
    # sums in another order, of gradients of up to 0.1
    np.testing.assert_allclose(got["lora_a"], 2 * dw @ pair["lora_b"].T, atol=1e-5)
    np.testing.assert_allclose(got["lora_b"], 2 * pair["lora_a"].T @ dw, atol=1e-5)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)


def test_dropout_of_what_goes_into_adapters(tiny):
    _, params = tiny
    adapters = trained_adapters()
    tokens = RNG.integers(0, TINY.vocab_size, (1, 2, 17))

    def loss(rate, key):
        model = GPT2(TINY, lora_pdrop=rate)
        step = partial(gradients, model=model, lora=LORA, dropout_key=key)
        return float(step(adapters, tokens, None, None, params)[0])

    plain = loss(0.0, None)
    assert loss(0.5, None) == plain  # as in evaluation
    assert loss(0.0, jax.random.key(0)) == plain
    dropped = {loss(0.5, jax.random.key(i)) for i in range(3)}
    assert len(dropped) == 3
    assert plain not in dropped


@pytest.mark.parametrize(
    "shape", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)]
)
def test_eight_devices_equal_one(tiny, shape):
    """And the state holds adapters alone."""
    _, params = tiny
    batches = RNG.integers(0, TINY.vocab_size, (4, 1, 8, 17)).astype(np.int32)

    def losses(mesh, model):
        optimizer = make_optimizer(dataclasses.replace(CFG, learning_rate=0.02), 100)
        state = init_state(model, optimizer, mesh, 0, LORA)
        base = stack_layers(params) if model.scan_layers else params
        step = jax.jit(
            partial(train_step, model=model, optimizer=optimizer, seed=0, lora=LORA)
        )
        out = []
        for tokens in batches:
            state, metrics = step(state, tokens, None, None, base)
            out.append(float(metrics["loss"]))
        moments = state.opt_state.inner[0][0].mu
        assert count_params(moments) == count_params(state.params)
        assert count_params(state.params) < count_params(params) / 4
        return np.array(out)

    one = losses(make_mesh(devices=jax.devices()[:1]), GPT2(TINY))
    mesh = make_mesh(*shape)
    many = losses(mesh, GPT2(TINY, mesh=mesh, scan_layers=True))
    np.testing.assert_allclose(many, one, rtol=1e-4)
    assert one[0] != one[-1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": -1}, "lora.rank=-1 must be >= 0"),
        ({"alpha": 0.0}, "lora.alpha=0.0 must be > 0"),
        ({"dropout": 1.0}, r"lora.dropout=1.0 must be in \[0, 1\)"),
        ({"kernels": ("proj",)}, "lora.kernels: 'proj' is not one of attn/c_attn"),
        ({"kernels": ()}, "lora.kernels is empty"),
    ],
)
def test_impossible_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LORA, **values)


def test_a_rank_over_a_side_of_a_kernel_is_refused():
    dataclasses.replace(LORA, rank=32).check_fits(TINY)
    with pytest.raises(
        ValueError, match=r"lora.rank=33 exceeds 32, a side of attn/c_at"
    ):
        dataclasses.replace(LORA, rank=33).check_fits(TINY)
