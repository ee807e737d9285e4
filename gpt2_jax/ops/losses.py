"""Cross-entropy that never holds the logits of a whole batch.

The vocabulary is the widest axis of a GPT-2 by far: logits [B, T, V] in float32 may
take more memory than all else in a training step. Where there is a gradient, they are
made for a chunk of the tokens of each row at a time, and so is their gradient, in the
same pass; else for all tokens, and a part of the vocabulary at a time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gpt2_jax.ops.linear import project_rows
from gpt2_jax.runtime.platform import compute_capability, on_cpu, on_gpu
from gpt2_jax.runtime.sharding import BATCH, n_batch_shards


def chunk_bytes() -> int:
    """Bytes of float32 logits that a device holds at a time.

    Each chunk adds to the gradient of the whole embedding: on an accelerator its
    products take longer than that if it is of some thousand tokens.
    """
    return 2**27 if on_cpu() else 2**30


def chunk_tokens(B: int, T: int, V: int) -> int:
    """Tokens of a row that are gone through at a time: all T, or a power of 2."""
    return _all_or_power_of_two(T, chunk_bytes() // (4 * B * V))


LEAST = np.finfo(np.float32).min  # finite, so that x - x is 0 and not NaN
MIN_PART = 512  # of the vocabulary: products by fewer rows are slower


def part_of_vocabulary(M: int, V: int) -> int:
    """Rows of the embedding that M tokens are multiplied by at a time: all, or a power
    of 2.

    On a CPU so few that logits stay in its caches from product to sum.
    """
    n_bytes = 2**22 if jax.default_backend() == "cpu" else chunk_bytes()
    return _all_or_power_of_two(V, max(MIN_PART, n_bytes // (4 * M)))


def _all_or_power_of_two(n: int, most: int) -> int:
    return n if n <= most else 2 ** (max(1, most).bit_length() - 1)


def summed_cross_entropy(
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array | None = None,
    *,
    scale_V: jax.Array | None = None,
    n_valid: int | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Sum of -log softmax(hidden embedding^T)[target] in nats, float32.

    Factors of products are in the dtype of `hidden_BTD`, sums and softmax in float32.
    Where it is differentiated, the gradients are computed together with the value, so
    that no logits are computed twice; else they are not.

    Args:
      mask_BT: bool, which targets count; None: all.
      scale_V: float32; of the rows of an int8 embedding, which has no gradient.
      n_valid: the rows of the embedding from here on are padding: no token, no part
        of the softmax, a gradient of zero. None: no row is.
      mesh: over which the batch and the vocabulary are spread. Each part of the batch
        sums up its own gradient of the embedding, and these are summed up once. None:
        one device, or left to XLA, which sums them up in each chunk.

    Raises:
      ValueError: when `n_valid` is not in [1, V].
    """
    V = embedding_VD.shape[0]
    _check_n_valid(n_valid, V)
    return _loss(
        (hidden_BTD, embedding_VD),
        (scale_V, targets_BT, mask_BT),
        None if n_valid == V else n_valid,
        mesh,
    )


def _check_n_valid(n_valid: int | None, V: int) -> None:
    if n_valid is not None and not 1 <= n_valid <= V:
        raise ValueError(f"{n_valid=} must be in [1, {V}], the rows of the embedding")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _loss(variables, constants, n_valid, mesh):
    scale_V, targets_BT, mask_BT = constants
    logprob_BT, _ = token_log_probs(
        *(*variables, targets_BT), scale_V=scale_V, n_valid=n_valid, mesh=mesh
    )
    return -logprob_BT.sum(where=mask_BT)


def _forward(variables, constants, n_valid, mesh):
    scale_V, *of_targets = constants
    if scale_V is not None:
        raise ValueError("an int8 embedding has no gradient")
    loss, *gradients = _over_mesh(variables, of_targets, n_valid, mesh)
    return loss, tuple(gradients)


def _backward(n_valid, mesh, gradients, dloss):
    return tuple((dloss * x).astype(x.dtype) for x in gradients), None


_loss.defvjp(_forward, _backward)


def _over_mesh(variables, of_targets, n_valid, mesh):
    """Loss, and its gradients by hidden states and embedding."""
    each = partial(_over_chunks, n_valid=n_valid, kernel=_has_kernel(mesh))
    if mesh is None:
        return each(variables, of_targets, tensor=1)
    each = partial(each, tensor=mesh.shape["tensor"])
    if n_batch_shards(mesh) == 1:
        return each(variables, of_targets)

    def part(variables, of_targets):
        loss, dhidden_BTD, dembedding_VD = each(variables, of_targets)
        loss, dembedding_VD = jax.lax.psum((loss, dembedding_VD), BATCH)
        return loss, dhidden_BTD, dembedding_VD

    rows, whole = P(BATCH), P()
    # A tensor axis is left to XLA, which follows the rows of the embedding.
    spread = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=((rows, whole), rows),
        out_specs=(whole, rows, whole),
        axis_names={*BATCH, *(["tensor"] if mesh.shape["tensor"] == 1 else [])},
        check_vma=False,
    )
    # Only within jit can an axis be left.
    return jax.jit(spread)(variables, of_targets)


def _has_kernel(mesh: Mesh | None) -> bool:
    """Whether rows of logits are whole on GPUs that `gpt2_jax.ops.kernels` is for."""
    n = jax.device_count() if mesh is None else mesh.shape["tensor"]
    return n == 1 and on_gpu() and (compute_capability() or 0) >= 8


def _over_chunks(variables, of_targets, n_valid, kernel, tensor):
    """As `_over_mesh`, of one part of the batch."""
    hidden_BTD, embedding_VD = variables
    embedding_VD = embedding_VD.astype(hidden_BTD.dtype)
    B, T, _ = hidden_BTD.shape
    size = chunk_tokens(B, T, embedding_VD.shape[0] // tensor)

    def chunk(start, size):
        take = partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1
        )
        tokens = jax.tree.map(take, (hidden_BTD, *of_targets))
        return _chunk(tokens, embedding_VD, n_valid, kernel)

    def add(total, start, size):
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        loss, dhidden_BTD, dembedding_VD = chunk(start, size)
        return (
            total[0] + loss,
            put(total[1], dhidden_BTD),
            total[2] + dembedding_VD,
        )

    if size == T:
        total = chunk(0, T)
    else:
        zeros_VD = jnp.zeros(embedding_VD.shape)
        total = jnp.zeros(()), jnp.zeros_like(hidden_BTD), zeros_VD
        total = jax.lax.fori_loop(
            0, T // size, lambda i, total: add(total, i * size, size), total
        )
        if T % size:
            total = add(total, T - T % size, T % size)
    loss, dhidden_BTD, dembedding_VD = total
    return loss, dhidden_BTD, dembedding_VD.astype(variables[1].dtype)


def _chunk(tokens, embedding_VD, n_valid, kernel):
    """As `_over_mesh`, of tokens whose logits are held at once; sums in float32."""
    hidden_BTD, targets_BT, mask_BT = tokens
    V, D = embedding_VD.shape
    hidden_MD, targets_M = hidden_BTD.reshape(-1, D), targets_BT.reshape(-1)
    logits_MV = _product(hidden_MD, embedding_VD, (1, 1))
    of_logits = _softmax_cross_entropy
    if kernel:
        # Here, for importing Pallas takes time.
        from gpt2_jax.ops import kernels

        of_logits = kernels.softmax_cross_entropy
    nll_M, dlogits_MV = of_logits(
        *(logits_MV, targets_M, None if mask_BT is None else mask_BT.reshape(-1)),
        n_valid=n_valid or V,
        dtype=hidden_BTD.dtype,
    )
    dhidden_MD = _product(dlogits_MV, embedding_VD, (1, 0))
    dembedding_VD = _product(dlogits_MV, hidden_MD, (0, 0))
    dhidden_BTD = dhidden_MD.astype(hidden_BTD.dtype).reshape(hidden_BTD.shape)
    return nll_M.sum(), dhidden_BTD, dembedding_VD


def _softmax_cross_entropy(logits_MV, targets_M, mask_M, *, n_valid, dtype):
    """As `kernels.softmax_cross_entropy`."""
    id_V = jnp.arange(logits_MV.shape[1])
    if n_valid < len(id_V):
        logits_MV = jnp.where(id_V < n_valid, logits_MV, LEAST)
    # Compared rather than indexed: so each device looks at its own part of the row.
    is_target_MV = id_V == targets_M[:, None]
    if on_cpu():
        logits_MV -= logits_MV.max(-1, keepdims=True)
        exp_MV = jnp.exp(logits_MV)
        sum_M = exp_MV.sum(-1)
        target_M = jnp.where(is_target_MV, logits_MV, 0).sum(-1)
        nll_M = jnp.log(sum_M) - target_M
        dlogits_MV = exp_MV / sum_M[:, None] - is_target_MV
    else:
        # Read once for all that is known of a row, and once for its softmax.
        of_target_MV = jnp.where(is_target_MV, logits_MV, 0.0)
        greatest_M, sum_M, target_M = jax.lax.reduce(
            (logits_MV, jnp.ones_like(logits_MV), of_target_MV),
            (LEAST, np.float32(0), np.float32(0)),
            _merge,
            (1,),
        )
        log_sum_M = greatest_M + jnp.log(sum_M)
        nll_M = log_sum_M - target_M
        dlogits_MV = jnp.exp(logits_MV - log_sum_M[:, None]) - is_target_MV
    if mask_M is not None:
        nll_M = jnp.where(mask_M, nll_M, 0)
        dlogits_MV = jnp.where(mask_M[:, None], dlogits_MV, 0)
    return nll_M, dlogits_MV.astype(dtype)


def _merge(one, other):
    """Merges what is known of two parts of a row: the greatest logit, the sum of
    exponentials of logits less that one, and the target's logit or 0.
    """
    greatest = jnp.maximum(one[0], other[0])
    sums = (s * jnp.exp(g - greatest) for g, s, _ in (one, other))
    return greatest, sum(sums), one[2] + other[2]


def _product(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product of matrices over one axis of each, in float32."""
    contracted = ((axes[:1], axes[1:]), ((), ()))
    return jax.lax.dot_general(x, y, contracted, preferred_element_type=jnp.float32)


def token_log_probs(
    hidden_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    scale_V: jax.Array | None = None,
    n_valid: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden embedding^T)[target] in nats, and whether no logit is greater.

    Arguments and errors are those of `summed_cross_entropy`. There is no gradient.

    Returns:
      float32 [B, T] and bool [B, T].
    """
    V = embedding_VD.shape[0]
    _check_n_valid(n_valid, V)
    each = partial(_over_vocabulary, n_valid=None if n_valid == V else n_valid)
    if mesh is None:
        return each(hidden_BTD, embedding_VD, targets_BT, scale_V)
    rows, vocabulary = P(BATCH), P("tensor")
    spread = jax.shard_map(
        partial(each, axis="tensor"),
        mesh=mesh,
        in_specs=(rows, vocabulary, rows, vocabulary),
        out_specs=rows,
        check_vma=False,
    )
    return spread(hidden_BTD, embedding_VD, targets_BT, scale_V)


def _over_vocabulary(hidden_BTD, embedding_VD, targets_BT, scale_V, n_valid, axis=None):
    """As `token_log_probs`, for one part of the batch.

    Args:
      axis: the mesh axis over which the vocabulary is sharded, if there is one.
    """
    B, T, D = hidden_BTD.shape
    V = embedding_VD.shape[0]
    first = 0 if axis is None else jax.lax.axis_index(axis) * V
    hidden_MD, targets_M1 = hidden_BTD.reshape(-1, D), targets_BT.reshape(-1, 1)
    size = part_of_vocabulary(B * T, V)

    def add(start, size, so_far):
        """The sum is of exponentials of logits less the greatest so far."""
        greatest_M, sum_M, target_M = so_far
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        rows_ND = take(embedding_VD)
        if scale_V is None:
            rows_ND = rows_ND.astype(hidden_MD.dtype)
            logits_MN = _product(hidden_MD, rows_ND, (1, 1))
        else:
            logits_MN = project_rows(hidden_MD, rows_ND, take(scale_V))
        id_N = first + start + jnp.arange(size)
        if n_valid is not None:
            logits_MN = jnp.where(id_N < n_valid, logits_MN, LEAST)
        before_M, greatest_M = greatest_M, jnp.maximum(greatest_M, logits_MN.max(1))
        sum_M *= jnp.exp(before_M - greatest_M)
        sum_M += jnp.exp(logits_MN - greatest_M[:, None]).sum(1)
        target_M += jnp.where(id_N == targets_M1, logits_MN, 0).sum(1)
        return greatest_M, sum_M, target_M

    total = jnp.full(B * T, LEAST), jnp.zeros(B * T), jnp.zeros(B * T)
    total = jax.lax.fori_loop(0, V // size, lambda i, x: add(i * size, size, x), total)
    if V % size:
        total = add(V - V % size, V % size, total)
    greatest_M, sum_M, target_M = total
    if axis is not None:
        of_all_M = jax.lax.pmax(greatest_M, axis)
        sum_M *= jnp.exp(greatest_M - of_all_M)
        sum_M, target_M = jax.lax.psum((sum_M, target_M), axis)
        greatest_M = of_all_M
    logprob_M = target_M - greatest_M - jnp.log(sum_M)
    return tuple(x.reshape(B, T) for x in (logprob_M, target_M >= greatest_M))
