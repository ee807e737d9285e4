import jax.numpy as jnp
import pytest

from gpt2_jax.cache import KVCache
from gpt2_jax.config import GPT2Config

CFG = GPT2Config(n_embd=8, n_head=2, n_layer=2, n_positions=16)


def test_shapes_and_dtype():
    cache = KVCache.empty(CFG, batch=3, size=5, dtype=jnp.bfloat16)
    assert cache.size == 5
    assert len(cache.k_BSHK) == len(cache.v_BSHK) == 2
    assert cache.k_BSHK[0].shape == (3, 5, 2, 4)
    assert cache.v_BSHK[1].dtype == jnp.bfloat16


def test_a_cache_over_the_context_is_refused():
    with pytest.raises(ValueError, match="cache size=17 exceeds n_positions=16"):
        KVCache.empty(CFG, batch=1, size=17, dtype=jnp.float32)
