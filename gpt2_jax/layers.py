"""The layers of a GPT-2: Linear, LayerNorm, the embedding, dropout."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from gpt2_jax.checks import check_choice
from gpt2_jax.config import GPT2Config
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


class Linear(nn.Module):
    """x [..., *in_shape] -> [..., *out_shape], with a flat bias or none."""

    in_shape: Sequence[int]
    out_shape: Sequence[int]
    stddev: float
    use_bias: bool
    dtype: Any
    param_dtype: Any
    lora_pdrop: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        in_shape, out_shape = tuple(self.in_shape), tuple(self.out_shape)
        x, bias = x.astype(self.dtype), None
        if self.use_bias:
            bias = self.param(
                "bias", nn.initializers.zeros, (math.prod(out_shape),), self.param_dtype
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
                self.param_dtype,
            )
            y = affine(x, kernel, bias, len(in_shape))
        if self.has_variable("params", "lora_a"):
            y += self._adapt(dropout(x, self.lora_pdrop, dropout_key), len(in_shape))
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


def layer_norm(cfg: GPT2Config, dtype, param_dtype, name=None) -> "LayerNorm":
    return LayerNorm(cfg.layer_norm_epsilon, cfg.bias, dtype, param_dtype, name=name)


class TokenEmbedding(nn.Module):
    """Ids -> [..., D], and hidden states -> logits by the same table."""

    cfg: GPT2Config
    dtype: Any
    param_dtype: Any
    mesh: Mesh | None

    def setup(self) -> None:
        cfg = self.cfg
        init = nn.initializers.normal(cfg.initializer_range)
        shape = (cfg.vocab_size, cfg.n_embd)
        self.embedding = self.param("embedding", init, shape, self.param_dtype)
        self.is_int8 = self.embedding.dtype == jnp.int8
        if self.is_int8:
            self.scale = self.param("scale", nn.initializers.ones, (cfg.vocab_size,))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        table_VD = constrain(self.embedding, self.mesh, "tensor", None)
        x = jnp.take(table_VD, tokens, axis=0)
        if self.is_int8:
            x = x * jnp.take(self.scale, tokens)[..., None]
        return x.astype(self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Float32 logits [..., V] of x [..., D]."""
        rows = x.shape[:-1]
        if not self.is_int8 and math.prod(rows) > FEW_ROWS:
            return contract(x, self.embedding.astype(self.dtype), (1,))
        scale = self.scale if self.is_int8 else None
        y_MV = project_rows(x.reshape(-1, x.shape[-1]), self.embedding, scale)
        return y_MV.reshape(*rows, -1)


def adapter_key(module: Any, dropout_key: jax.Array | None, i: int) -> jax.Array | None:
    """Of the dropout in the i-th adapter of a module; None where there is none."""
    return fold_in(dropout_key, i + 1) if module.lora_pdrop else None


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest; key None: the identity."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def fold_in(key: jax.Array | None, i: Any) -> jax.Array | None:
    """`jax.random.fold_in`; None of None."""
    return None if key is None else jax.random.fold_in(key, i)


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
