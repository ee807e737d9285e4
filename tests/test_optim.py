import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.model import abstract_params
from gpt2_jax.optim import OptimConfig, decay_mask, make_optimizer, schedule
from shapes import TINY

CFG = OptimConfig(
    learning_rate=1e-3,
    min_learning_rate=1e-4,
    warmup_steps=10,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
)


def test_schedule_warms_up_and_ends_at_the_minimum():
    lr = schedule(CFG, 100)
    expected = {
        0: 1e-4,
        4: 5e-4,
        9: 1e-3,
        54: 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * 45 / 90)),
        99: 1e-4,
    }
    for step, value in expected.items():
        assert float(lr(step)) == pytest.approx(value, rel=1e-5)


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


def test_updates_equal_adamw_written_out():
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    params = {k: v.astype(np.float32) for k, v in params.items()}
    optimizer = make_optimizer(CFG, 100)
    ours = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(ours)
    theirs = {k: v.astype(np.float64) for k, v in params.items()}
    m = {k: 0 for k in params}
    v = {k: 0 for k in params}
    for step in range(5):
        scale = 10.0 if step % 2 else 0.01  # above the clipping norm, and below
        grads = {
            k: (scale * rng.normal(size=x.shape)).astype(np.float32)
            for k, x in params.items()
        }
        updates, state = optimizer.update(grads, state, ours)
        ours = jax.tree.map(jnp.add, ours, updates)

        norm = math.sqrt(sum((g.astype(float) ** 2).sum() for g in grads.values()))
        lr = 1e-3 * (step + 1) / 10
        for k, g in grads.items():
            g = g.astype(float) * min(1.0, 1.0 / norm)
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.95 * v[k] + 0.05 * g**2
            m_hat = m[k] / (1 - 0.9 ** (step + 1))
            v_hat = v[k] / (1 - 0.95 ** (step + 1))
            decay = 0.1 * theirs[k] if theirs[k].ndim >= 2 else 0
            theirs[k] = theirs[k] - lr * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay)
    for k in params:
        # float32 against float64 over five updates of about 1e-3
        np.testing.assert_allclose(ours[k], theirs[k], rtol=0, atol=2e-7)
        assert np.abs(theirs[k] - params[k]).max() > 1e-4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1.0}, "optim.learning_rate=-1.0 must be finite and >= 0"),
        ({"weight_decay": math.inf}, "optim.weight_decay=inf must be finite"),
        ({"min_learning_rate": 1.0}, "min_learning_rate=1.0 exceeds"),
        ({"b2": 1.0}, "optim.b2=1.0 must be < 1"),
        ({"clip_norm": 0.0}, "optim.clip_norm=0 must be > 0"),
    ],
)
def test_bad_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **values)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=10 must be less than steps=10"):
        schedule(CFG, 10)
