"""The KV cache of a decoder: an argument and a result, never hidden state."""

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from gpt2_jax.config import GPT2Config
from gpt2_jax.runtime.sharding import row_sharding

KV = tuple[jax.Array, jax.Array]  # of one layer


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of the tokens seen so far, one pair of arrays a layer.

    Row b holds positions 0 .. length_B[b] - 1. What lies beyond is never
    attended to: a query at position p sees keys 0 .. p, and each is written
    before it is seen. A ragged batch is therefore padded on the right, and the
    padding changes nothing.
    """

    k_BHKS: tuple[jax.Array, ...]
    v_BHSK: tuple[jax.Array, ...]
    length_B: jax.Array  # int32, tokens held by each row
    # What all of length_B are, where that is known when a program is compiled.
    start: int | None = flax.struct.field(pytree_node=False, default=None)

    @classmethod
    def empty(
        cls, cfg: GPT2Config, batch: int, size: int, dtype: jnp.dtype
    ) -> "KVCache":
        """A cache for `batch` rows of at most `size` tokens.

        It may be larger than n_positions, but what is beyond must not be attended to.
        """
        k_shape = (batch, cfg.n_head, cfg.head_dim, size)
        v_shape = (batch, cfg.n_head, size, cfg.head_dim)
        return cls(
            tuple(jnp.zeros(k_shape, dtype) for _ in range(cfg.n_layer)),
            tuple(jnp.zeros(v_shape, dtype) for _ in range(cfg.n_layer)),
            jnp.zeros((batch,), jnp.int32),
        )

    @property
    def size(self) -> int:
        """Tokens that a row can hold."""
        return self.k_BHKS[0].shape[3]

    def of_layer(self, i: int) -> "KVCache":
        """The cache of that layer alone."""
        return self.replace(k_BHKS=(self.k_BHKS[i],), v_BHSK=(self.v_BHSK[i],))

    def row_shardings(self, mesh: Mesh) -> "KVCache":
        """The sharding of each array: rows over the batch axes, heads over tensor."""

        def with_heads(arrays: tuple[jax.Array, ...]) -> tuple[NamedSharding, ...]:
            return tuple(row_sharding(x.shape, mesh, has_heads=True) for x in arrays)

        return self.replace(
            k_BHKS=with_heads(self.k_BHKS),
            v_BHSK=with_heads(self.v_BHSK),
            length_B=row_sharding(self.length_B.shape, mesh),
        )

    def resize(self, size: int) -> "KVCache":
        """With room for `size` tokens a row, at least as many as now."""
        none, more = (0, 0), (0, size - self.size)
        return self.replace(
            k_BHKS=tuple(jnp.pad(x, (none, none, none, more)) for x in self.k_BHKS),
            v_BHSK=tuple(jnp.pad(x, (none, none, more, none)) for x in self.v_BHSK),
        )
