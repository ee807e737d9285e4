"""Products of activations and weights, several axes in and out.

Reference: jnp.tensordot(x, kernel, n_in) + bias. `affine` trains; `project_rows`
decodes from weights whose inputs lie along rows, int8 among them.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from gpt2_jax.ops.materialize import materialize
from gpt2_jax.ops.norm import sum_rows
from gpt2_jax.runtime.platform import has_matrix_unit, on_cpu, on_gpu


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, n_in: int
) -> jax.Array:
    """x [..., *in] times kernel [*in, *out] plus bias [prod(out)]: [..., *out].

    There are `n_in` axes in. Factors are in the dtype of x, sums in float32. So are the
    gradients of kernel and bias, and on CPUs the result; accelerators write that in the
    dtype of x.

    The gradient is the usual one. It is written out because JAX's own transposes
    the larger factor of the kernel's gradient, element by element, whenever that is
    the gradient of the output: on CPU a training step takes 1.5x the time.
    """
    rows, out = x.shape[: x.ndim - n_in], kernel.shape[n_in:]
    kernel = kernel.astype(x.dtype)
    if not on_gpu():
        y = contract(x, kernel, range(n_in), jnp.float32 if on_cpu() else x.dtype)
        return y if bias is None else y + bias.astype(y.dtype).reshape(out)

    def part(kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        # Outputs lie along one axis: so XLA sees a bias, and GELU, for cuBLAS to add.
        y = contract(x, kernel.reshape(*kernel.shape[:n_in], -1), range(n_in), x.dtype)
        if bias is not None:
            y += bias.astype(y.dtype)
        return y.reshape(*rows, *kernel.shape[n_in:])

    if len(out) < 3:
        return part(kernel, bias)
    n, axis = out[0], len(rows)
    biases = [None] * n if bias is None else bias.reshape(n, -1)
    parts = zip(_split(kernel, n_in), biases, strict=True)
    return jnp.stack([part(*p) for p in parts], axis)


def _split(x: jax.Array, axis: int) -> list[jax.Array]:
    """The parts along an axis, which is gone.

    On a GPU q, k and v are products of their own, as attention takes them: of one they
    would have to be cut out, and their gradients put together.
    """
    return [x.squeeze(axis) for x in jnp.split(x, x.shape[axis], axis)]


def contract(
    x: jax.Array, kernel: jax.Array, axes: Sequence[int], dtype: Any = jnp.float32
) -> jax.Array:
    """The last axes of x contracted with `axes` of the kernel."""
    last = range(x.ndim - len(axes), x.ndim)
    return jax.lax.dot_general(
        x, kernel, ((last, axes), ((), ())), preferred_element_type=dtype
    )


def _affine_forward(x, kernel, bias, n_in):
    return affine(x, kernel, bias, n_in), (x, kernel, bias)


def _affine_backward(n_in, residuals, dy):
    x, kernel, bias = residuals
    axis = x.ndim - n_in  # the first of the outputs, in dy
    if on_gpu() and kernel.ndim - n_in == 3:
        n = dy.shape[axis]
        biases = [None] * n if bias is None else bias.reshape(n, -1)
        parts = zip(_split(kernel, n_in), biases, _split(dy, axis), strict=True)
        gradients = [_affine_backward(n_in, (x, k, b), d) for k, b, d in parts]
        dxs, dkernels, dbiases = zip(*gradients, strict=True)
        dbias = None if bias is None else jnp.concatenate(dbiases)
        return sum(dxs), jnp.stack(dkernels, n_in), dbias
    dy, dbias = materialize(dy), None
    if bias is not None:
        dbias = sum_rows(dy.astype(bias.dtype), axis).reshape(bias.shape)
    low = kernel.astype(x.dtype)
    return *_products(x, low, dy.astype(x.dtype), n_in, kernel.dtype), dbias


affine.defvjp(_affine_forward, _affine_backward)


def _products(x, kernel, dy, n_in, dtype):
    """The gradients of x, in its dtype, and of the kernel, in `dtype`."""
    product = partial(jax.lax.dot_general, preferred_element_type=dtype)
    if on_cpu():
        # Of matrices: a product over several axes transposes the kernel first.
        x_MI = x.reshape(-1, math.prod(kernel.shape[:n_in]))
        dy_MO = dy.reshape(len(x_MI), -1)
        kernel_IO = kernel.reshape(x_MI.shape[1], -1)
        dx = jax.lax.dot_general(dy_MO, kernel_IO, (((1,), (1,)), ((), ())))
        dkernel = product(x_MI, dy_MO, (((0,), (0,)), ((), ())))
        return dx.reshape(x.shape), dkernel.reshape(kernel.shape)
    rows, out = range(x.ndim - n_in), range(n_in, kernel.ndim)
    dx = jax.lax.dot_general(dy, kernel, ((range(len(rows), dy.ndim), out), ((), ())))
    if math.prod(kernel.shape[:n_in]) <= math.prod(kernel.shape[n_in:]):
        return dx, product(x, dy, ((rows, rows), ((), ())))
    dkernel = product(dy, x, ((rows, rows), ((), ())))
    return dx, dkernel.transpose(*range(len(out), kernel.ndim), *range(len(out)))


FEW_ROWS = 64
BY_ROW = Layout(major_to_minor=(0, 1))
BY_BLOCK = Layout(major_to_minor=(0, 1, 2))
BLOCK = 2**24  # weights


def project_rows(
    x_MI: jax.Array, weight_OI: jax.Array, scale_O: jax.Array | None = None
) -> jax.Array:
    """Float32 [M, O] of x and a weight (taken in the dtype of x), inputs along rows.

    So weights stream at the speed of memory when rows are few.

    An int8 weight is multiplied by rows that are rounded to int8 too, each by its own
    greatest value: a product of integers. Source: LLM.int8(),
    https://arxiv.org/abs/2208.07339, section 2 (vector-wise quantization).

    Args:
      scale_O: float32; of the output channels of an int8 weight.
    """
    M, dtype = x_MI.shape[0], jnp.float32
    if scale_O is None:
        weight_OI = weight_OI.astype(x_MI.dtype)
    else:
        x_MI = x_MI.astype(jnp.float32)
        step_M1 = jnp.max(jnp.abs(x_MI), axis=1, keepdims=True) / 127
        step_M1 = jnp.maximum(step_M1, jnp.finfo(jnp.float32).tiny)
        x_MI, dtype = jnp.round(x_MI / step_M1).astype(jnp.int8), jnp.int32
    if M <= FEW_ROWS and on_cpu():
        y_MO = _stream(x_MI, weight_OI, dtype)
    else:
        y_MO = jax.lax.dot_general(
            x_MI, weight_OI, (((1,), (1,)), ((), ())), preferred_element_type=dtype
        )
    if scale_O is None:
        return y_MO
    return y_MO.astype(jnp.float32) * step_M1 * scale_O


def _stream(x_MI: jax.Array, weight_OI: jax.Array, dtype: Any) -> jax.Array:
    """[M, O] of few rows, in a form that XLA:CPU reads at the speed of memory.

    That is weight first, all factors row by row, in less than 32 bits two rows at
    least, and no more than `BLOCK` weights at once (of int8, jax >= 0.11). What XLA
    would choose by itself is up to 15 times slower. One row of bfloat16 is a sum of
    products, where no unit for products of matrices is at hand.
    """
    M, (n_out, n_in) = len(x_MI), weight_OI.shape
    if M == 1 and x_MI.dtype == jnp.bfloat16 and not has_matrix_unit():
        # Together, lest the weight is widened once, before the loop over the tokens.
        x_MI, weight_OI = jax.lax.optimization_barrier((x_MI, weight_OI))
        return (weight_OI.astype(dtype) * x_MI.astype(dtype)).sum(1)[None]
    if M == 1 and x_MI.dtype.itemsize < 4:
        x_MI = jnp.concatenate([x_MI, x_MI])
    x_IM = with_layout_constraint(x_MI.T, BY_ROW)
    n = _n_blocks(n_out, n_in)
    if n > 1:
        weight_NOI = weight_OI.reshape(n, -1, n_in)
        x_NIM = jnp.broadcast_to(x_IM, (n, *x_IM.shape))
        x_NIM = with_layout_constraint(x_NIM, BY_BLOCK)
        y_NOM = jnp.matmul(weight_NOI, x_NIM, preferred_element_type=dtype)
        y_OM = with_layout_constraint(y_NOM, BY_BLOCK).reshape(n_out, -1)
    else:
        y_OM = jnp.matmul(weight_OI, x_IM, preferred_element_type=dtype)
        y_OM = with_layout_constraint(y_OM, BY_ROW)
    return y_OM[:, :M].T


def _n_blocks(n_out: int, n_in: int) -> int:
    """The fewest equal blocks of rows that have at most `BLOCK` weights each.

    1 if no n <= 64 divides the rows evenly into blocks that are small enough.
    """
    fits = (n for n in range(1, 65) if n_out % n == 0 and n_out // n * n_in <= BLOCK)
    return next(fits, 1)
