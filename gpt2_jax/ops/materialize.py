"""Arrays that XLA is to write to memory before it uses them."""

from typing import Any

import jax

from gpt2_jax.runtime.platform import on_gpu


def materialize(x: Any) -> Any:
    """x, a tree of arrays, written to memory on GPUs before it is used.

    Else XLA recomputes it in each of its uses, writes it in float32, or makes it part
    of a product.
    """
    return jax.lax.optimization_barrier(x) if on_gpu() else x
