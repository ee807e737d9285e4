"""GPT-2 as Linen modules: the only file that imports flax.linen.

Axes, carried by the names of arrays:
B batch, T query, S cached keys, H heads, K head_dim, D embed, F mlp, V vocab,
N layers.

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

To decode (see `gpt2_jax.weights`), a `weight` [*out, *in] may stand for a kernel
[*in, *out]. Weights and wte may be int8, with a flat float32 `scale` of their output
channels beside.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh

from gpt2_jax.attention import (
    attention_backend,
    cached_attention,
    causal_attention,
    causal_weights,
)
from gpt2_jax.cache import KVCache
from gpt2_jax.checks import check_choice
from gpt2_jax.config import GPT2Config
from gpt2_jax.sharding import BATCH, constrain, has_matrix_unit, on_cpu, on_gpu

Params = dict[str, Any]
LAYER, STACKED = "h_", "h"

GELU_BY_TANH = partial(nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_new": GELU_BY_TANH,
    "gelu_pytorch_tanh": GELU_BY_TANH,
    "gelu_fast": GELU_BY_TANH,
    "gelu": partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": jnp.tanh,
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

PRODUCT = "product"  # what comes out of a Linear, to the policies below
REMAT: dict[str, Callable[..., bool]] = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "block": jax.checkpoint_policies.nothing_saveable,
}


def activate(x: jax.Array, name: str) -> jax.Array:
    """The activation of x.

    For its gradient an accelerator keeps x alone: JAX would keep what is as wide, the
    widest of a block, several times over, and memory is slower than the computation.
    """
    function = ACTIVATIONS[name]
    if x.dtype == jnp.float32:
        x = _held(x)  # GELU by cuBLAS, within its product, is for less precision
    return function(x) if on_cpu() else jax.checkpoint(function)(x)


def dtype_named(name: str) -> Any:
    """float32 or bfloat16. Raises ValueError on any other name."""
    return DTYPES[check_choice("dtype", name, DTYPES)]


def remat_policy(name: str) -> Callable[..., bool]:
    """What of a block is kept for the gradient. Raises ValueError on an unknown name.

    Its inputs always are; the rest is computed again.
    """
    return REMAT[check_choice("remat", name, REMAT)]


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
        y = _dot(x, kernel, range(n_in), jnp.float32 if on_cpu() else x.dtype)
        return y if bias is None else y + bias.astype(y.dtype).reshape(out)

    def part(kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        # Outputs lie along one axis: so XLA sees a bias, and GELU, for cuBLAS to add.
        y = _dot(x, kernel.reshape(*kernel.shape[:n_in], -1), range(n_in), x.dtype)
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


def _dot(
    x: jax.Array, kernel: jax.Array, axes: Sequence[int], dtype: Any = jnp.float32
) -> jax.Array:
    """The last axes of x contracted with `axes` of the kernel."""
    last = range(x.ndim - len(axes), x.ndim)
    return jax.lax.dot_general(
        x, kernel, ((last, axes), ((), ())), preferred_element_type=dtype
    )


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
    """The fewest equal blocks of rows of at most `BLOCK` weights; 1 if 64 are few."""
    fits = (n for n in range(1, 65) if n_out % n == 0 and n_out // n * n_in <= BLOCK)
    return next(fits, 1)


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
    dy, dbias = _held(dy), None
    if bias is not None:
        dbias = _sum_rows(dy.astype(bias.dtype), axis).reshape(bias.shape)
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


def _held(x: Any) -> Any:
    """x, which a GPU writes to memory before it is used.

    XLA would compute it once more in each of its uses, write it in float32, or make
    it part of a product.
    """
    return jax.lax.optimization_barrier(x) if on_gpu() else x


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float
) -> jax.Array:
    """LayerNorm of x [..., D] over its last axis, in float32.

    The gradient is the usual one. It is written out for its sums (see `_sum_rows`),
    and because XLA:CPU would compute JAX's own once more in each of its uses.
    """
    return _normalize(x, scale_D, bias_D, epsilon)[0]


def _normalize(x, scale_D, bias_D, epsilon):
    mean = x.mean(-1, keepdims=True, dtype=jnp.float32)
    centred = x - mean
    variance = jnp.square(centred).mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(variance + epsilon)
    y = centred * rstd * scale_D
    return y if bias_D is None else y + bias_D, (x, mean, rstd, scale_D, bias_D)


def _normalize_backward(epsilon, residuals, dy):
    x, mean, rstd, scale_D, bias_D = residuals
    mean, rstd = _held((mean, rstd))
    normal = (x - mean) * rstd
    product = dy * normal
    mean_dy = _sum_channels(dy, scale_D) / x.shape[-1]
    mean_product = _sum_channels(product, scale_D) / x.shape[-1]
    dx = (dy * scale_D - mean_dy - normal * mean_product) * rstd
    dscale_D = _sum_rows(product, x.ndim - 1).astype(scale_D.dtype)
    if bias_D is not None:
        bias_D = _sum_rows(dy, x.ndim - 1).astype(bias_D.dtype)
    return dx.astype(x.dtype), dscale_D, bias_D


normalize.defvjp(_normalize, _normalize_backward)


def _sum_rows(x: jax.Array, n: int) -> jax.Array:
    """x summed over its first n axes.

    XLA:CPU is faster at products than at sums, for which it writes broadcast factors
    out in full: with this and `_sum_channels` a training step takes 0.9x the time.
    """
    if not on_cpu():
        return x.sum(tuple(range(n)))
    return jnp.tensordot(jnp.ones(x.shape[:n], x.dtype), x, n)


def _sum_channels(x: jax.Array, weight_D: jax.Array) -> jax.Array:
    """x [..., D] times the weight, summed to [..., 1]."""
    if not on_cpu():
        return (x * weight_D).sum(-1, keepdims=True)
    return jnp.tensordot(x, weight_D.astype(x.dtype), 1)[..., None]


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
            return _dot(x, self.embedding.astype(self.dtype), (1,))
        scale = self.scale if self.is_int8 else None
        y_MV = project_rows(x.reshape(-1, x.shape[-1]), self.embedding, scale)
        return y_MV.reshape(*rows, -1)


class Block(nn.Module):
    """Pre-LN: x += attn(ln_1(x)); x += mlp(ln_2(x))."""

    cfg: GPT2Config
    dtype: Any
    param_dtype: Any
    attention: str
    mesh: Mesh | None
    lora_pdrop: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None,
        layer: Any,  # int, or traced
        dropout_key: jax.Array | None,
        segment_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        keys = [None] * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        dtypes = self.dtype, self.param_dtype
        rest = (*dtypes, self.attention, self.mesh, self.lora_pdrop)
        norm = partial(layer_norm, self.cfg, *dtypes)
        a_BTD, kv = Attention(self.cfg, *rest, name="attn")(
            norm("ln_1")(x_BTD), cache, layer, keys[0], segment_BT
        )
        x_BTD += _held(dropout(a_BTD, self.cfg.resid_pdrop, keys[1]))
        mlp = MLP(self.cfg, *dtypes, self.lora_pdrop, name="mlp")
        m_BTD = mlp(norm("ln_2")(x_BTD), adapter_key(self, keys[2], 0))
        x_BTD += _held(dropout(m_BTD, self.cfg.resid_pdrop, keys[2]))
        return x_BTD, kv


class Attention(nn.Module):
    """Multi-head causal self-attention; c_attn gives q, k, v in this order."""

    cfg: GPT2Config
    dtype: Any
    param_dtype: Any
    attention: str
    mesh: Mesh | None
    lora_pdrop: float = 0.0

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None,
        layer: Any,  # int, or traced
        dropout_key: jax.Array | None,
        segment_BT: jax.Array | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        cfg = self.cfg
        heads = (cfg.n_head, cfg.head_dim)
        rest = (cfg.bias, self.dtype, self.param_dtype, self.lora_pdrop)
        std = cfg.initializer_range
        c_attn = Linear((cfg.n_embd,), (3, *heads), std, *rest, name="c_attn")
        qkv_BT3HK = c_attn(x_BTD, adapter_key(self, dropout_key, 0))
        q_BTHK, k, v = (x[:, :, 0] for x in jnp.split(qkv_BT3HK, 3, axis=2))
        scale = attention_scale(cfg, layer)
        if cache is not None:
            (k_BHKS,), (v_BHSK,) = cache.k_BHKS, cache.v_BHSK
            att_BTHK, k, v = cached_attention(
                q_BTHK,
                k,
                v,
                k_BHKS,
                v_BHSK,
                cache.length_B,
                scale=scale,
                start=cache.start,
            )
        else:
            att_BTHK = causal_attention(
                q_BTHK,
                k,
                v,
                scale=scale,
                dropout_rate=cfg.attn_pdrop,
                dropout_key=dropout_key,
                attention=self.attention,
                mesh=self.mesh,
                segment_BT=segment_BT,
            )
        std = residual_stddev(cfg)
        c_proj = Linear(heads, (cfg.n_embd,), std, *rest, name="c_proj")
        y_BTD = c_proj(att_BTHK, adapter_key(self, dropout_key, 1))
        return y_BTD, None if cache is None else (k, v)


class MLP(nn.Module):
    """D -> F, the activation (GPT-2's: GELU by tanh), F -> D."""

    cfg: GPT2Config
    dtype: Any
    param_dtype: Any
    lora_pdrop: float = 0.0

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        cfg = self.cfg
        d, f, rest = (
            (cfg.n_embd,),
            (cfg.mlp_dim,),
            (cfg.bias, self.dtype, self.param_dtype, self.lora_pdrop),
        )
        c_fc = Linear(d, f, cfg.initializer_range, *rest, name="c_fc")
        h_BTF = c_fc(x_BTD, adapter_key(self, dropout_key, 0))
        h_BTF = activate(h_BTF, cfg.activation_function)
        c_proj = Linear(f, d, residual_stddev(cfg), *rest, name="c_proj")
        return c_proj(h_BTF, adapter_key(self, dropout_key, 1))


def adapter_key(module: Any, dropout_key: jax.Array | None, i: int) -> jax.Array | None:
    """Of the dropout in the i-th adapter of a module; None where there is none."""
    return fold_in(dropout_key, i + 1) if module.lora_pdrop else None


class GPT2(nn.Module):
    """GPT-2: token ids -> float32 logits, with an explicit cache.

    `logits, cache = model.apply({"params": params}, tokens, cache)`.

    Attributes:
      cfg: the architecture.
      dtype: of the computation; scores, softmax, LayerNorm statistics and logits
        stay in float32.
      param_dtype: of the parameters.
      scan_layers: run the layers under one `lax.scan` when there is no cache: the
        compile time no longer grows with depth if the parameters are stacked, a step
        on CPU is 1.3x slower (benchmarks/). Parameters may be stacked or not.
      remat: what of a block is computed again for the gradient instead of being kept:
        "none"; "dots", all but the products with weights; "block", all. Results are
        the same, those of dropout included. On CPU it takes scan_layers or jax 0.11
        to save memory.
      attention: what computes it over whole sequences, one of attention.BACKENDS.
      mesh: over which batches are spread in training; None: one device, or left to
        XLA. It tells what XLA does not find by itself; shardings are those of the
        arguments (`gpt2_jax.sharding`).
      lora_pdrop: dropout of what goes into adapters, where there are some.
    """

    cfg: GPT2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan_layers: bool = False
    remat: str = "none"
    attention: str = "auto"
    mesh: Mesh | None = None
    lora_pdrop: float = 0.0

    def setup(self) -> None:
        cfg = self.cfg
        self.wte = TokenEmbedding(cfg, self.dtype, self.param_dtype, self.mesh)
        self.wpe = nn.Embed(
            cfg.n_positions,
            cfg.n_embd,
            self.dtype,
            self.param_dtype,
            embedding_init=nn.initializers.normal(cfg.initializer_range),
        )
        self.h = [self._block() for _ in range(cfg.n_layer)]
        self.ln_f = layer_norm(cfg, self.dtype, self.param_dtype)

    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        *,
        deterministic: bool = True,
        segment_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Logits [B, T, V] in float32, and the cache with the T tokens appended.

        Args:
          tokens_BT: int32 ids in [0, vocab_size); ids can't be checked inside jit,
            callers that take ids from a user check them first.
          cache: None for a whole sequence from position 0.
          deterministic: False applies dropout, with the rng stream "dropout".
          segment_BT: int32, where whole sequences hold several texts end to end: a
            token sees those of its own segment, a run of equal numbers, and positions
            count from where it begins. None: all is one. Of [B, T, 2] the second is
            another segment before it, which it goes on from.

        Raises:
          ValueError: when T exceeds n_positions or the size of the cache.
        """
        hidden_BTD, cache = self.hidden(
            tokens_BT, cache, deterministic=deterministic, segment_BT=segment_BT
        )
        return self.unembed(hidden_BTD), cache

    def hidden(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        *,
        deterministic: bool = True,
        segment_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """As `__call__`, but what comes out of ln_f, [B, T, D]."""
        cfg = self.cfg
        T = tokens_BT.shape[1]
        limit = cfg.n_positions if cache is None else cache.size
        if T > limit:
            what = "n_positions" if cache is None else "the cache size"
            raise ValueError(f"{T=} tokens exceed {what}={limit}")
        positions_BT = jnp.arange(T)[None]
        if segment_BT is not None:
            positions_BT = positions_within(segment_BT)
        if cache is not None:
            # A guess past the end of the context is computed and never used.
            positions_BT = positions_BT + cache.length_B[:, None]
            positions_BT = jnp.minimum(positions_BT, cfg.n_positions - 1)
        key = None if deterministic else self.make_rng("dropout")
        with jax.named_scope("embedding"):
            x_BTD = self.wte(tokens_BT) + self.wpe(positions_BT)
            x_BTD = constrain(x_BTD, self.mesh, BATCH)
            x_BTD = dropout(x_BTD, cfg.embd_pdrop, fold_in(key, cfg.n_layer))
        x_BTD, kvs = self._run_layers(x_BTD, cache, key, segment_BT)
        if cache is not None:
            k, v = zip(*kvs, strict=True)
            cache = KVCache(k, v, cache.length_B + T)
        return self.ln_f(x_BTD), cache

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] in float32 of hidden states [B, T, D]: head tied to wte."""
        return self.wte.attend(hidden_BTD)

    def _block(self, **kwargs: Any) -> Block:
        dtypes = self.dtype, self.param_dtype
        rest = (*dtypes, self.attention, self.mesh, self.lora_pdrop)
        return Block(self.cfg, *rest, **kwargs)

    @nn.nowrap
    def _run_layers(self, x_BTD, cache, key, segment_BT):
        """x after all layers, and of each the (k, v) that it leaves in the cache."""
        n_layer, kvs = self.cfg.n_layer, []
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            for i, block in enumerate(self.h):
                held = None if cache is None else cache.of_layer(i)
                x_BTD, kv = block(x_BTD, held, i, fold_in(key, i), segment_BT)
                kvs.append(kv)
            return x_BTD, kvs

        # The blocks as one function of their parameters, for JAX to scan or repeat.
        block = self._block(parent=None)

        def layer(x_BTD, params, i, cache, key, segment_BT):
            variables, key = {"params": params}, fold_in(key, i)
            return block.apply(variables, x_BTD, cache, i, key, segment_BT)

        apply: Callable[..., Any] = layer
        scan = self.scan_layers and cache is None
        if self.remat != "none" and cache is None:
            # In a scan nothing could take the second computation for the first.
            policy = remat_policy(self.remat)
            apply = jax.checkpoint(apply, policy=policy, prevent_cse=not scan)
        params = self.variables["params"]
        if scan:

            def step(x_BTD, params_and_i):
                return apply(x_BTD, *params_and_i, None, key, segment_BT)

            layers = stack_layers(params)[STACKED], jnp.arange(n_layer)
            with jax.named_scope(STACKED):
                return jax.lax.scan(step, x_BTD, layers)
        if isinstance(x_BTD, jax.core.Tracer):
            apply = jax.jit(apply)  # which is traced once for all layers
        for i in range(n_layer):
            held = None if cache is None else cache.of_layer(i)
            with jax.named_scope(f"{LAYER}{i}"):
                x_BTD, kv = apply(
                    x_BTD, params[f"{LAYER}{i}"], i, held, key, segment_BT
                )
            kvs.append(kv)
        return x_BTD, kvs


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


def attention_of(model: GPT2, B: int, T: int, *, deterministic: bool) -> str:
    """What computes its attention over B sequences of T tokens, without a cache.

    Raises:
      ValueError: when what it asks for cannot.
    """
    cfg = model.cfg
    return attention_backend(
        model.attention,
        (B, T, cfg.n_head, cfg.head_dim),
        model.dtype,
        dropout=cfg.attn_pdrop > 0 and not deterministic,
        mesh=model.mesh,
    )


def attention_scale(cfg: GPT2Config, layer: Any) -> Any:
    """Of the scores in a layer: GPT-2's is 1 / sqrt(head_dim)."""
    scale = cfg.head_dim**-0.5 if cfg.scale_attn_weights else 1.0
    return scale / (layer + 1) if cfg.scale_attn_by_inverse_layer_idx else scale


@partial(jax.jit, static_argnames="model")
def attention_weights(
    model: GPT2, params: Params, tokens_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, T, V] and attention [N, B, H, T, T] of whole sequences, in float32.

    What `c_attn` gives is captured as the model runs, and scores and softmax are
    computed from it once more: no backend of attention keeps them. Row t of a head says
    how much position t takes from each position up to its own.

    Raises:
      ValueError: when T exceeds n_positions.
    """
    layers = model.clone(scan_layers=False, remat="none")
    (logits_BTV, _), kept = layers.apply(
        {"params": params},
        tokens_BT,
        capture_intermediates=lambda module, _: module.name == "c_attn",
        mutable=["intermediates"],
    )
    blocks, weights = kept["intermediates"], []
    for i in range(model.cfg.n_layer):
        (qkv_BT3HK,) = blocks[f"{LAYER}{i}"]["attn"]["c_attn"]["__call__"]
        q_BTHK, k_BTHK = qkv_BT3HK[:, :, 0], qkv_BT3HK[:, :, 1]
        scale = attention_scale(model.cfg, i)
        weights.append(causal_weights(q_BTHK, k_BTHK, scale=scale))
    return logits_BTV, jnp.stack(weights)


def layer_norm(cfg: GPT2Config, dtype, param_dtype, name=None) -> "LayerNorm":
    return LayerNorm(cfg.layer_norm_epsilon, cfg.bias, dtype, param_dtype, name=name)


def residual_stddev(cfg: GPT2Config) -> float:
    """Init of both c_proj kernels: the residual stream sums 2 * n_layer of them."""
    return cfg.initializer_range / math.sqrt(2 * cfg.n_layer)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x and scales the rest; key None: the identity."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def init(model: GPT2, key: jax.Array, *, stacked: bool = False) -> Params:
    """Fresh parameters: N(0, 0.02), c_proj by depth, biases 0, LayerNorm 1 and 0.

    There is one entry a layer, or all are `stacked`. They are drawn by one vmapped
    program, so that its compile time, most of which goes into random normals, does
    not grow with depth.
    """
    cfg = model.cfg
    top_key, layers_key = jax.random.split(key)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = model.init(
        top_key, tokens, method=lambda m, ids: m.ln_f(m.wte(ids) + m.wpe(ids))
    )["params"]
    block = Block(cfg, model.dtype, model.param_dtype, "xla", None)
    inputs = (jnp.zeros((1, 1, cfg.n_embd)), None, 0, None)
    layers = jax.vmap(lambda k: block.init(k, *inputs)["params"])(
        jax.random.split(layers_key, cfg.n_layer)
    )
    params[STACKED] = layers
    return params if stacked else unstack_layers(params)


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


def abstract_params(cfg: GPT2Config) -> Params:
    """Shapes and dtypes of the float32 parameters, nothing allocated."""
    return jax.eval_shape(lambda: init(GPT2(cfg), jax.random.key(0)))


def count_params(params: Params) -> int:
    """Number of parameters; abstract leaves will do."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
