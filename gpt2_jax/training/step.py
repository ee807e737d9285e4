"""TrainState, loss, train and eval step: pure functions."""

import os
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.layout import Params, stack_layers
from gpt2_jax.lora import LoraConfig, init_adapters, with_adapters
from gpt2_jax.model import GPT2, init
from gpt2_jax.ops.attention import attention_backend
from gpt2_jax.ops.losses import summed_cross_entropy
from gpt2_jax.runtime import sharding
from gpt2_jax.runtime.xla_flags import step_options
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.optim import Optimizer, guard_counts


@flax.struct.dataclass
class TrainState:
    step: jax.Array  # int32: updates done
    params: Params  # or adapters; stacked if the model scans its layers
    opt_state: Any


def summed_loss(
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array | None,
    *,
    model: GPT2,
    n_valid: int | None = None,
    dropout_key: jax.Array | None = None,
    segment_BT: jax.Array | None = None,
) -> jax.Array:
    """Sum over the targets that count of their cross-entropy in nats.

    Args:
      tokens_BT: [B, T + 1], inputs and targets overlapping.
      mask_BT: bool [B, T], which targets count; None: all.
      n_valid: ids from here on pad the vocabulary; None: none does.
      dropout_key: None for no dropout.
      segment_BT: of the inputs, see `model.GPT2`.
    """
    hidden_BTD, _ = model.apply(
        {"params": params},
        tokens_BT[:, :-1],
        deterministic=dropout_key is None,
        segment_BT=segment_BT,
        rngs=None if dropout_key is None else {"dropout": dropout_key},
        method="hidden",
    )
    with jax.named_scope("loss"):
        return summed_cross_entropy(
            hidden_BTD,
            params["wte"]["embedding"],
            tokens_BT[:, 1:],
            mask_BT,
            scale_V=params["wte"].get("scale"),
            n_valid=n_valid,
            mesh=model.mesh,
        )


def gradients(
    params: Params,
    tokens_ABT: jax.Array,
    mask_ABT: jax.Array | None,
    segment_ABT: jax.Array | None = None,
    base: Params | None = None,
    *,
    model: GPT2,
    n_valid: int | None = None,
    dropout_key: jax.Array | None = None,
    lora: LoraConfig | None = None,
) -> tuple[jax.Array, Params]:
    """Mean loss over all targets of A microbatches, and its gradient.

    The mean is over the targets of the whole batch, so A has no part in it.

    Args:
      tokens_ABT: [A, B, T + 1]; the microbatches are gone through by a scan.
      mask_ABT: bool [A, B, T], or None.
      segment_ABT: int32 [A, B, T], or None.
      base: with `lora`, the parameters that `params` are adapters of. They have no
        gradient.
    """
    A, B, T1 = tokens_ABT.shape
    count = B * A * (T1 - 1) if mask_ABT is None else mask_ABT.sum()
    scale = 1 / jnp.maximum(count, 1).astype(jnp.float32)

    def micro(batch, i):
        tokens_BT, mask_BT, segment_BT = batch
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
        loss = partial(summed_loss, model=model, n_valid=n_valid, dropout_key=key)
        loss = partial(loss, segment_BT=segment_BT)

        def scaled(params):
            if lora is not None:
                params = with_adapters(base or {}, params, lora)
            return scale * loss(params, tokens_BT, mask_BT)

        return jax.value_and_grad(scaled)(params)

    batches = (tokens_ABT, mask_ABT, segment_ABT)
    if A == 1:
        return micro(jax.tree.map(lambda x: x[0], batches), 0)

    def add(total, xs):
        return jax.tree.map(jnp.add, total, micro(*xs)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zeros, (batches, jnp.arange(A)))[0]


def train_step(
    state: TrainState,
    tokens_ABT: jax.Array,
    mask_ABT: jax.Array | None = None,
    segment_ABT: jax.Array | None = None,
    base: Params | None = None,
    *,
    model: GPT2,
    optimizer: Optimizer,
    seed: int,
    n_valid: int | None = None,
    lora: LoraConfig | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, or none where loss or gradient are bad (see `optim.clip_and_guard`).

    Returns:
      The state, and the metrics `loss` (before the update), `grad_norm` (before
      clipping), `skipped` and `skipped_in_row` (updates).
    """
    cfg = model.cfg
    rates = (cfg.embd_pdrop, cfg.attn_pdrop, cfg.resid_pdrop, model.lora_pdrop)
    has_dropout = max(rates) > 0
    key = jax.random.fold_in(jax.random.key(seed), state.step) if has_dropout else None
    loss, grads = gradients(
        state.params,
        tokens_ABT,
        mask_ABT,
        segment_ABT,
        base,
        model=model,
        n_valid=n_valid,
        dropout_key=key,
        lora=lora,
    )
    with jax.named_scope("optimizer"):
        params, opt_state, norm = optimizer.apply(
            grads, state.opt_state, state.params, loss
        )
    metrics = {"loss": loss, "grad_norm": norm, **guard_counts(opt_state)}
    return TrainState(state.step + 1, params, opt_state), metrics


def eval_step(
    params: Params,
    tokens_BT: jax.Array,
    mask_BT: jax.Array,
    segment_BT: jax.Array | None = None,
    *,
    model: GPT2,
    n_valid: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed loss over the targets in the mask, and their number."""
    loss = partial(summed_loss, model=model, n_valid=n_valid, segment_BT=segment_BT)
    return loss(params, tokens_BT, mask_BT), mask_BT.sum()


def abstract_state(
    model: GPT2, optimizer: Optimizer, mesh: Mesh, lora: LoraConfig | None = None
) -> TrainState:
    """Shapes, dtypes and shardings of a state, nothing allocated."""
    shapes = jax.eval_shape(lambda: _init_state(model, optimizer, lora, 0))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def init_state(
    model: GPT2,
    optimizer: Optimizer,
    mesh: Mesh,
    seed: int,
    lora: LoraConfig | None = None,
) -> TrainState:
    """A fresh state, each shard made where it lives; with `lora` that of adapters."""
    make = jax.jit(partial(_init_state, model, optimizer, lora))  # traced once
    number = np.uint32(seed)  # a Python integer would have to be below 2**31
    shardings = sharding.tree_shardings(jax.eval_shape(make, number), mesh)
    return jax.jit(make, out_shardings=shardings)(number)


def state_of(
    params: Params, model: GPT2, optimizer: Optimizer, mesh: Mesh
) -> TrainState:
    """A state that begins with params that lie on the mesh, an entry a layer."""
    shardings = _shardings(model, optimizer, mesh)
    if model.scan_layers:
        params = jax.jit(stack_layers, out_shardings=shardings.params)(params)
    make = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=shardings.step)
    return TrainState(step(), params, make(params))


def stack_state(
    state: TrainState,
    model: GPT2,
    optimizer: Optimizer,
    mesh: Mesh,
    lora: LoraConfig | None = None,
) -> TrainState:
    """The state of a model whose layers are scanned, of one with an entry a layer."""
    shardings = _shardings(model, optimizer, mesh, lora)
    return jax.jit(stack_layers, out_shardings=shardings)(state)


def _shardings(model, optimizer, mesh, lora=None):
    abstract = abstract_state(model, optimizer, mesh, lora)
    return jax.tree.map(lambda x: x.sharding, abstract)


def _init_state(model, optimizer, lora, seed):
    key = jax.random.key(seed)
    if lora is None:
        params = init(model, key, stacked=model.scan_layers)
    else:
        params = init_adapters(lora, model.cfg, key, stacked=model.scan_layers)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


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


def jit_step(
    cfg: TrainConfig,
    model: GPT2,
    optimizer: Optimizer,
    state: TrainState,
    mesh: Mesh,
    n_valid: int,
) -> Any:
    """The train step, jitted: (state, *batch) -> (state, metrics); donates the state.

    Args:
      state: for its shardings, which stay what they are; abstract leaves will do.
      n_valid: the size of the vocabulary without its padding.
    """
    return jax.jit(
        partial(
            train_step,
            model=model,
            optimizer=optimizer,
            seed=cfg.seed,
            n_valid=n_valid,
            lora=cfg.adapters,
        ),
        donate_argnums=0,
        compiler_options=step_options(os.environ),
        out_shardings=(
            jax.tree.map(lambda x: x.sharding, state),
            sharding.replicated(mesh),
        ),
    )
