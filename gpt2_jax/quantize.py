"""Parameters in the dtype that they are decoded in: float32, bfloat16 or int8."""

from functools import partial

import jax
import jax.numpy as jnp

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import GPT2, Params, dtype_named

INT8 = "int8"


def check_dtype(name: str) -> None:
    """Raises ValueError on what is neither float32, bfloat16 nor int8."""
    if name != INT8:
        try:
            dtype_named(name)
        except ValueError as error:
            raise ValueError(f"{error} or {INT8}") from None


def model_of(cfg: GPT2Config, dtype: str) -> GPT2:
    """The module that computes in this dtype.

    With int8 weights it computes in float32 on CPUs, in bfloat16 on accelerators.
    """
    if dtype == INT8:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return GPT2(cfg, dtype=dtype_named(dtype), param_dtype=dtype_named(dtype))


def quantize(params: Params) -> Params:
    """Kernels and wte as int8, a scale for each output channel; the rest as it is.

    The scale is the channel's greatest absolute value over 127: rounding moves a weight
    by half of it at most. Takes the place of `params`, one array at a time.
    """

    for name, value in list(params.items()):
        if isinstance(value, dict):
            quantize(value)
            if name == "wte":
                value["embedding"], value["scale"] = _int8(value["embedding"], (1,))
        elif name == "kernel":
            # of attn/c_proj [H, K, D] the first two axes are summed over
            axes = (0, 1) if value.ndim == 3 else (0,)
            params["kernel"], params["scale"] = _int8(value, axes)
    return params


@partial(jax.jit, static_argnames="axes")
def _int8(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """x rounded to multiples of a scale, which is common to the given axes."""
    scale = jnp.max(jnp.abs(x), axis=axes, keepdims=True).astype(jnp.float32) / 127
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    return jnp.round(x / scale).astype(jnp.int8), scale.reshape(-1)
