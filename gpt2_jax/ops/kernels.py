"""Kernels for NVIDIA GPUs, written in Pallas for Triton."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LEAST = np.finfo(np.float32).min  # finite, so that x - x is 0 and not NaN
COLUMNS = 8192  # of a row, that all threads of a program hold at a time


def softmax_cross_entropy(
    logits_MV: jax.Array,
    targets_M: jax.Array,
    mask_M: jax.Array | None,
    *,
    n_valid: int,
    dtype: Any,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(logits)[target] in nats, and its gradient by the logits.

    A program goes through a row twice, one a multiprocessor at a time, so that the row
    may be in the cache the second time. XLA goes through all rows before it does so.

    Args:
      logits_MV: float32.
      targets_M: int32.
      mask_M: bool, the rows that count, others give 0; None: all.
      n_valid: of V; logits from here on have no part, and a gradient of 0.
      dtype: of the gradient.
      interpret: run it on a CPU, slowly.

    Returns:
      float32 [M], and [M, V].
    """
    M, V = logits_MV.shape
    counts_M = jnp.ones(M, jnp.int32) if mask_M is None else mask_M.astype(jnp.int32)
    row = pl.BlockSpec((None, V), lambda i: (i, 0))
    number = pl.BlockSpec((None,), lambda i: (i,))
    return pl.pallas_call(
        partial(_softmax_cross_entropy, V=V, n_valid=n_valid),
        grid=(M,),
        in_specs=[row, number, number],
        out_specs=[number, row],
        out_shape=[
            jax.ShapeDtypeStruct((M,), jnp.float32),
            jax.ShapeDtypeStruct((M, V), dtype),
        ],
        # All threads that a multiprocessor holds, if each has more than 32 registers.
        compiler_params=triton.CompilerParams(num_warps=32, num_stages=1),
        interpret=interpret,
        name="softmax_cross_entropy",
    )(logits_MV, targets_M, counts_M)


def _softmax_cross_entropy(
    logits_ref, target_ref, counts_ref, nll_ref, dlogits_ref, *, V, n_valid
):
    target, counts = target_ref[...], counts_ref[...] != 0
    n = pl.cdiv(V, COLUMNS)

    def columns(j):
        return pl.ds(j * COLUMNS, COLUMNS), j * COLUMNS + jnp.arange(COLUMNS)

    def load(j):
        at, id_C = columns(j)
        # By a mask that ends at n_valid, as odd as it is, they would be loaded singly.
        logits_C = triton.load(logits_ref.at[at], mask=id_C < V, other=LEAST)
        return jnp.where(id_C < n_valid, logits_C, LEAST)

    def add(j, so_far):
        """The sums are of exponentials of logits less the greatest so far."""
        greatest_C, sum_C = so_far
        logits_C = load(j)
        ratio_C = _exp(-jnp.abs(logits_C - greatest_C))
        is_greater_C = logits_C > greatest_C
        sum_C = jnp.where(is_greater_C, sum_C * ratio_C + 1, sum_C + ratio_C)
        return jnp.where(is_greater_C, logits_C, greatest_C), sum_C

    start = jnp.full(COLUMNS, LEAST), jnp.zeros(COLUMNS)
    greatest_C, sum_C = jax.lax.fori_loop(0, n, add, start)
    greatest = greatest_C.max()
    log_sum = greatest + jnp.log((sum_C * _exp(greatest_C - greatest)).sum())
    nll = log_sum - triton.load(logits_ref.at[target])
    nll_ref[...] = jnp.where(counts, nll, 0.0)

    def write(i, _):
        j = n - 1 - i  # what was read last is the surest to be in the cache
        at, id_C = columns(j)
        dlogits_C = _exp(load(j) - log_sum) - (id_C == target)
        dlogits_C = jnp.where(counts, dlogits_C, 0.0).astype(dlogits_ref.dtype)
        triton.store(dlogits_ref.at[at], dlogits_C, mask=id_C < V)

    jax.lax.fori_loop(0, n, write, None)


def _exp(x):
    """By the GPU's own instruction, where `jnp.exp` is a dozen."""
    return jnp.exp2(x * np.float32(np.log2(np.e)))
