import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_jax.cache import KVCache
from gpt2_jax.config import GPT2Config
from gpt2_jax.runtime.sharding import BATCH, make_mesh, row_shardings

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


@pytest.mark.parametrize(
    ("tensor", "batch", "rows", "heads"),
    [(2, 4, BATCH, "tensor"), (4, 4, BATCH, None), (2, 3, None, "tensor")],
)
def test_rows_and_heads_are_sharded_where_they_divide(tensor, batch, rows, heads):
    mesh = make_mesh(data=-1, fsdp=1, tensor=tensor)
    cache = KVCache.empty(CFG, batch, size=5, dtype=jnp.float32)
    shardings = row_shardings({"cache": cache, "scalar": 0}, mesh)
    for sharding in (*shardings["cache"].k_BHKS, *shardings["cache"].v_BHSK):
        assert sharding.spec == P(rows, heads)
    assert shardings["cache"].length_B.spec == P(rows)
    assert shardings["scalar"].spec == P()
    assert jax.tree.structure(shardings["cache"]) == jax.tree.structure(cache)
