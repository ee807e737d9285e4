"""GPT-2: token ids to logits.

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

To decode (see `gpt2_jax.decoding.weights`), a `weight` [*out, *in] may stand for a
kernel [*in, *out]. Weights and wte may be int8, with a flat float32 `scale` of their
output channels beside.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax.cache import KVCache
from gpt2_jax.config import GPT2Config
from gpt2_jax.layers import (
    Linear,
    TokenEmbedding,
    adapter_key,
    dropout,
    fold_in,
    layer_norm,
    positions_within,
    remat_policy,
)
from gpt2_jax.layout import LAYER, STACKED, Params, stack_layers, unstack_layers
from gpt2_jax.ops.activation import activate
from gpt2_jax.ops.attention import (
    attention_backend,
    cached_attention,
    causal_attention,
    causal_weights,
)
from gpt2_jax.ops.materialize import materialize
from gpt2_jax.runtime.sharding import BATCH, constrain


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
        x_BTD += materialize(dropout(a_BTD, self.cfg.resid_pdrop, keys[1]))
        mlp = MLP(self.cfg, *dtypes, self.lora_pdrop, name="mlp")
        m_BTD = mlp(norm("ln_2")(x_BTD), adapter_key(self, keys[2], 0))
        x_BTD += materialize(dropout(m_BTD, self.cfg.resid_pdrop, keys[2]))
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
        arguments (`gpt2_jax.runtime.sharding`).
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


def residual_stddev(cfg: GPT2Config) -> float:
    """Init of both c_proj kernels: the residual stream sums 2 * n_layer of them."""
    return cfg.initializer_range / math.sqrt(2 * cfg.n_layer)


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


def abstract_params(cfg: GPT2Config) -> Params:
    """Shapes and dtypes of the float32 parameters, nothing allocated."""
    return jax.eval_shape(lambda: init(GPT2(cfg), jax.random.key(0)))
