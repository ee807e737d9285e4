"""The activations of the MLP. Reference: `ACTIVATIONS`, elementwise."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from gpt2_jax.ops.materialize import materialize
from gpt2_jax.runtime.platform import on_cpu

GELU_BY_TANH = partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": GELU_BY_TANH,
    "gelu_pytorch_tanh": GELU_BY_TANH,
    "gelu_fast": GELU_BY_TANH,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


def activate(x: jax.Array, name: str) -> jax.Array:
    """The activation of x.

    For its gradient an accelerator keeps x alone: JAX would keep what is as wide, the
    widest of a block, several times over, and memory is slower than the computation.
    """
    function = ACTIVATIONS[name]
    if x.dtype == jnp.float32:
        x = materialize(x)  # GELU by cuBLAS, within its product, is for less precision
    return function(x) if on_cpu() else jax.checkpoint(function)(x)
