"""{our path: Tensor} -> parameters, each tensor straight to its shards.

A reader of a foreign format names its tensors by the paths of `model.abstract_params`
and gives each in the matrix form that files have: a kernel of [D, 3, H, K] as
[D, 3 * H * K], one of [H, K, D] as [H * K, D].
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.tensors import Tensor
from gpt2_jax.model import Params, abstract_params


def names(cfg: GPT2Config) -> Iterator[str]:
    """The paths of all parameters; cheap however large the config says it is."""
    yield from ("wte/embedding", "wpe/embedding")
    for i in range(cfg.n_layer):
        for norm in ("ln_1", "ln_2"):
            yield from _leaves(f"h_{i}/{norm}", "scale", cfg)
        for linear in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"):
            yield from _leaves(f"h_{i}/{linear}", "kernel", cfg)
    yield from _leaves("ln_f", "scale", cfg)


def _leaves(module: str, weight: str, cfg: GPT2Config) -> Iterator[str]:
    yield f"{module}/{weight}"
    if cfg.bias:
        yield f"{module}/bias"


def matrix_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter as files have it: at most two axes."""
    if path.endswith("attn/c_attn/kernel"):
        return shape[0], math.prod(shape[1:])
    if path.endswith("attn/c_proj/kernel"):
        return math.prod(shape[:2]), shape[2]
    return shape


def load_params(
    cfg: GPT2Config,
    tensors: Mapping[str, Tensor],
    *,
    dtype: Any,
    shardings: Any = None,
    where: object = "the file",
) -> Params:
    """Parameters of `cfg` in `dtype`, read one tensor at a time.

    Args:
      tensors: by our paths, in matrix form.
      shardings: a tree as the parameters'; None: all on the first device.
      where: named in errors.

    Raises:
      ValueError: on a tensor that is missing, too many, of another shape, or that
        holds NaN or infinity, before (but for the last) anything is read.
    """
    count = 0
    for name in names(cfg):
        count += 1
        if name not in tensors:
            raise ValueError(f"{where} has no tensor for {name}")
    if count != len(tensors):
        raise ValueError(f"{where} has {sorted(set(tensors) - {*names(cfg)})[0]} too")
    abstract, treedef = jax.tree_util.tree_flatten_with_path(abstract_params(cfg))
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = [device] * len(abstract)
    else:
        places = jax.tree.leaves(shardings)
    paths = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in abstract]
    for path, (_, leaf) in zip(paths, abstract, strict=True):
        expected, found = matrix_shape(path, leaf.shape), tensors[path].shape
        if found != expected:
            raise ValueError(
                f"{where}: {path} has shape {list(found)}, the config needs "
                f"{list(expected)}"
            )
    leaves = []
    for path, (_, leaf), place in zip(paths, abstract, places, strict=True):
        array = tensors[path].read().reshape(leaf.shape)
        x = jax.make_array_from_callback(
            leaf.shape, place, partial(_part, array, dtype)
        )
        if not _all_finite(x):
            raise ValueError(f"{where}: {path} holds NaN or infinity")
        leaves.append(x)
    return jax.tree.unflatten(treedef, leaves)


def _part(array: np.ndarray, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    return np.array(array[index], dtype)  # a copy: the file may change or go


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def matrices(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array in matrix form) of each parameter, on the host, one at a time."""
    for key, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        yield path, np.asarray(x).reshape(matrix_shape(path, x.shape))
