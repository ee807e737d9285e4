"""Causal attention: over a sequence, and over a cache."""

import jax
import jax.numpy as jnp


def causal_attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    positions_BT: jax.Array,
    *,
    scale: jax.Array | float,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v, a query at position p seeing keys 0 .. p.

    Args:
      q_BTHK: queries of T tokens.
      k_BSHK, v_BSHK: keys and values; key s is the token at position s.
      positions_BT: int32 position of each query ([1, T] serves all rows).
      scale: of the scores; GPT-2's is 1 / sqrt(K).
      dropout_rate: on the probabilities, when a `dropout_key` is given.

    Returns:
      [B, T, H, K] in the dtype of v. Scores and softmax are in float32. The mask
      is finite, and every query sees at least key 0, so no row is ever NaN.
    """
    s_BHTS = jnp.einsum(
        "BTHK,BSHK->BHTS", q_BTHK, k_BSHK, preferred_element_type=jnp.float32
    )
    seen_BTS = jnp.arange(k_BSHK.shape[1]) <= positions_BT[:, :, None]
    s_BHTS = jnp.where(seen_BTS[:, None], s_BHTS * scale, jnp.finfo(jnp.float32).min)
    p_BHTS = jax.nn.softmax(s_BHTS, axis=-1)
    if dropout_key is not None and dropout_rate > 0:
        keep_BHTS = jax.random.bernoulli(dropout_key, 1 - dropout_rate, p_BHTS.shape)
        p_BHTS = jnp.where(keep_BHTS, p_BHTS / (1 - dropout_rate), 0.0)
    return jnp.einsum("BHTS,BSHK->BTHK", p_BHTS.astype(v_BSHK.dtype), v_BSHK)


def cached_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    k_BHSK: jax.Array,
    v_BHSK: jax.Array,
    length_B: jax.Array,
    *,
    scale: jax.Array | float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of T new tokens a row to those in the cache and to each other.

    Args:
      q_BTHK, k_BTHK, v_BTHK: of the new tokens, at positions length_B and on.
      k_BHSK, v_BHSK: the cache.

    Returns:
      As `causal_attention` [B, T, H, K], and the cache with the new tokens written.
    """

    def write(row_HSK, new_THK, at):
        new_HTK = new_THK.transpose(1, 0, 2).astype(row_HSK.dtype)
        return jax.lax.dynamic_update_slice(row_HSK, new_HTK, (0, at, 0))

    k_BHSK = jax.vmap(write)(k_BHSK, k_BTHK, length_B)
    v_BHSK = jax.vmap(write)(v_BHSK, v_BTHK, length_B)
    if jax.default_backend() == "cpu":
        k_BHSK, v_BHSK = jax.lax.optimization_barrier((k_BHSK, v_BHSK))
    s_BHTS = jnp.einsum(
        "BTHK,BHSK->BHTS", q_BTHK, k_BHSK, preferred_element_type=jnp.float32
    )
    position_BT = length_B[:, None] + jnp.arange(q_BTHK.shape[1])
    seen_BTS = jnp.arange(k_BHSK.shape[2]) <= position_BT[:, :, None]
    s_BHTS = jnp.where(seen_BTS[:, None], s_BHTS * scale, jnp.finfo(jnp.float32).min)
    p_BHTS = jax.nn.softmax(s_BHTS, axis=-1)
    att_BTHK = jnp.einsum("BHTS,BHSK->BTHK", p_BHTS.astype(v_BHSK.dtype), v_BHSK)
    return att_BTHK, k_BHSK, v_BHSK
