"""The layers of a GPT-2: Linear, LayerNorm, the embedding, dropout."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from gpt2_jax.cache import KVCache
from gpt2_jax.checks import check_choice
from gpt2_jax.config import GPT2Config
from gpt2_jax.layout import LAYER, STACKED, stack_layers
from gpt2_jax.ops.linear import FEW_ROWS, affine, contract, project_rows
from gpt2_jax.ops.norm import normalize
from gpt2_jax.runtime.sharding import constrain

PRODUCT = "product"  # what comes out of a Linear, to the policies below
REMAT: dict[str, Callable[..., bool]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "block": jax.checkpoint_policies.nothing_saveable,
}


def remat_policy(name: str) -> Callable[..., bool]:
    """What of a block is kept for the gradient. Raises ValueError on an unknown name.

    Its inputs always are; the rest is computed again.
    """
    return REMAT[check_choice("remat", name, REMAT)]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed, the same in all of its layers; see `model.GPT2`."""

    dtype: Any
    param_dtype: Any
    attention: str
    mesh: Mesh | None = None
    lora_pdrop: float = 0.0


class Linear(nn.Module):
    """x [..., *in_shape] -> [..., *out_shape], with a flat bias or none."""

    in_shape: Sequence[int]
    out_shape: Sequence[int]
    stddev: float
    use_bias: bool
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        in_shape, out_shape = tuple(self.in_shape), tuple(self.out_shape)
        param_dtype = self.compute.param_dtype
        x, bias = x.astype(self.compute.dtype), None
        if self.use_bias:
            bias = self.param(
                "bias", nn.initializers.zeros, (math.prod(out_shape),), param_dtype
            )
        if self.has_variable("params", "weight"):
            y = self._project_rows(x, in_shape, out_shape)
            if bias is not None:
                y += bias.reshape(out_shape)
        else:
            kernel = self.param(
                "kernel",
                nn.initializers.normal(self.stddev),
                in_shape + out_shape,
                param_dtype,
            )
            y = affine(x, kernel, bias, len(in_shape))
        if self.has_variable("params", "lora_a"):
            y += self._adapt(
                dropout(x, self.compute.lora_pdrop, dropout_key), len(in_shape)
            )
        return checkpoint_name(y.astype(x.dtype), PRODUCT)

    def _adapt(self, x, n_in):
        a: jax.Array = self.get_variable("params", "lora_a")
        b: jax.Array = self.get_variable("params", "lora_b")
        return affine(affine(x, a, None, n_in).astype(x.dtype), b, None, 1)

    def _project_rows(self, x, in_shape, out_shape):
        rows = x.shape[: x.ndim - len(in_shape)]
        weight: jax.Array = self.get_variable("params", "weight")
        scale: jax.Array | None = self.get_variable("params", "scale")
        x_MI = x.reshape(math.prod(rows), -1)
        y_MO = project_rows(x_MI, weight.reshape(-1, x_MI.shape[1]), scale)
        return y_MO.reshape(*rows, *out_shape)


class LayerNorm(nn.Module):
    """Over the last axis; computed in float32, whatever the dtype of the result."""

    epsilon: float
    use_bias: bool
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, (ones, zeros) = (
            x.shape[-1:],
            (nn.initializers.ones, nn.initializers.zeros),
        )
        scale = self.param("scale", ones, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", zeros, shape, self.param_dtype)
        return normalize(x, scale, bias, self.epsilon).astype(self.dtype)


def layer_norm(cfg: GPT2Config, compute: Compute, name: str | None = None) -> LayerNorm:
    dtypes = compute.dtype, compute.param_dtype
    return LayerNorm(cfg.layer_norm_epsilon, cfg.bias, *dtypes, name=name)


class TokenEmbedding(nn.Module):
    """Ids -> [..., D], and hidden states -> logits by the same table."""

    cfg: GPT2Config
    compute: Compute

    def setup(self) -> None:
        cfg = self.cfg
        init = nn.initializers.normal(cfg.initializer_range)
        shape = (cfg.vocab_size, cfg.n_embd)
        self.embedding = self.param("embedding", init, shape, self.compute.param_dtype)
        self.is_int8 = self.embedding.dtype == jnp.int8
        if self.is_int8:
            self.scale = self.param("scale", nn.initializers.ones, (cfg.vocab_size,))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        table_VD = constrain(self.embedding, self.compute.mesh, "tensor", None)
        x = jnp.take(table_VD, tokens, axis=0)
        if self.is_int8:
            x = x * jnp.take(self.scale, tokens)[..., None]
        return x.astype(self.compute.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of x [..., D]."""
        rows = x.shape[:-1]
        if not self.is_int8 and math.prod(rows) > FEW_ROWS:
            return contract(x, self.embedding.astype(self.compute.dtype), (1,))
        scale = self.scale if self.is_int8 else None
        y_MV = project_rows(x.reshape(-1, x.shape[-1]), self.embedding, scale)
        return y_MV.reshape(*rows, -1)


def adapter_key(
    compute: Compute, dropout_key: jax.Array | None, i: int
) -> jax.Array | None:
    """The key for dropout in a module's i-th adapter; None where there is none."""
    return fold_in(dropout_key, i + 1) if compute.lora_pdrop else None


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest; key None: the identity."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def fold_in(key: jax.Array | None, i: Any) -> jax.Array | None:
    """`jax.random.fold_in`; None of None."""
    return None if key is None else jax.random.fold_in(key, i)


def positions(
    T: int, cache: KVCache | None, segment_BT: jax.Array | None, n_positions: int
) -> jax.Array:
    """int32 [B or 1, T]: the position of each of T tokens, within its segment, or
    after those that the cache holds.
    """
    if segment_BT is not None:
        positions_BT = positions_within(segment_BT)
    else:
        positions_BT = jnp.arange(T)[None]
    if cache is not None:
        # A guess past the end of the context is computed and never used.
        positions_BT = positions_BT + cache.length_B[:, None]
        positions_BT = jnp.minimum(positions_BT, n_positions - 1)
    return positions_BT


def positions_within(segment_BT: jax.Array) -> jax.Array:
    """int32 [B, T]: how many tokens each has before it, of its segments."""
    position_T = jnp.arange(segment_BT.shape[1])
    if segment_BT.ndim == 3:
        own_BT = segment_BT[..., 0]
        seen_BTS2 = segment_BT[:, :, None] == own_BT[:, None, :, None]
        before_BTS = seen_BTS2.any(-1) & (position_T < position_T[:, None])
        return before_BTS.sum(-1)
    is_first_BT = jnp.diff(segment_BT, prepend=segment_BT[:, :1]) != 0
    return position_T - jax.lax.cummax(jnp.where(is_first_BT, position_T, 0), axis=1)


def run_layers(
    layer: Callable[..., Any],
    x_BTD: jax.Array,
    params: Mapping[str, Any],
    cache: KVCache | None,
    shared: tuple[Any, ...],
    *,
    n_layer: int,
    scan: bool,
    remat: str,
) -> tuple[jax.Array, Any]:
    """Applies the layers one after the other, or under one scan.

    Over a cache they are written out and nothing is computed again.

    Args:
      layer: (x_BTD, its parameters, its index, its cache, *shared) -> (x_BTD, kv).
      shared: what all layers get.
      scan: run them as one `lax.scan` over their stacked parameters.
      remat: what is computed again for the gradient, a key of REMAT.

    Returns:
      x_BTD, and the kv of each layer.
    """
    apply = layer
    scan = scan and cache is None
    if remat != "none" and cache is None:
        # In a scan nothing could take the second computation for the first.
        policy = remat_policy(remat)
        apply = jax.checkpoint(apply, policy=policy, prevent_cse=not scan)
    if scan:

        def step(x_BTD, params_and_i):
            return apply(x_BTD, *params_and_i, None, *shared)

        layers = stack_layers(params)[STACKED], jnp.arange(n_layer)
        with jax.named_scope(STACKED):
            return jax.lax.scan(step, x_BTD, layers)
    if isinstance(x_BTD, jax.core.Tracer):
        apply = jax.jit(apply)  # which is traced once for all layers
    kvs = []
    for i in range(n_layer):
        held = None if cache is None else cache.of_layer(i)
        with jax.named_scope(f"{LAYER}{i}"):
            x_BTD, kv = apply(x_BTD, params[f"{LAYER}{i}"], i, held, *shared)
        kvs.append(kv)
    return x_BTD, kvs
