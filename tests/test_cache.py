import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.cache import KVCache
from gpt2_jax.config import GPT2Config

CFG = GPT2Config(n_embd=8, n_head=2, n_layer=2, n_positions=16)


def test_rows_are_written_where_each_of_them_ends():
    cache = KVCache.empty(CFG, batch=2, size=6, dtype=jnp.float32)
    cache = cache.replace(length_B=jnp.array([1, 3]))
    new = jnp.ones((2, 2, 2, 4))
    k, v = cache.append(1, new, 2 * new)
    expected = np.zeros((2, 6, 2, 4))
    expected[0, 1:3] = expected[1, 3:5] = 1
    np.testing.assert_array_equal(k, expected)
    np.testing.assert_array_equal(v, 2 * expected)


def test_shapes_and_dtype():
    cache = KVCache.empty(CFG, batch=3, size=5, dtype=jnp.bfloat16)
    assert cache.size == 5
    assert len(cache.k_BSHK) == len(cache.v_BSHK) == 2
    assert cache.k_BSHK[0].shape == (3, 5, 2, 4)
    assert cache.v_BSHK[1].dtype == jnp.bfloat16


def test_a_cache_over_the_context_is_refused():
    with pytest.raises(ValueError, match="cache size=17 exceeds n_positions=16"):
        KVCache.empty(CFG, batch=1, size=17, dtype=jnp.float32)
