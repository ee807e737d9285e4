import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.attention import QUERIES, cached_attention, causal_attention


def reference(q, k, v, positions):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = positions[b, t] + 1
        s = k[b, :seen, h] @ q[b, t, h] / np.sqrt(q.shape[-1])
        p = np.exp(s - s.max())
        out[b, t, h] = p / p.sum() @ v[b, :seen, h]
    return out


@pytest.fixture
def qkv():
    shapes = (2, 5, 3, 8), (2, 9, 3, 8), (2, 9, 3, 8)
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def test_equals_the_reference_at_any_position(qkv):
    positions = np.array([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]])
    out = causal_attention(*qkv, jnp.asarray(positions), scale=8**-0.5)
    # float32 sums of 8 to 9 terms of size 1
    np.testing.assert_allclose(out, reference(*qkv, positions), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_masked_rows_stay_finite(qkv, dtype):
    q, k, v = (x.astype(dtype) for x in qkv)
    out = causal_attention(q, 1e4 * k, v, jnp.full((1, 5), -1), scale=8**-0.5)
    assert out.dtype == dtype
    assert np.isfinite(np.asarray(out, np.float32)).all()


def test_dropout_takes_out_its_share_and_keeps_the_mean():
    q = jnp.zeros((1, 64, 4, 8))
    v = jnp.ones((1, 64, 4, 8))
    positions = jnp.full((1, 64), 63)
    out = causal_attention(
        q, q, v, positions, scale=1, dropout_rate=0.25, dropout_key=jax.random.key(0)
    )
    # 256 rows, each the mean of 64 draws of 0 or 4/3: deviation 0.0045 of the mean
    assert abs(float(out[..., 0].mean()) - 1) < 0.02
    share = float((out[..., 0] * 0.75 * 64).mean() / 64)
    assert abs(share - 0.75) < 0.015


@pytest.mark.parametrize(
    ("T", "held", "known"),
    [(1, (4, 0), False), (3, (4, 0), False), (1, (4, 4), True)]
    + [(QUERIES + 9, (n, n), True) for n in (0, 4)],
)
def test_over_a_cache_as_over_the_sequence(T, held, known):
    """Whatever lies in the cache beyond what a row holds."""
    size = T + 6
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, size, 3, 8)).astype(np.float32)
    cache = rng.normal(size=(2, 2, size, 3, 8)).astype(np.float32)
    new = np.zeros((3, 2, T, 3, 8), np.float32)
    for b, n in enumerate(held):
        cache[:, b, :n] = k[b, :n], v[b, :n]
        new[:, b] = [x[b, n : n + T] for x in (q, k, v)]
    out, k_BHKS, v_BHSK = jax.jit(cached_attention, static_argnames="start")(
        *new,
        cache[0].transpose(0, 2, 3, 1),
        cache[1].transpose(0, 2, 1, 3),
        jnp.asarray(held),
        scale=8**-0.5,
        start=held[0] if known else None,
    )
    positions = np.asarray(held)[:, None] + np.arange(T)
    np.testing.assert_allclose(out, reference(new[0], k, v, positions), atol=2e-6)
    for b, n in enumerate(held):
        end = n + T
        np.testing.assert_array_equal(
            k_BHKS[b, :, :, :end].transpose(2, 0, 1), k[b, :end]
        )
        np.testing.assert_array_equal(v_BHSK[b, :, :end].swapaxes(0, 1), v[b, :end])
        np.testing.assert_array_equal(
            v_BHSK[b, :, end:].swapaxes(0, 1), cache[1, b, end:]
        )
