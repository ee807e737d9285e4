"""The KV cache of a decoder: an argument and a result, never hidden state."""

import flax.struct
import jax
import jax.numpy as jnp

from gpt2_jax.config import GPT2Config


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, one pair of arrays a layer.

    Row b holds positions 0 .. length_B[b] - 1. What lies beyond is never
    attended to: a query at position p sees keys 0 .. p, and each is written
    before it is seen. A ragged batch is therefore padded on the right, and the
    padding changes nothing.
    """

    k_BSHK: tuple[jax.Array, ...]
    v_BSHK: tuple[jax.Array, ...]
    length_B: jax.Array  # int32, tokens held by each row

    @classmethod
    def empty(
        cls, cfg: GPT2Config, batch: int, size: int, dtype: jnp.dtype
    ) -> "KVCache":
        """A cache for `batch` rows of at most `size` tokens (size <= n_positions)."""
        if size > cfg.n_positions:
            raise ValueError(f"cache size={size} exceeds n_positions={cfg.n_positions}")
        shape = (batch, size, cfg.n_head, cfg.head_dim)
        zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(cfg.n_layer))  # noqa: E731
        return cls(zeros(), zeros(), jnp.zeros((batch,), jnp.int32))

    @property
    def size(self) -> int:
        """Tokens that a row can hold."""
        return self.k_BSHK[0].shape[1]

    def append(
        self, layer: int, k_BTHK: jax.Array, v_BTHK: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, H, K] of `layer` with T new tokens a row written."""
        return (
            _write(self.k_BSHK[layer], k_BTHK, self.length_B),
            _write(self.v_BSHK[layer], v_BTHK, self.length_B),
        )


def _write(cache_BSHK: jax.Array, new_BTHK: jax.Array, at_B: jax.Array) -> jax.Array:
    def write_row(row_SHK, new_THK, at):
        return jax.lax.dynamic_update_slice(row_SHK, new_THK, (at, 0, 0))

    return jax.vmap(write_row)(cache_BSHK, new_BTHK.astype(cache_BSHK.dtype), at_B)
