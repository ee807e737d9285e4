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

from gpt2_jax.checks import shown
from gpt2_jax.config import GPT2Config
from gpt2_jax.formats.tensors import Tensor
from gpt2_jax.layout import Params
from gpt2_jax.model import abstract_params
from gpt2_jax.runtime.sharding import on_device


def matrix_shapes(cfg: GPT2Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Path and shape in matrix form of each parameter, one at a time.

    Plain arithmetic, so that a config which lies about its sizes costs nothing.
    """
    d, f = cfg.n_embd, cfg.mlp_dim
    yield "wte/embedding", (cfg.vocab_size, d)
    yield "wpe/embedding", (cfg.n_positions, d)
    for i in range(cfg.n_layer):
        for module, *shape in (
            ("ln_1", d),
            ("attn/c_attn", d, 3 * d),
            ("attn/c_proj", d, d),
            ("ln_2", d),
            ("mlp/c_fc", d, f),
            ("mlp/c_proj", f, d),
        ):
            yield from _leaves(f"h_{i}/{module}", tuple(shape), cfg)
    yield from _leaves("ln_f", (d,), cfg)


def _leaves(
    module: str, shape: tuple[int, ...], cfg: GPT2Config
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{module}/{'kernel' if len(shape) == 2 else 'scale'}", shape
    if cfg.bias:
        yield f"{module}/bias", shape[-1:]


def check_tensors(
    cfg: GPT2Config, tensors: Mapping[str, Tensor], where: object
) -> None:
    """Whether `tensors` are just those of `cfg`, before anything of its size is made.

    Raises:
      ValueError: on a tensor that is missing, too many, of another shape, or not of
        floats.
    """
    expected = {}
    for path, shape in matrix_shapes(cfg):
        if path not in tensors:
            raise ValueError(f"{where} has no tensor for {path}")
        expected[path] = shape
    if unknown := tensors.keys() - expected.keys():
        raise ValueError(f"{where} has {min(unknown)} too")
    for path, shape in expected.items():
        if tensors[path].shape != shape:
            raise ValueError(
                f"{where}: {path} has shape {shown([*tensors[path].shape])}, "
                f"the config needs {shown([*shape])}"
            )
        if not jnp.issubdtype(tensors[path].dtype, jnp.floating):
            raise ValueError(f"{where}: {path} has dtype {tensors[path].dtype}")


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
      ValueError: as `check_tensors`, before anything is read; and on a tensor that
        holds NaN or infinity, or a number too large for `dtype`.
    """
    check_tensors(cfg, tensors, where)
    abstract = abstract_params(cfg)
    if shardings is None:
        shardings = on_device(abstract, jax.devices()[0])
    named, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    leaves = []
    for (key, leaf), place in zip(named, jax.tree.leaves(shardings), strict=True):
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        array = tensors[path].read().reshape(leaf.shape)
        x = jax.make_array_from_callback(
            leaf.shape, place, partial(_part, array, dtype)
        )
        if not _all_finite(x):
            raise ValueError(f"{where}: {path} holds NaN or infinity")
        leaves.append(x)
    return jax.tree.unflatten(treedef, leaves)


def _part(array: np.ndarray, dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is refused later
        return np.array(array[index], dtype)  # a copy: the file may change or go


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def matrices(params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """(path, array in matrix form) of each parameter, on the host, one at a time."""
    for key, x in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        shape = x.shape
        if path.endswith("attn/c_attn/kernel"):
            shape = shape[0], math.prod(shape[1:])
        elif path.endswith("attn/c_proj/kernel"):
            shape = math.prod(shape[:2]), shape[2]
        yield path, np.asarray(x).reshape(shape)
