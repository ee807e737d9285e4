"""Causal attention: over a sequence, and over a cache."""

import jax
import jax.numpy as jnp
import numpy as np

UNSEEN = np.finfo(np.float32).min  # finite: a row that sees nothing is not NaN


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
    s_BHTS = jnp.where(seen_BTS[:, None], s_BHTS * scale, UNSEEN)
    p_BHTS = jax.nn.softmax(s_BHTS, axis=-1)
    if dropout_key is not None and dropout_rate > 0:
        keep_BHTS = jax.random.bernoulli(dropout_key, 1 - dropout_rate, p_BHTS.shape)
        p_BHTS = jnp.where(keep_BHTS, p_BHTS / (1 - dropout_rate), 0.0)
    return jnp.einsum("BHTS,BSHK->BTHK", p_BHTS.astype(v_BSHK.dtype), v_BSHK)


def cache_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Of the cache of a model that computes in `dtype`.

    On a CPU float32, which XLA multiplies by one row twice as fast as bfloat16.
    """
    return jnp.float32 if jax.default_backend() == "cpu" else dtype


def cached_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    k_BHKS: jax.Array,
    v_BHSK: jax.Array,
    length_B: jax.Array,
    *,
    scale: jax.Array | float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of T new tokens a row to those in the cache and to each other.

    Args:
      q_BTHK, k_BTHK, v_BTHK: of the new tokens, at positions length_B and on.
      k_BHKS, v_BHSK: the cache. Keys lie along the last axis, so that the scores of
        one query are sums of rows.

    Returns:
      As `causal_attention` [B, T, H, K], and the cache with the new tokens written.
    """
    if q_BTHK.shape[1] == 1 and jax.default_backend() == "cpu":
        att_BTHK = _attend_beside(
            q_BTHK, k_BTHK, v_BTHK, k_BHKS, v_BHSK, length_B, scale
        )
        # XLA:CPU copies a cache that is written before it is read, and may do so
        # where nothing orders the two: here the place waits for the result.
        at_B = length_B + (att_BTHK[:, 0, 0, 0] * 0).astype(length_B.dtype)
        return att_BTHK, *_write(k_BTHK, v_BTHK, k_BHKS, v_BHSK, at_B)
    k_BHKS, v_BHSK = _write(k_BTHK, v_BTHK, k_BHKS, v_BHSK, length_B)
    if jax.default_backend() == "cpu":
        k_BHKS, v_BHSK = jax.lax.optimization_barrier((k_BHKS, v_BHSK))
    s_BHTS = scale * _scores(q_BTHK, k_BHKS)
    position_BT = length_B[:, None] + jnp.arange(q_BTHK.shape[1])
    seen_BTS = jnp.arange(k_BHKS.shape[3]) <= position_BT[:, :, None]
    p_BHTS = jax.nn.softmax(jnp.where(seen_BTS[:, None], s_BHTS, UNSEEN), axis=-1)
    att_BTHK = jnp.einsum("BHTS,BHSK->BTHK", p_BHTS.astype(v_BHSK.dtype), v_BHSK)
    return att_BTHK.astype(v_BTHK.dtype), k_BHKS, v_BHSK


def _attend_beside(q_BTHK, k_BTHK, v_BTHK, k_BHKS, v_BHSK, length_B, scale):
    """Attention of one token a row to the cache as it is, and to itself."""
    s_BHTS = scale * _scores(q_BTHK, k_BHKS)
    seen_BS = jnp.arange(k_BHKS.shape[3]) < length_B[:, None]
    s_BHTS = jnp.where(seen_BS[:, None, None], s_BHTS, UNSEEN)
    own_BHT1 = scale * _scores(q_BTHK, k_BTHK.transpose(0, 2, 3, 1))
    p_BHTS = jax.nn.softmax(jnp.concatenate([s_BHTS, own_BHT1], axis=-1), axis=-1)
    p_BHTS = p_BHTS.astype(v_BHSK.dtype)
    att_BTHK = jnp.einsum("BHTS,BHSK->BTHK", p_BHTS[..., :-1], v_BHSK)
    att_BTHK += p_BHTS[..., -1:].transpose(0, 2, 1, 3) * v_BTHK
    return att_BTHK.astype(v_BTHK.dtype)


def _scores(q_BTHK: jax.Array, k_BHKS: jax.Array) -> jax.Array:
    return jnp.einsum(
        "BTHK,BHKS->BHTS", q_BTHK, k_BHKS, preferred_element_type=jnp.float32
    )


def _write(k_BTHK, v_BTHK, k_BHKS, v_BHSK, at_B):
    """The cache with T tokens a row written from position `at_B` on."""

    def write(k_HKS, v_HSK, k_THK, v_THK, at):
        k_HKT = k_THK.transpose(1, 2, 0).astype(k_HKS.dtype)
        v_HTK = v_THK.transpose(1, 0, 2).astype(v_HSK.dtype)
        return (
            jax.lax.dynamic_update_slice(k_HKS, k_HKT, (0, 0, at)),
            jax.lax.dynamic_update_slice(v_HSK, v_HTK, (0, at, 0)),
        )

    return jax.vmap(write)(k_BHKS, v_BHSK, k_BTHK, v_BTHK, at_B)
