"""Parameters for decoding: in float32, bfloat16 or int8, inputs along a row."""

from functools import partial

import jax
import jax.numpy as jnp

from gpt2_jax.checks import check_choice
from gpt2_jax.config import GPT2Config
from gpt2_jax.layout import DTYPES, Params, dtype_named
from gpt2_jax.model import GPT2

INT8 = "int8"


def check_dtype(name: str) -> None:
    """Raises ValueError on what is neither float32, bfloat16 nor int8."""
    check_choice("dtype", name, (*DTYPES, INT8))


def build_model(cfg: GPT2Config, dtype: str) -> GPT2:
    """The module that computes in this dtype.

    With int8 weights it computes in float32 on CPUs, in bfloat16 on accelerators.
    """
    if dtype == INT8:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return GPT2(cfg, dtype=dtype_named(dtype), param_dtype=dtype_named(dtype))


def transpose_kernels(params: Params) -> Params:
    """The parameters with each kernel [*in, *out] as a weight [*out, *in].

    Decoding reads such a weight row by row, a row for each output.
    """
    tree: Params = {}
    for name, value in params.items():
        if isinstance(value, dict):
            tree[name] = transpose_kernels(value)
        elif name == "kernel":
            tree["weight"] = _transpose(value)
        else:
            tree[name] = value
    return tree


def quantize(params: Params) -> Params:
    """Quantizes kernels and wte to int8, with a scale for each output.

    The scale is the channel's greatest absolute value over 127: rounding moves a weight
    by half of it at most. `params` is changed in place, one array at a time.
    """
    for name, value in list(params.items()):
        if isinstance(value, dict):
            quantize(value)
            if name == "wte":
                value["embedding"], value["scale"] = _int8(value["embedding"], 1)
        elif name == "kernel":
            params["weight"], params["scale"] = _int8(
                _transpose(params.pop("kernel")), _n_out(value)
            )
    return params


def _n_out(kernel: jax.Array) -> int:
    """The number of output axes: c_attn's is [D, 3, H, K], attn/c_proj's [H, K, D]."""
    return 3 if kernel.ndim == 4 else 1


@jax.jit
def _transpose(kernel: jax.Array) -> jax.Array:
    n_in = kernel.ndim - _n_out(kernel)
    return kernel.transpose(*range(n_in, kernel.ndim), *range(n_in))


@partial(jax.jit, static_argnames="n_out")
def _int8(x: jax.Array, n_out: int) -> tuple[jax.Array, jax.Array]:
    """x rounded to multiples of a scale for each of its first, output, axes."""
    axes = tuple(range(n_out, x.ndim))
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True).astype(jnp.float32) / 127
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x / scale).astype(jnp.int8), scale.reshape(-1)
