import jax.numpy as jnp
import numpy as np

from gpt2_jax.cache import KVCache
from gpt2_jax.config import GPT2Config

CFG = GPT2Config(n_embd=8, n_head=2, n_layer=2, n_positions=16)


def test_shapes_and_dtype():
    cache = KVCache.empty(CFG, batch=3, size=5, dtype=jnp.bfloat16)
    assert cache.size == 5
    assert len(cache.k_BHKS) == len(cache.v_BHSK) == 2
    assert cache.k_BHKS[0].shape == (3, 2, 4, 5)
    assert cache.v_BHSK[0].shape == (3, 2, 5, 4)
    assert cache.v_BHSK[1].dtype == jnp.bfloat16


def test_a_larger_cache_holds_the_same():
    cache = KVCache.empty(CFG, batch=3, size=5, dtype=jnp.float32)
    ones = tuple(x + 1 for x in cache.k_BHKS)
    cache = cache.replace(k_BHKS=ones, length_B=jnp.array([1, 5, 2]))
    larger = cache.resize(8)
    assert larger.size == 8
    np.testing.assert_array_equal(larger.k_BHKS[1][..., :5], ones[1])
    np.testing.assert_array_equal(larger.length_B, [1, 5, 2])
