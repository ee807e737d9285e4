"""Cross-entropy that never holds the logits of a whole batch.

The vocabulary is the widest axis of a GPT-2 by far: logits [B, T, V] in float32 may
take more memory than all else in a training step. Here they are made for a chunk of
the tokens of each row at a time, and so is their gradient, in the same pass.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gpt2_jax.model import project_rows
from gpt2_jax.sharding import BATCH, n_batch_shards, on_cpu


def chunk_bytes() -> int:
    """Of the float32 logits that a device holds at a time.

    Each chunk adds to the gradient of the whole embedding: on an accelerator its
    products take longer than that if it is of some thousand tokens.
    """
    return 2**27 if on_cpu() else 2**29


def chunk_tokens(B: int, T: int, V: int, n_bytes: int | None = None) -> int:
    """Tokens of a row that are gone through at a time: all T, or a power of 2."""
    most = max(1, (n_bytes or chunk_bytes()) // (4 * B * V))
    return T if T <= most else 2 ** (most.bit_length() - 1)


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
    return _over_mesh(variables, constants, n_valid, mesh, differentiate=False)[0]


def _forward(variables, constants, n_valid, mesh):
    if constants[0] is not None:
        raise ValueError("an int8 embedding has no gradient")
    loss, *gradients = _over_mesh(
        variables, constants, n_valid, mesh, differentiate=True
    )
    return loss, tuple(gradients)


def _backward(n_valid, mesh, gradients, dloss):
    return tuple((dloss * x).astype(x.dtype) for x in gradients), None


_loss.defvjp(_forward, _backward)


def _over_mesh(variables, constants, n_valid, mesh, differentiate):
    """Loss, and its gradients by hidden states and embedding, or None for both."""
    each = partial(_over_chunks, n_valid=n_valid, differentiate=differentiate)
    if mesh is None:
        return each(variables, constants, tensor=1)
    each = partial(each, tensor=mesh.shape["tensor"])
    if n_batch_shards(mesh) == 1:
        return each(variables, constants)

    def part(variables, constants):
        loss, dhidden_BTD, dembedding_VD = each(variables, constants)
        loss, dembedding_VD = jax.lax.psum((loss, dembedding_VD), BATCH)
        return loss, dhidden_BTD, dembedding_VD

    rows, whole = P(BATCH), P()
    # The tensor axis is left to XLA, which follows the rows of the embedding.
    spread = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=((rows, whole), (whole, rows, rows)),
        out_specs=(whole, rows, whole),
        axis_names=set(BATCH),
        check_vma=False,
    )
    # Only within jit can an axis be left.
    return jax.jit(spread)(variables, constants)


def _over_chunks(variables, constants, n_valid, tensor, differentiate):
    """As `_over_mesh`, of one part of the batch."""
    hidden_BTD, embedding_VD = variables
    scale_V, targets_BT, mask_BT = constants
    if scale_V is None:
        embedding_VD = embedding_VD.astype(hidden_BTD.dtype)
    B, T, _ = hidden_BTD.shape
    size = chunk_tokens(B, T, embedding_VD.shape[0] // tensor)

    def chunk(start, size):
        take = partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1
        )
        tokens = jax.tree.map(take, (hidden_BTD, targets_BT, mask_BT))
        return _chunk(tokens, embedding_VD, scale_V, n_valid, differentiate)

    def add(total, start, size):
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        loss, dhidden_BTD, dembedding_VD = chunk(start, size)
        return (
            total[0] + loss,
            jax.tree.map(put, total[1], dhidden_BTD),
            jax.tree.map(jnp.add, total[2], dembedding_VD),
        )

    if size == T:
        total = chunk(0, T)
    else:
        total = jnp.zeros(()), None, None
        if differentiate:
            zeros_VD = jnp.zeros(embedding_VD.shape)
            total = jnp.zeros(()), jnp.zeros_like(hidden_BTD), zeros_VD
        total = jax.lax.fori_loop(
            0, T // size, lambda i, total: add(total, i * size, size), total
        )
        if T % size:
            total = add(total, T - T % size, T % size)
    loss, dhidden_BTD, dembedding_VD = total
    if differentiate:
        dembedding_VD = dembedding_VD.astype(variables[1].dtype)
    return loss, dhidden_BTD, dembedding_VD


def _chunk(tokens, embedding_VD, scale_V, n_valid, differentiate):
    """As `_over_mesh`, of tokens whose logits are held at once; sums in float32."""
    hidden_BTD, targets_BT, mask_BT = tokens
    hidden_MD = hidden_BTD.reshape(-1, embedding_VD.shape[1])
    exp_MV, sum_M1, is_target_MV, target_M1 = _softmax(
        hidden_MD, embedding_VD, scale_V, targets_BT.reshape(-1, 1), n_valid
    )
    nll_M1 = jnp.log(sum_M1) - target_M1
    dlogits_MV = exp_MV / sum_M1 - is_target_MV
    if mask_BT is not None:
        mask_M1 = mask_BT.reshape(-1, 1)
        nll_M1 = jnp.where(mask_M1, nll_M1, 0)
        dlogits_MV = jnp.where(mask_M1, dlogits_MV, 0)
    if not differentiate:
        return nll_M1.sum(), None, None
    dlogits_MV = dlogits_MV.astype(hidden_BTD.dtype)
    dhidden_MD = _product(dlogits_MV, embedding_VD, (1, 0))
    dembedding_VD = _product(dlogits_MV, hidden_MD, (0, 0))
    dhidden_BTD = dhidden_MD.astype(hidden_BTD.dtype).reshape(hidden_BTD.shape)
    return nll_M1.sum(), dhidden_BTD, dembedding_VD


def _softmax(hidden_MD, embedding_VD, scale_V, targets_M1, n_valid):
    """Of logits less the greatest of their row: exponentials, the sum of these, which
    is the target's, and the target's own."""
    V = embedding_VD.shape[0]
    if scale_V is None:
        logits_MV = _product(hidden_MD, embedding_VD, (1, 1))
    else:
        logits_MV = project_rows(hidden_MD, embedding_VD, scale_V)
    if n_valid is not None:
        logits_MV = jnp.where(jnp.arange(V) < n_valid, logits_MV, -jnp.inf)
    logits_MV -= logits_MV.max(-1, keepdims=True)
    exp_MV = jnp.exp(logits_MV)
    # Compared rather than indexed: so each device looks at its own part of the row.
    is_target_MV = jnp.arange(V) == targets_M1
    target_M1 = jnp.where(is_target_MV, logits_MV, 0).sum(-1, keepdims=True)
    return exp_MV, exp_MV.sum(-1, keepdims=True), is_target_MV, target_M1


def _product(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Of matrices, one axis of each summed over, in float32."""
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
    n_valid = None if n_valid == V else n_valid
    each = partial(_log_probs_over_chunks, n_valid=n_valid)
    operands = hidden_BTD, embedding_VD, scale_V, targets_BT
    if mesh is None:
        return each(*operands, tensor=1)
    each = partial(each, tensor=mesh.shape["tensor"])
    if n_batch_shards(mesh) == 1:
        return each(*operands)
    rows, whole = P(BATCH), P()
    spread = jax.shard_map(
        each,
        mesh=mesh,
        in_specs=(rows, whole, whole, rows),
        out_specs=rows,
        axis_names=set(BATCH),
        check_vma=False,
    )
    return jax.jit(spread)(*operands)


def _log_probs_over_chunks(
    hidden_BTD, embedding_VD, scale_V, targets_BT, n_valid, tensor
):
    if scale_V is None:
        embedding_VD = embedding_VD.astype(hidden_BTD.dtype)
    B, T, D = hidden_BTD.shape
    # On a CPU the sums over logits are faster the nearer these still are.
    n_bytes = chunk_bytes() // 4 if jax.default_backend() == "cpu" else None
    size = chunk_tokens(B, T, embedding_VD.shape[0] // tensor, n_bytes)

    def put(start, size, whole):
        take = partial(
            jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1
        )
        _, sum_M1, _, target_M1 = _softmax(
            take(hidden_BTD).reshape(-1, D),
            embedding_VD,
            scale_V,
            take(targets_BT).reshape(-1, 1),
            n_valid,
        )
        chunk = (target_M1 - jnp.log(sum_M1), target_M1 >= 0)
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_slice_in_dim(
                x, new.reshape(B, size), start, axis=1
            ),
            whole,
            chunk,
        )

    whole = jnp.zeros((B, T)), jnp.zeros((B, T), bool)
    whole = jax.lax.fori_loop(0, T // size, lambda i, x: put(i * size, size, x), whole)
    return put(T - T % size, T % size, whole) if T % size else whole
