"""GPT-2: token ids to logits.

Axes, carried by the names of arrays:
B batch, T query, S cached keys, H heads, K head_dim, D embed, F mlp, V vocab,
N layers.

Data flow from `GPT2` through `Block`, `Attention` and `MLP`. What these are made of is
in layers.py, how a platform computes it in ops/, and the table of parameters in
layout.py.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax.cache import KV, KVCache
from gpt2_jax.config import GPT2Config
from gpt2_jax.layers import (
    Compute,
    Linear,
    TokenEmbedding,
    adapter_key,
    dropout,
    fold_in,
    layer_norm,
    positions,
    run_layers,
)
from gpt2_jax.layout import STACKED, Params, unstack_layers
from gpt2_jax.ops.activation import activate
from gpt2_jax.ops.attention import cached_attention, causal_attention
from gpt2_jax.ops.materialize import materialize
from gpt2_jax.runtime.sharding import BATCH, constrain


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

    @property
    def compute(self) -> Compute:
        return Compute(
            self.dtype, self.param_dtype, self.attention, self.mesh, self.lora_pdrop
        )

    def setup(self) -> None:
        cfg = self.cfg
        self.wte = TokenEmbedding(cfg, self.compute)
        self.wpe = nn.Embed(
            cfg.n_positions,
            cfg.n_embd,
            self.dtype,
            self.param_dtype,
            embedding_init=nn.initializers.normal(cfg.initializer_range),
        )
        self.h = [Block(cfg, self.compute) for _ in range(cfg.n_layer)]
        self.ln_f = layer_norm(cfg, self.compute)

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
        positions_BT = positions(T, cache, segment_BT, cfg.n_positions)
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

    @nn.nowrap
    def _run_layers(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None,
        key: jax.Array | None,
        segment_BT: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        """x after all layers, and for each the keys and values of its tokens."""
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            kvs = []
            for i, block in enumerate(self.h):
                held = None if cache is None else cache.of_layer(i)
                x_BTD, kv = block(x_BTD, held, i, fold_in(key, i), segment_BT)
                kvs.append(kv)
            return x_BTD, kvs
        block = Block(self.cfg, self.compute, parent=None)

        def layer(x_BTD, params, i, cache, key, segment_BT):
            variables, key = {"params": params}, fold_in(key, i)
            return block.apply(variables, x_BTD, cache, i, key, segment_BT)

        return run_layers(
            layer,
            x_BTD,
            self.variables["params"],
            cache,
            (key, segment_BT),
            n_layer=self.cfg.n_layer,
            scan=self.scan_layers,
            remat=self.remat,
        )


class Block(nn.Module):
    """Pre-LN: x += attn(ln_1(x)); x += mlp(ln_2(x))."""

    cfg: GPT2Config
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None,
        layer: Any,  # int, or traced
        dropout_key: jax.Array | None,
        segment_BT: jax.Array | None = None,
    ) -> tuple[jax.Array, KV | None]:
        cfg, compute = self.cfg, self.compute
        keys = [None] * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        norm = partial(layer_norm, cfg, compute)
        a_BTD, kv = Attention(cfg, compute, name="attn")(
            norm("ln_1")(x_BTD), cache, layer, keys[0], segment_BT
        )
        x_BTD += materialize(dropout(a_BTD, cfg.resid_pdrop, keys[1]))
        m_BTD = MLP(cfg, compute, name="mlp")(
            norm("ln_2")(x_BTD), adapter_key(compute, keys[2], 0)
        )
        x_BTD += materialize(dropout(m_BTD, cfg.resid_pdrop, keys[2]))
        return x_BTD, kv


class Attention(nn.Module):
    """Multi-head causal self-attention; c_attn gives q, k, v in this order."""

    cfg: GPT2Config
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None,
        layer: Any,  # int, or traced
        dropout_key: jax.Array | None,
        segment_BT: jax.Array | None,
    ) -> tuple[jax.Array, KV | None]:
        cfg, compute = self.cfg, self.compute
        linear = partial(Linear, use_bias=cfg.bias, compute=compute)
        d, heads = (cfg.n_embd,), (cfg.n_head, cfg.head_dim)
        c_attn = linear(d, (3, *heads), cfg.initializer_range, name="c_attn")
        qkv_BT3HK = c_attn(x_BTD, adapter_key(compute, dropout_key, 0))
        q_BTHK, k, v = (x[:, :, 0] for x in jnp.split(qkv_BT3HK, 3, axis=2))
        scale = cfg.attention_scale(layer)
        if cache is not None:
            (k_BHKS,), (v_BHSK,) = cache.k_BHKS, cache.v_BHSK
            att_BTHK, k, v = cached_attention(
                *(q_BTHK, k, v, k_BHKS, v_BHSK, cache.length_B),
                scale=scale,
                start=cache.start,
            )
        else:
            att_BTHK = causal_attention(
                *(q_BTHK, k, v),
                scale=scale,
                dropout_rate=cfg.attn_pdrop,
                dropout_key=dropout_key,
                attention=compute.attention,
                mesh=compute.mesh,
                segment_BT=segment_BT,
            )
        c_proj = linear(heads, d, cfg.residual_stddev, name="c_proj")
        y_BTD = c_proj(att_BTHK, adapter_key(compute, dropout_key, 1))
        return y_BTD, None if cache is None else (k, v)


class MLP(nn.Module):
    """D -> F, the activation (GPT-2's: GELU by tanh), F -> D."""

    cfg: GPT2Config
    compute: Compute

    @nn.compact
    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        cfg, compute = self.cfg, self.compute
        linear = partial(Linear, use_bias=cfg.bias, compute=compute)
        d, f = (cfg.n_embd,), (cfg.mlp_dim,)
        c_fc = linear(d, f, cfg.initializer_range, name="c_fc")
        h_BTF = c_fc(x_BTD, adapter_key(compute, key, 0))
        h_BTF = activate(h_BTF, cfg.activation_function)
        c_proj = linear(f, d, cfg.residual_stddev, name="c_proj")
        return c_proj(h_BTF, adapter_key(compute, key, 1))


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
    block = Block(cfg, Compute(model.dtype, model.param_dtype, "xla"))
    inputs = (jnp.zeros((1, 1, cfg.n_embd)), None, 0, None)
    layers = jax.vmap(lambda k: block.init(k, *inputs)["params"])(
        jax.random.split(layers_key, cfg.n_layer)
    )
    params[STACKED] = layers
    return params if stacked else unstack_layers(params)


def abstract_params(cfg: GPT2Config) -> Params:
    """Shapes and dtypes of the float32 parameters, nothing allocated."""
    return jax.eval_shape(lambda: init(GPT2(cfg), jax.random.key(0)))
