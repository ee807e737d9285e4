"""The tree of parameters: one entry a layer, or all layers stacked.

Parameters are a plain nested dict, one entry a layer, whatever the way in which
the layers are run:

    wte/embedding [V, D]    wpe/embedding [P, D]    ln_f/{scale,bias} [D]
    h_{i}/ln_1, h_{i}/ln_2  {scale,bias} [D]
    h_{i}/attn/c_attn       kernel [D, 3, H, K]     bias [3D]
    h_{i}/attn/c_proj       kernel [H, K, D]        bias [D]
    h_{i}/mlp/c_fc          kernel [D, F]           bias [F]
    h_{i}/mlp/c_proj        kernel [F, D]           bias [D]

Biases are flat, so that ndim >= 2 holds for just the tensors that weight decay is for;
the head axes of c_attn and c_proj are there to be sharded.

While a model is trained whose layers are scanned, they are one entry `h`, each array
with an axis N before its own: a program for it is no longer the more layers there are,
and no time goes into stacking. Nobody else sees it: see `unstack_layers`.

While a model is adapted, `lora_a` [*in, rank] and `lora_b` [rank, *out] stand beside a
kernel, and their product is added to it (see `gpt2_jax.lora`).

To decode (see `gpt2_jax.decoding.weights`), a `weight` [*out, *in] may stand for a
kernel [*in, *out]. Weights and wte may be int8, with a flat float32 `scale` of their
output channels beside.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.checks import check_choice

Params = dict[str, Any]
LAYER, STACKED = "h_", "h"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def dtype_named(name: str) -> Any:
    """float32 or bfloat16. Raises ValueError on any other name."""
    return DTYPES[check_choice("dtype", name, DTYPES)]


def is_stacked(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of a tree, by its path, holds all layers along its first axis."""
    return any(getattr(key, "key", None) == STACKED for key in path)


def stack_layers(tree: Any) -> Any:
    """All h_{i} of the params in a tree, and of what mirrors them, as one h."""

    def stack(params: Params) -> Params:
        rest = {k: v for k, v in params.items() if not k.startswith(LAYER)}
        layers = [params[f"{LAYER}{i}"] for i in range(len(params) - len(rest))]
        if not layers:
            return params
        return {**rest, STACKED: jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}

    return _map_params(stack, tree)


def unstack_layers(tree: Any) -> Any:
    """The inverse of `stack_layers`; what is not stacked is left as it is."""

    # What mirrors the params need not have any of their leaves.
    stacked = (x for p, x in jax.tree_util.tree_leaves_with_path(tree) if is_stacked(p))
    n_layer = len(next(stacked, ()))

    def unstack(params: Params) -> Params:
        if STACKED not in params:
            return params
        layers = params[STACKED]
        rest = {k: v for k, v in params.items() if k != STACKED}
        return rest | {
            f"{LAYER}{i}": jax.tree.map(lambda x, i=i: _layer(x, i), layers)
            for i in range(n_layer)
        }

    return _map_params(unstack, tree)


def _map_params(f: Callable[[Params], Params], tree: Any) -> Any:
    def is_params(x: Any) -> bool:
        return isinstance(x, dict) and (STACKED in x or f"{LAYER}0" in x)

    return jax.tree.map(lambda x: f(x) if is_params(x) else x, tree, is_leaf=is_params)


@jax.jit
def _layer(x: jax.Array, i: int) -> jax.Array:
    """One program for all layers."""
    return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def count_params(params: Params) -> int:
    """Number of parameters; abstract leaves will do."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
