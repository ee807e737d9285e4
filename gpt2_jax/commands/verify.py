"""This installation's numbers beside those of transformers on torch."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.formats.names import our_path
from gpt2_jax.formats.params import load_params
from gpt2_jax.formats.tensors import Tensor
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2
from gpt2_jax.training.optim import OptimConfig, make_optimizer
from gpt2_jax.training.step import TrainState, train_step

# Of tests/make_goldens.py, whose file has what transformers on torch made with them.
CFG = GPT2Config(
    vocab_size=61,
    n_positions=32,
    n_embd=16,
    n_layer=2,
    n_head=2,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)
OPTIM = OptimConfig(
    name="adamw",
    learning_rate=1e-2,
    muon_learning_rate=0.0,
    schedule="cosine",
    min_learning_rate=1e-3,
    warmup_steps=3,
    decay_steps=0,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    state_dtype="float32",
    ema_decay=0.0,
    max_skipped=0,
    max_loss_z=0.0,
    lr_scales=(),
)


def weights(golden: Mapping[str, np.ndarray], where: object) -> Params:
    """The model's parameters in float32; errors name `where`."""
    tensors = {
        our_path(name.removeprefix("weights/"), where): Tensor.of(x)
        for name, x in golden.items()
        if name.startswith("weights/")
    }
    return load_params(CFG, tensors, dtype=jnp.float32, where=where)


def differences(goldens: Path, dtype: str) -> dict[str, float]:
    """Largest absolute difference of the logits, and of the losses of ten updates.

    Args:
      goldens: the file of tests/make_goldens.py.
      dtype: of the computation here, float32 or bfloat16; theirs was float32.
    """
    with np.load(goldens) as file:
        golden = dict(file)
    model = GPT2(CFG, dtype=jnp.dtype(dtype))
    params = weights(golden, goldens)
    logits, _ = jax.jit(model.apply)({"params": params}, golden["tokens"])
    optimizer = make_optimizer(OPTIM, 10)
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    step = jax.jit(
        lambda s, t: train_step(s, t, model=model, optimizer=optimizer, seed=0)
    )
    losses = []
    for tokens in golden["batches"]:
        state, metrics = step(state, jnp.asarray(tokens, jnp.int32)[None])
        losses.append(float(metrics["loss"]))
    return {
        "logits": float(np.abs(logits - golden["logits"]).max()),
        "losses of 10 updates": float(np.abs(losses - golden["losses"]).max()),
    }
