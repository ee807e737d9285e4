import dataclasses
import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt2_jax.layout import stack_layers, unstack_layers
from gpt2_jax.model import GPT2, abstract_params
from gpt2_jax.runtime.platform import traced_for
from gpt2_jax.runtime.sharding import make_mesh, tree_shardings
from gpt2_jax.training.optim import (
    LOSS_WINDOW,
    LossStatistics,
    OptimConfig,
    averaged_params,
    check_same_state,
    decay_mask,
    guard_counts,
    make_optimizer,
    schedule,
)
from gpt2_jax.training.step import abstract_state
from shapes import TINY, random_params

CFG = OptimConfig(
    name="adamw",
    learning_rate=1e-3,
    muon_learning_rate=0.0,
    schedule="cosine",
    min_learning_rate=1e-4,
    warmup_steps=10,
    decay_steps=0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    state_dtype="float32",
    ema_decay=0.0,
    max_skipped=10,
    max_loss_z=0.0,
    lr_scales=(),
)
MUON = dataclasses.replace(CFG, name="muon", muon_learning_rate=3e-3)
EMA = dataclasses.replace(CFG, ema_decay=0.75)
SCALED = dataclasses.replace(
    CFG, lr_scales=(("h_[12]/attn", 0.5), ("h_0/", 0.0), ("wte|c_fc", 0.0))
)

SHAPES = {  # as a model has them
    "wte/embedding": (8, 4),
    "attn/c_attn/kernel": (4, 3, 2, 2),
    "attn/c_attn/bias": (12,),
    "attn/c_proj/kernel": (2, 2, 4),
    "mlp/c_fc/kernel": (4, 6),
    "mlp/c_proj/kernel": (6, 4),
    "ln_f/scale": (4,),
}


def drawn(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    flat = {k: scale * rng.normal(size=shape) for k, shape in SHAPES.items()}
    return unflatten_dict(
        {k: jnp.asarray(x, jnp.float32) for k, x in flat.items()}, sep="/"
    )


def flat(tree):
    """path -> array, at the precision of the references here."""
    return {k: np.asarray(x, float) for k, x in flatten_dict(tree, sep="/").items()}


@lru_cache
def compiled(cfg, platform="cpu"):
    """The optimizer of a run of 100 updates, and its jitted step."""
    optimizer = make_optimizer(cfg, 100)

    def step(params, state, grads, loss):
        with traced_for(platform):
            return optimizer.apply(grads, state, params, loss)[:2]

    return optimizer, jax.jit(step)


def run(cfg, n, between=lambda i, step, params, state: (params, state), **kwargs):
    """n updates; `between` is called before each of them."""
    optimizer, step = compiled(cfg, **kwargs)
    params = drawn(0)
    state = optimizer.init(params)
    for i in range(n):
        params, state = between(i, step, params, state)
        # above the clipping norm and below
        grads = drawn(1 + i, scale=10.0 if i % 2 else 0.01)
        params, state = step(params, state, grads, jnp.float32(5 - 0.1 * i))
    return params, state


def assert_same_bits(tree, expected):
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(expected)
    for x, other in zip(leaves, others, strict=True):
        assert np.asarray(x).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {},
            {54: 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * 45 / 90)), 99: 1e-4},
        ),
        ({"schedule": "linear"}, {54: 5.5e-4, 98: 1.1e-4, 99: 1e-4}),
        (
            {"schedule": "wsd", "decay_steps": 20},
            {10: 1e-3, 79: 1e-3, 84: 5.5e-4, 95: 1e-3 - 9e-4 * 0.8**0.5, 99: 1e-4},
        ),
        ({"schedule": "wsd", "decay_steps": 90}, {54: 1e-3 - 9e-4 * 0.5**0.5}),
        ({"schedule": "constant"}, {10: 1e-3, 99: 1e-3}),
        ({"warmup_steps": 0, "schedule": "linear"}, {0: 9.91e-4, 49: 5.5e-4}),
    ],
)
def test_schedules_at_named_updates(values, expected):
    cfg = dataclasses.replace(CFG, **values)
    rate = schedule(cfg, 100)
    if cfg.warmup_steps:
        expected = {0: 1e-4, 4: 5e-4, 9: 1e-3} | expected
    for step, value in expected.items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-5)
        assert float(jax.jit(rate)(step)) == pytest.approx(value, rel=1e-5)


def test_decay_is_for_matrices_only():
    mask = decay_mask(abstract_params(TINY))
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, on in jax.tree_util.tree_leaves_with_path(mask)
        if on
    }
    kernels = {
        f"h_{i}/{name}/kernel"
        for i in range(TINY.n_layer)
        for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    }
    assert decayed == {"wte/embedding", "wpe/embedding", *kernels}


@pytest.mark.parametrize(
    "cfg",
    [CFG, MUON, EMA, SCALED, dataclasses.replace(SCALED, name="muon")],
    ids=["adamw", "muon", "average", "scaled", "scaled-muon"],
)
def test_stacked_layers_are_updated_like_single_ones(cfg):
    optimizer = make_optimizer(cfg, 100)
    params, grads = random_params(TINY, stddev=0.2), random_params(TINY, stddev=0.1)
    grads = jax.tree.map(lambda x: x - x.mean(), grads)

    @jax.jit
    def update(params, grads):
        state = optimizer.init(params)
        return optimizer.apply(grads, state, params, jnp.float32(1))

    expected = update(params, grads)
    got = update(stack_layers(params), stack_layers(grads))
    assert jax.tree.structure(unstack_layers(got)) == jax.tree.structure(expected)
    # rounding, which Muon's iteration makes larger
    tolerance = 1e-3 if cfg is MUON else 1e-5
    for x, y in zip(
        jax.tree.leaves(unstack_layers(got)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


class AdamW:
    """CFG written out."""

    def __init__(self, b1=0.9):
        self.b1, self.m, self.v, self.t = b1, 0.0, 0.0, 0

    def __call__(self, g, x, rate):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = 0.95 * self.v + 0.05 * g**2
        m_hat = self.m / (1 - self.b1**self.t)
        v_hat = self.v / (1 - 0.95**self.t)
        decay = 0.1 * x if x.ndim >= 2 else 0
        return x - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay)


def newton_schulz(g):
    """Source: https://kellerjordan.github.io/posts/muon."""
    x = g / (np.linalg.norm(g) + 1e-8)
    if len(g) > len(g.T):
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if len(g) > len(g.T) else x


class Muon:
    """MUON written out, for an array that is cut into matrices."""

    def __init__(self, matrices):
        self.matrices, self.m, self.t = matrices, 0.0, 0

    def __call__(self, g, x, rate):
        self.t += 1
        self.m = 0.95 * self.m + 0.05 * g
        nesterov = 0.95 * self.m / (1 - 0.95 ** (self.t + 1))
        nesterov = nesterov + 0.05 * g / (1 - 0.95**self.t)
        x = x.copy()
        for index, shape in self.matrices:
            update = newton_schulz(nesterov[index].reshape(shape))
            update = 0.2 * math.sqrt(max(shape)) * update
            x[index] -= 3 * rate * (update.reshape(x[index].shape) + 0.1 * x[index])
        return x


MATRICES = {
    "attn/c_attn/kernel": [((slice(None), i), (4, 4)) for i in range(3)],  # q, k, v
    "attn/c_proj/kernel": [(..., (4, 4))],
    "mlp/c_fc/kernel": [(..., (4, 6))],
    "mlp/c_proj/kernel": [(..., (6, 4))],
}


@pytest.mark.parametrize("cfg", [CFG, MUON], ids=["adamw", "muon"])
def test_updates_equal_those_written_out(cfg):
    params, _ = run(cfg, 5)
    initial = flat(drawn(0))
    expected = dict(initial)
    rules = {
        name: Muon(MATRICES[name]) if cfg is MUON and name in MATRICES else AdamW()
        for name in SHAPES
    }
    for i in range(5):
        grads = flat(drawn(1 + i, scale=10.0 if i % 2 else 0.01))
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, g in grads.items():
            g = g * min(1.0, 1.0 / norm)
            expected[name] = rules[name](g, expected[name], 1e-3 * (i + 1) / 10)
    for name, x in flat(params).items():
        # float32 against float64 over five updates of about 1e-3
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-6, err_msg=name)
        assert np.abs(x - initial[name]).max() > 1e-4


def test_average_is_that_of_the_params_after_each_update():
    seen = []

    def between(i, step, params, state):
        seen.append(flat(params))
        return params, state

    params, state = run(EMA, 5, between)
    first, *rest = [*seen, flat(params)]
    average = flat(averaged_params(state))
    for name, expected in first.items():
        for later in rest:
            expected = 0.75 * expected + 0.25 * later[name]
        # float32 against float64; the last params are 1e-4 away
        np.testing.assert_allclose(average[name], expected, rtol=0, atol=1e-6)
        assert np.abs(average[name] - rest[-1][name]).max() > 1e-4
    without, state = run(CFG, 5)
    assert averaged_params(state) is None
    assert_same_bits(params, without)  # the average only looks on


def in_one_leaf(value):
    grads = drawn(9)
    c_attn = grads["attn"]["c_attn"]
    c_attn["bias"] = c_attn["bias"].at[3].set(value)
    return grads


BAD = {
    "nan loss": (drawn(9), math.nan),
    "infinite loss": (drawn(9), math.inf),
    "nan gradient": (in_one_leaf(math.nan), 4.0),
    "infinite gradient": (in_one_leaf(-math.inf), 4.0),
    "overflowing norm": (in_one_leaf(1e30), 4.0),
}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("cfg", [EMA, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("bad", BAD)
def test_after_a_bad_batch_all_is_as_if_it_had_never_been(cfg, bad, platform):
    grads, loss = BAD[bad]

    def between(i, step, params, state):
        # 0.0 added to it would be 0.0
        params["ln_f"]["scale"] = params["ln_f"]["scale"].at[0].set(-0.0)
        if i not in (0, 3):
            return params, state
        for n in (1, 2):
            after, state_after = step(params, state, grads, jnp.float32(loss))
            assert_same_bits(after, params)
            assert_same_bits(state_after.inner, state.inner)
            assert_same_bits(state_after.losses, state.losses)
            counts = {k: int(x) for k, x in guard_counts(state_after).items()}
            assert counts == {"skipped": n + 2 * (i == 3), "skipped_in_row": n}
            params, state = after, state_after
        return params, state

    def clean(i, step, params, state):
        params["ln_f"]["scale"] = params["ln_f"]["scale"].at[0].set(-0.0)
        return params, state

    params, state = run(cfg, 5, between, platform=platform)
    expected, expected_state = run(cfg, 5, clean, platform=platform)
    assert_same_bits((params, state.inner), (expected, expected_state.inner))
    assert int(state.skipped) == 4
    assert int(state.skipped_in_row) == 0
    assert int(expected_state.skipped) == 0


def test_loss_statistics_written_out():
    losses = np.random.default_rng(0).normal(3, 0.5, LOSS_WINDOW + 50)
    statistics = LossStatistics(jnp.int32(0), jnp.float32(0), jnp.float32(0))
    add = jax.jit(LossStatistics.add)
    for i, loss in enumerate(losses):
        if i == LOSS_WINDOW:
            mean, variance = losses[:i].mean(), losses[:i].var()
            assert float(statistics.mean) == pytest.approx(mean, rel=1e-5)
            assert float(statistics.variance) == pytest.approx(variance, rel=1e-4)
        statistics = add(statistics, jnp.float32(loss))
    weights = np.full(len(losses), 1 / LOSS_WINDOW)
    weights[LOSS_WINDOW:] *= (1 - 1 / LOSS_WINDOW) ** np.arange(50)[::-1]
    weights[:LOSS_WINDOW] *= (1 - 1 / LOSS_WINDOW) ** 50
    mean = (weights * losses).sum()
    assert float(statistics.mean) == pytest.approx(mean, rel=1e-5)
    variance = (weights * (losses - mean) ** 2).sum()
    assert float(statistics.variance) == pytest.approx(variance, rel=1e-4)


def test_a_spike_is_skipped_where_asked_and_once_losses_are_known():
    cfg = dataclasses.replace(CFG, max_loss_z=4.0)
    params = drawn(0)
    grads = drawn(1)

    def skipped(cfg, loss, seen=LOSS_WINDOW):
        optimizer, step = compiled(cfg)
        losses = LossStatistics(jnp.int32(seen), jnp.float32(3.0), jnp.float32(0.5**2))
        state = optimizer.init(params)._replace(losses=losses)
        after, after_state = step(params, state, grads, jnp.float32(loss))
        if int(after_state.skipped):
            assert_same_bits(after, params)
            assert_same_bits(after_state.inner, state.inner)
            assert_same_bits(after_state.losses, losses)
        else:
            assert int(after_state.losses.seen) == seen + 1
            assert not np.array_equal(after["ln_f"]["scale"], params["ln_f"]["scale"])
        return int(after_state.skipped)

    assert skipped(cfg, 3 + 4.01 * 0.5)
    assert not skipped(cfg, 3 + 3.99 * 0.5)
    assert not skipped(cfg, -100.0)  # a loss that falls is none
    assert not skipped(cfg, 100.0, seen=LOSS_WINDOW - 1)
    assert not skipped(CFG, 100.0)
    assert skipped(cfg, math.nan, seen=0)


@pytest.mark.parametrize("cfg", [CFG, MUON], ids=["adamw", "muon"])
def test_first_moments_in_bfloat16(cfg):
    low_cfg = dataclasses.replace(cfg, state_dtype="bfloat16")
    params, state = run(low_cfg, 5)
    expected, _ = run(cfg, 5)
    dtypes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x.dtype
        for path, x in jax.tree_util.tree_leaves_with_path(state.inner)
        if x.ndim
    }
    assert {dtypes[p] for p in dtypes if "/mu/" in p} == {jnp.dtype(jnp.bfloat16)}
    assert {dtypes[p] for p in dtypes if "/nu/" in p} == {jnp.dtype(jnp.float32)}
    for name, x in flat(params).items():
        moved = np.abs(flat(expected)[name] - flat(drawn(0))[name]).max()
        off = np.abs(x - flat(expected)[name]).max()
        assert 0 < off < 0.02 * moved  # eight bits of mantissa


EVEN = dataclasses.replace(TINY, vocab_size=64, n_layer=1)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cfg", [CFG, MUON], ids=["adamw", "muon"])
def test_each_leaf_of_the_state_lies_as_its_parameter(cfg, state_dtype, ema_decay):
    cfg = dataclasses.replace(cfg, state_dtype=state_dtype, ema_decay=ema_decay)
    optimizer = make_optimizer(cfg, 100)
    # raises on a leaf that no rule, or more than one, matches
    state = abstract_state(GPT2(EVEN), optimizer, make_mesh(2, 2, 2))
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        mirrors = {p: by_path.pop(p) for p in list(by_path) if p.endswith(name)}
        n_moments = 1 if cfg.name == "muon" and name.endswith("kernel") else 2
        assert len(mirrors) == n_moments + (ema_decay > 0)
        for mirror_path, mirror in mirrors.items():
            assert mirror.shape == x.shape
            assert mirror.sharding.spec == x.sharding.spec
            is_low = state_dtype == "bfloat16" and "/mu/" in mirror_path
            assert mirror.dtype == (jnp.bfloat16 if is_low else jnp.float32)
    assert all(x.size <= 3 for x in by_path.values())  # what is left are counts


def test_eight_devices_equal_one_and_keep_their_shards():
    optimizer, step = compiled(dataclasses.replace(MUON, ema_decay=0.9))
    step = jax.jit(step, donate_argnums=(0, 1))

    def after_three(mesh):
        state = (drawn(0), optimizer.init(drawn(0)))
        shardings = tree_shardings(state, mesh)
        state = jax.device_put(state, shardings)
        for i, loss in enumerate([4.0, math.nan, 4.0]):
            before = jax.tree.leaves(state)
            grads = jax.device_put(drawn(1 + i), shardings[0])
            state = step(*state, grads, jnp.float32(loss))
            assert all(x.is_deleted() for x in before)  # all were donated
            for x, sharding in zip(
                jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
            ):
                assert x.sharding.is_equivalent_to(sharding, x.ndim)
        return state

    one = after_three(make_mesh(devices=jax.devices()[:1]))
    many = after_three(make_mesh(2, 2, 2))
    assert int(many[1].skipped) == 1
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        # sums in another order; updates are of 1e-4
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "adam"}, "optim.name='adam' is not one of adamw, muon"),
        ({"schedule": "step"}, "optim.schedule='step' is not one of cosine, wsd, lin"),
        ({"state_dtype": "int8"}, "optim.state_dtype='int8' is not one of float32, b"),
        ({"learning_rate": -1.0}, "optim.learning_rate=-1.0 must be >= 0"),
        ({"learning_rate": 0.0}, "optim.learning_rate=0.0 must be > 0"),
        ({"weight_decay": math.inf}, "optim.weight_decay=inf must be a number, finite"),
        ({"max_skipped": -1}, "optim.max_skipped=-1 must be >= 0"),
        ({"max_loss_z": math.nan}, "optim.max_loss_z=nan must be a number, finite"),
        ({"min_learning_rate": 1.0}, "min_learning_rate=1.0 exceeds"),
        ({"b2": 1.0}, r"optim.b2=1.0 must be in \[0, 1\)"),
        ({"ema_decay": 1.0}, r"optim.ema_decay=1.0 must be in \[0, 1\)"),
        ({"ema_decay": 1 - 1e-9}, "optim.ema_decay=.*, which is 1 in float32, must be"),
        ({"eps": 1e-46}, "optim.eps=1e-46, which is 0 in float32, must be > 0"),
        ({"clip_norm": 0.0}, "optim.clip_norm=0.0 must be > 0"),
        ({"schedule": "wsd"}, "optim.decay_steps=0 must be >= 1 with optim.schedule=w"),
        ({"decay_steps": 5}, "optim.decay_steps=5 must be 0 with optim.schedule=cos"),
        ({"muon_learning_rate": 1.0}, "optim.muon_learning_rate=1.0 must be 0 with op"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "muon"}, "checkpoint has optim.name=adamw, the config muon: choose"),
        ({"state_dtype": "bfloat16"}, "has optim.state_dtype=float32, the config bfl"),
        ({"ema_decay": 0.0}, "checkpoint has optim.ema_decay=0.75, the config 0.0"),
        ({"ema_decay": 0.9, "learning_rate": 2e-3, "max_loss_z": 5.0}, None),
    ],
)
def test_a_state_of_another_kind_is_refused(values, message):
    cfg = dataclasses.replace(EMA, **values)
    saved = dataclasses.asdict(EMA)
    if message is None:
        check_same_state(cfg, saved)
        initial, later = (
            jax.eval_shape(make_optimizer(c, 100).init, drawn(0)) for c in (EMA, cfg)
        )
        assert initial == later
    else:
        with pytest.raises(ValueError, match=message):
            check_same_state(cfg, saved)


def test_a_schedule_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=10 must be less than steps=10"):
        schedule(CFG, 10)
    wsd = dataclasses.replace(CFG, schedule="wsd", decay_steps=5)
    schedule(wsd, 15)
    message = r"optim.warmup_steps=10 \+ optim.decay_steps=5 exceed steps=14"
    with pytest.raises(ValueError, match=message):
        schedule(wsd, 14)


def test_rates_are_scaled_by_path():
    """The first update of AdamW is linear in the rate: so are what differ by it."""
    optimizer, scaled = (make_optimizer(cfg, 100) for cfg in (CFG, SCALED))
    params, grads = random_params(TINY, stddev=0.2), random_params(TINY, stddev=0.01)
    # each gradient has a part in the norm of one, those of the trained in the other's
    loose = [dataclasses.replace(cfg, clip_norm=1e9) for cfg in (CFG, SCALED)]
    optimizer, scaled = (make_optimizer(cfg, 100) for cfg in loose)
    after, *_ = optimizer.apply(grads, optimizer.init(params), params, 1.0)
    got, state, norm = scaled.apply(grads, scaled.init(params), params, 1.0)
    squares = 0.0
    moved, expected, before, grad = (flat(x) for x in (got, after, params, grads))
    for path, x in before.items():
        factor = 1.0
        if path.startswith("h_0/") or "wte" in path or "c_fc" in path:
            factor = 0.0
        elif "attn" in path:
            factor = 0.5
        # differences of float32 numbers of size 1
        np.testing.assert_allclose(
            moved[path] - x, factor * (expected[path] - x), atol=2e-7
        )
        if factor == 0:
            np.testing.assert_array_equal(moved[path], x)
        else:
            squares += (grad[path] ** 2).sum()
    assert float(norm) == pytest.approx(squares**0.5, rel=1e-5)
    # what is frozen in all layers has no moments; h_0 has them, as the others do
    held = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state)
    }
    assert not any("wte" in path or "c_fc" in path for path in held)
    assert any("h_0/attn/c_attn/kernel" in path for path in held)


def test_frozen_parameters_do_not_decay_and_their_gradients_may_be_bad():
    cfg = dataclasses.replace(CFG, lr_scales=(("wte", 0.0),))
    optimizer = make_optimizer(cfg, 100)
    params, grads = drawn(0), drawn(1)
    grads["wte"]["embedding"] = grads["wte"]["embedding"].at[0].set(jnp.nan)
    got, state, norm = optimizer.apply(grads, optimizer.init(params), params, 1.0)
    assert np.isfinite(norm)
    assert int(state.skipped) == 0
    assert_same_bits(got["wte"], params["wte"])
    assert (
        np.asarray(got["mlp"]["c_fc"]["kernel"]) != params["mlp"]["c_fc"]["kernel"]
    ).all()


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((("wte", -1.0),), "factor -1.0 of 'wte' must be >= 0"),
        ((("(", 1.0),), r"optim.lr_scales: '\(': .*"),
        (("wte",), r"=\('wte',\) must be a list, each item of it \(text, a number"),
    ],
)
def test_bad_scales_are_refused_by_name(pairs, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, lr_scales=pairs)


def test_a_pattern_that_is_found_nowhere_is_refused():
    for pairs in ((("h_7/", 0.5),), (("h_", 0.5), ("h_1/", 0.1))):
        cfg = dataclasses.replace(CFG, lr_scales=pairs)
        with pytest.raises(
            ValueError, match=r"optim.lr_scales: 'h_\d/' is found in no"
        ):
            make_optimizer(cfg, 100).init(random_params(TINY, stddev=0.2))


def test_what_is_frozen_stays_so_in_a_run():
    saved = dataclasses.asdict(SCALED)
    check_same_state(SCALED, saved)
    rates = dataclasses.replace(
        SCALED, lr_scales=(("h_[12]/attn", 0.7), *SCALED.lr_scales[1:])
    )
    check_same_state(rates, saved)
    with pytest.raises(ValueError, match="or freeze the same parameters"):
        check_same_state(CFG, saved)
    check_same_state(CFG, {**saved, "lr_scales": [["wte", 0.3]]})
