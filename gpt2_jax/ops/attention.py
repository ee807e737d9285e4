"""Causal attention: over a sequence, and over a cache."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gpt2_jax.checks import check_choice, shown
from gpt2_jax.runtime.platform import compute_capability, on_cpu
from gpt2_jax.runtime.sharding import BATCH, n_batch_shards

UNSEEN = np.finfo(np.float32).min  # finite: a row that sees nothing is not NaN

BACKENDS = ("auto", "xla", "cudnn", "pallas")
STAND_IN = "stand-in"  # of a kernel, where a program is compiled and never run


class Platform(NamedTuple):
    """Devices, which need not be here."""

    platform: str  # as `jax.default_backend()` gives it
    capability: float | None  # of NVIDIA GPUs


def check_attention(name: str) -> None:
    """Raises ValueError on what is not one of BACKENDS."""
    check_choice("attention", name, BACKENDS)


def attention_backend(
    asked: str,
    shape_BTHK: tuple[int, ...],
    dtype: jnp.dtype,
    *,
    dropout: bool,
    mesh: Mesh | None,
    place: Platform | None = None,
) -> str:
    """What computes `causal_attention` of such queries: xla, cudnn or pallas.

    Args:
      asked: one of BACKENDS; auto: a kernel that holds no scores, where one can run.
      dropout: whether probabilities are dropped.
      place: where they are computed; None: here.

    Raises:
      ValueError: on an unknown name, and when what is asked for cannot run, why.
    """
    check_attention(asked)
    B, T, H, K = shape_BTHK
    place = place or Platform(jax.default_backend(), compute_capability())
    for name, obstacle in (
        ("cudnn", _obstacle_to_cudnn(place, K, jnp.dtype(dtype).name)),
        ("pallas", _obstacle_to_pallas(place, B, T, H, mesh)),
    ):
        if dropout:
            obstacle = "it has no dropout of probabilities (attn_pdrop)"
        if asked in ("auto", name) and obstacle is None:
            return name
        if asked == name:
            raise ValueError(f"attention {shown(name)} cannot run: {obstacle}")
    return "xla"


def _obstacle_to_cudnn(place: Platform, K: int, dtype: str) -> str | None:
    """Source: cuDNN's support matrix, as `jax.nn.dot_product_attention` checks it."""
    capability = place.capability
    if capability is None:
        return f"it needs an NVIDIA GPU, this is a {place.platform}"
    if capability < 8:
        return f"it needs compute capability 8.0 or more, this GPU has {capability}"
    if dtype not in ("bfloat16", "float16"):
        return f"it needs bfloat16 or float16, not {dtype}"
    most = 256 if capability >= 9 else 128
    if K % 8 or K > most:
        return f"head_dim={K} is not a multiple of 8 up to {most}"
    return None


LANES = 128  # of a TPU's vector unit


def _obstacle_to_pallas(
    place: Platform, B: int, T: int, H: int, mesh: Mesh | None
) -> str | None:
    if place.platform != "tpu":
        return f"it needs a TPU, this is a {place.platform}"
    if T % LANES:
        return f"{T=} is not a multiple of {LANES}"
    if mesh is None:
        n = jax.device_count()
        return None if n == 1 else f"it needs the mesh of the {n} devices"
    for size, what, parts in [
        (B, "rows", n_batch_shards(mesh)),
        (H, "heads", mesh.shape["tensor"]),
    ]:
        if size % parts:
            return f"{size} {what} do not divide by the {parts} devices they lie on"
    return None


def causal_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    *,
    scale: jax.Array | float,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    attention: str = "auto",
    mesh: Mesh | None = None,
    segment_BT: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k^T) v, each token seeing itself and those before it.

    Args:
      q_BTHK, k_BTHK, v_BTHK: of whole sequences.
      scale: of the scores; GPT-2's is 1 / sqrt(K).
      dropout_rate: on the probabilities, when a `dropout_key` is given.
      attention: one of BACKENDS, see `attention_backend`; or STAND_IN.
      mesh: over which rows and heads are spread, which pallas needs to know.
      segment_BT: int32; a token sees those of its own segment only. None: all. Of
        [B, T, 2] the second is another segment that it sees as well.

    Returns:
      [B, T, H, K] in the dtype of v. Scores and softmax are in float32.

    Raises:
      ValueError: when `attention` cannot run here.
    """
    if attention == STAND_IN:
        return _stand_in(q_BTHK, k_BTHK, v_BTHK, scale, segment_BT)
    dropout = dropout_key is not None and dropout_rate > 0
    backend = attention_backend(
        attention, q_BTHK.shape, q_BTHK.dtype, dropout=dropout, mesh=mesh
    )
    if backend == "pallas" and segment_BT is not None and segment_BT.ndim == 3:
        backend = "xla"  # the kernel knows of one segment a token
    if backend == "xla":
        if on_cpu() and not dropout and q_BTHK.shape[1] > QUERIES:
            k_BHKT, v_BHTK = _like_cache(k_BTHK, v_BTHK, v_BTHK.dtype)
            return _attend_by_blocks(q_BTHK, k_BHKT, v_BHTK, 0, scale, segment_BT)
        return _by_xla(
            *(q_BTHK, k_BTHK, v_BTHK, scale, dropout_rate, dropout_key, segment_BT)
        )
    if not isinstance(scale, float):  # kernels have it as a constant
        q_BTHK, scale = (q_BTHK * scale).astype(q_BTHK.dtype), 1.0
    if backend == "cudnn":
        return jax.nn.dot_product_attention(
            *(q_BTHK, k_BTHK, v_BTHK),
            mask=None if segment_BT is None else _same_segment(segment_BT),
            scale=scale,
            is_causal=True,
            implementation="cudnn",
        )
    return _by_pallas(q_BTHK, k_BTHK, v_BTHK, scale, mesh, segment_BT)


def _same_segment(
    segment_BT: jax.Array, at: slice = slice(None), end: int | None = None
) -> jax.Array:
    """Bool [B, 1, t, s]: what the tokens `at` see of those up to `end`."""
    if segment_BT.ndim == 2:
        segment_BT = segment_BT[..., None]
    own_BS = segment_BT[:, :end, 0]
    return (segment_BT[:, at, None] == own_BS[:, None, :, None]).any(-1)[:, None]


def causal_weights(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    *,
    scale: jax.Array | float,
    segment_BT: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k^T) of `causal_attention`: float32 [B, H, T, T]."""
    s_BHTS = jnp.einsum(
        "BTHK,BSHK->BHTS", q_BTHK, k_BTHK, preferred_element_type=jnp.float32
    )
    position_T = jnp.arange(q_BTHK.shape[1])
    seen = position_T <= position_T[:, None]
    if segment_BT is not None:
        seen &= _same_segment(segment_BT)
    s_BHTS = jnp.where(seen, s_BHTS * scale, UNSEEN)
    return jax.nn.softmax(s_BHTS, axis=-1)


def _by_xla(q_BTHK, k_BTHK, v_BTHK, scale, dropout_rate, dropout_key, segment_BT=None):
    p_BHTS = causal_weights(q_BTHK, k_BTHK, scale=scale, segment_BT=segment_BT)
    if dropout_key is not None and dropout_rate > 0:
        keep_BHTS = jax.random.bernoulli(dropout_key, 1 - dropout_rate, p_BHTS.shape)
        p_BHTS = jnp.where(keep_BHTS, p_BHTS / (1 - dropout_rate), 0.0)
    return jnp.einsum("BHTS,BSHK->BTHK", p_BHTS.astype(v_BTHK.dtype), v_BTHK)


def _by_pallas(
    q_BTHK, k_BTHK, v_BTHK, scale, mesh, segment_BT=None, *, interpret=False
):
    """By the splash kernel for TPUs, on each device for its own rows and heads."""
    # Here, for importing it takes time, and it is of use on TPUs alone.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T = q_BTHK.shape[1]
    size = next(n * LANES for n in (4, 2, 1) if T % (n * LANES) == 0)
    blocks = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=size,
        block_kv_dq=size,
    )

    def attend(q_BTHK, k_BTHK, v_BTHK, segment_BT):
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([splash.CausalMask((T, T))] * q_BTHK.shape[2]),
            block_sizes=blocks,
            interpret=interpret,
        )
        q_BHTK, k_BHTK, v_BHTK = (
            x.transpose(0, 2, 1, 3) for x in (q_BTHK * scale, k_BTHK, v_BTHK)
        )
        ids = segment_BT if segment_BT is None else splash.SegmentIds(*[segment_BT] * 2)
        return jax.vmap(kernel)(q_BHTK, k_BHTK, v_BHTK, ids).transpose(0, 2, 1, 3)

    if mesh is not None:
        rows = P(BATCH, None, "tensor", None)
        attend = jax.shard_map(
            attend,
            mesh=mesh,
            in_specs=(rows, rows, rows, P(BATCH)),
            out_specs=rows,
            check_vma=False,
        )
    return attend(q_BTHK, k_BTHK, v_BTHK, segment_BT)


def _stand_in(q_BTHK, k_BTHK, v_BTHK, scale, segment_BT):
    """In the memory of a kernel: a few queries at a time, again for the gradient.

    As `causal_attention`, with segments [B, T] or none. Keys and values are transposed
    within the loop, so that none of it is kept for the gradient but the arguments.
    """
    T = q_BTHK.shape[1]
    size = math.gcd(T, 32)

    @jax.checkpoint
    def attend(at):
        q_BtHK = jax.lax.dynamic_slice_in_dim(q_BTHK, at, size, axis=1)
        k_BHKT, v_BHTK = _like_cache(k_BTHK, v_BTHK, v_BTHK.dtype)
        seen = jnp.arange(T) <= at + jnp.arange(size)[:, None]
        if segment_BT is not None:
            own_Bt = jax.lax.dynamic_slice_in_dim(segment_BT, at, size, axis=1)
            seen &= (own_Bt[:, :, None] == segment_BT[:, None])[:, None]
        return _attend(q_BtHK.transpose(0, 2, 1, 3), k_BHKT, v_BHTK, seen, scale)

    att_nBHtK = jax.lax.map(attend, jnp.arange(0, T, size))
    return att_nBHtK.transpose(1, 0, 3, 2, 4).reshape(q_BTHK.shape)


def cache_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of the cache of a model that computes in `dtype`.

    On a CPU it is float32, which XLA multiplies by one row twice as fast as bfloat16.
    """
    return jnp.float32 if on_cpu() else dtype


def cached_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    k_BHKS: jax.Array,
    v_BHSK: jax.Array,
    length_B: jax.Array,
    *,
    scale: jax.Array | float,
    start: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of T new tokens a row to those in the cache and to each other.

    Args:
      q_BTHK, k_BTHK, v_BTHK: of the new tokens, at positions length_B and on.
      k_BHKS, v_BHSK: the cache. Keys lie along the last axis, so that the scores of
        one query are sums of rows.
      start: what every one of length_B is, where that is known: nothing beyond the
        new tokens is read then.

    Returns:
      As `causal_attention` [B, T, H, K], and the cache with the new tokens written.
    """
    T = q_BTHK.shape[1]
    if start is not None:
        k_BHKT, v_BHTK = _like_cache(k_BTHK, v_BTHK, k_BHKS.dtype)
        k_seen = jnp.concatenate([k_BHKS[..., :start], k_BHKT], axis=3)
        v_seen = jnp.concatenate([v_BHSK[:, :, :start], v_BHTK], axis=2)
        att_BTHK = _attend_by_blocks(q_BTHK, k_seen, v_seen, start, scale)
        return att_BTHK, *_write(k_BTHK, v_BTHK, k_BHKS, v_BHSK, start)
    if T == 1 and on_cpu():
        att_BTHK = _attend_beside(
            q_BTHK, k_BTHK, v_BTHK, k_BHKS, v_BHSK, length_B, scale
        )
        # XLA:CPU copies a cache that is written before it is read, and may do so
        # where nothing orders the two: here the place waits for the result.
        at_B = length_B + (att_BTHK[:, 0, 0, 0] * 0).astype(length_B.dtype)
        write = jax.vmap(_write_row)
        return att_BTHK, *write(k_BTHK, v_BTHK, k_BHKS, v_BHSK, at_B)
    k_BHKS, v_BHSK = jax.vmap(_write_row)(k_BTHK, v_BTHK, k_BHKS, v_BHSK, length_B)
    if on_cpu():
        k_BHKS, v_BHSK = jax.lax.optimization_barrier((k_BHKS, v_BHSK))
    positions_BT = length_B[:, None] + jnp.arange(T)
    seen_BTS = jnp.arange(k_BHKS.shape[3]) <= positions_BT[:, :, None]
    q_BHTK = q_BTHK.transpose(0, 2, 1, 3)
    att_BHTK = _attend(q_BHTK, k_BHKS, v_BHSK, seen_BTS[:, None], scale)
    return att_BHTK.transpose(0, 2, 1, 3), k_BHKS, v_BHSK


@jax.custom_vjp
def _attend(q_BHTK, k_BHKS, v_BHSK, seen, scale):
    """Attention [B, H, T, K] of queries to the keys that they see: bool [..., T, S].

    The gradient is the usual one, without products that would transpose [T, S]: XLA
    on CPU does that element by element. Source of its row sums: FlashAttention,
    https://arxiv.org/abs/2205.14135, appendix B.2.
    """
    return _attend_forward(q_BHTK, k_BHKS, v_BHSK, seen, scale)[0]


def _attend_forward(q_BHTK, k_BHKS, v_BHSK, seen, scale):
    s_BHTS = scale * _product(q_BHTK, k_BHKS)
    p_BHTS = jax.nn.softmax(jnp.where(seen, s_BHTS, UNSEEN), axis=-1)
    p_BHTS = p_BHTS.astype(v_BHSK.dtype)
    att_BHTK = _product(p_BHTS, v_BHSK).astype(q_BHTK.dtype)
    return att_BHTK, (q_BHTK, k_BHKS, v_BHSK, scale, p_BHTS, att_BHTK)


def _attend_backward(residuals, d_BHTK):
    q_BHTK, k_BHKS, v_BHSK, scale, p_BHTS, att_BHTK = residuals
    dv_BHKS = _product(d_BHTK.mT, p_BHTS)
    sum_BHT1 = (d_BHTK.astype(jnp.float32) * att_BHTK).sum(-1, keepdims=True)
    ds_BHTS = p_BHTS * ((_product(d_BHTK, v_BHSK.mT) - sum_BHT1) * scale)
    ds_BHTS = ds_BHTS.astype(q_BHTK.dtype)
    dq_BHTK = _product(ds_BHTS, k_BHKS.mT).astype(q_BHTK.dtype)
    dk_BHKS = _product(q_BHTK.mT, ds_BHTS).astype(k_BHKS.dtype)
    return dq_BHTK, dk_BHKS, dv_BHKS.mT.astype(v_BHSK.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)


QUERIES = 128  # that attend together, on a CPU


def _attend_by_blocks(q_BTHK, k_BHKS, v_BHSK, start, scale, segment_BT=None):
    """Causal, from position `start` on, each block to the keys that it sees."""
    q_BHTK = q_BTHK.transpose(0, 2, 1, 3)
    T = q_BHTK.shape[2]
    size = QUERIES if on_cpu() else T
    blocks = []
    for at in range(0, T, size):
        end = min(at + size, T)
        seen = jnp.arange(start + end) <= start + jnp.arange(at, end)[:, None]
        if segment_BT is not None:
            seen &= _same_segment(segment_BT, slice(at, end), end)
        held = k_BHKS[..., : start + end], v_BHSK[:, :, : start + end]
        blocks.append(_attend(q_BHTK[:, :, at:end], *held, seen, scale))
    return jnp.concatenate(blocks, axis=2).transpose(0, 2, 1, 3)


def _attend_beside(q_BTHK, k_BTHK, v_BTHK, k_BHKS, v_BHSK, length_B, scale):
    """Attention of one token a row to the cache as it is, and to itself."""
    q_BHTK = q_BTHK.transpose(0, 2, 1, 3)
    k_BHKT, v_BHTK = _like_cache(k_BTHK, v_BTHK, k_BHKS.dtype)
    seen_BS = jnp.arange(k_BHKS.shape[3]) < length_B[:, None]
    s_BHTS = scale * _product(q_BHTK, k_BHKS)
    s_BHTS = jnp.where(seen_BS[:, None, None], s_BHTS, UNSEEN)
    own_BHT1 = scale * _product(q_BHTK, k_BHKT)
    p_BHTS = jax.nn.softmax(jnp.concatenate([s_BHTS, own_BHT1], axis=-1), axis=-1)
    p_BHTS = p_BHTS.astype(v_BHSK.dtype)
    att_BHTK = _product(p_BHTS[..., :-1], v_BHSK) + p_BHTS[..., -1:] * v_BHTK
    return att_BHTK.transpose(0, 2, 1, 3).astype(v_BTHK.dtype)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of matrices, in float32."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def _write(k_BTHK, v_BTHK, k_BHKS, v_BHSK, at):
    """The cache with T tokens a row written from position `at` on, the same in all."""
    k_BHKT, v_BHTK = _like_cache(k_BTHK, v_BTHK, k_BHKS.dtype)
    return (
        jax.lax.dynamic_update_slice(k_BHKS, k_BHKT, (0, 0, 0, at)),
        jax.lax.dynamic_update_slice(v_BHSK, v_BHTK, (0, 0, at, 0)),
    )


def _like_cache(k_BTHK, v_BTHK, dtype):
    """[B, H, K, T] and [B, H, T, K]."""
    k_BHKT, v_BHTK = k_BTHK.transpose(0, 2, 3, 1), v_BTHK.transpose(0, 2, 1, 3)
    return k_BHKT.astype(dtype), v_BHTK.astype(dtype)


def _write_row(k_THK, v_THK, k_HKS, v_HSK, at):
    """As `_write`, of one row."""
    cache = _write(k_THK[None], v_THK[None], k_HKS[None], v_HSK[None], at)
    return jax.tree.map(lambda x: x[0], cache)
