"""This installation's numbers beside those of transformers on torch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.hf import our_path
from gpt2_jax.interop.params import load_params
from gpt2_jax.interop.tensors import Tensor
from gpt2_jax.model import GPT2
from gpt2_jax.optim import OptimConfig, make_optimizer
from gpt2_jax.train_step import TrainState, train_step


def differences(goldens: Path, dtype: str) -> dict[str, float]:
    """Largest absolute difference of the logits, and of the losses of ten updates.

    Args:
      goldens: the file of tests/make_goldens.py.
      dtype: of the computation here, float32 or bfloat16; theirs was float32.
    """
    with np.load(goldens) as file:
        golden = dict(file)
    tensors = {
        our_path(name.removeprefix("weights/"), goldens): Tensor.of(x)
        for name, x in golden.items()
        if name.startswith("weights/")
    }
    cfg = GPT2Config(
        vocab_size=61,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = GPT2(cfg, dtype=jnp.dtype(dtype))
    params = load_params(cfg, tensors, dtype=jnp.float32, where=goldens)
    logits, _ = jax.jit(model.apply)({"params": params}, golden["tokens"])
    optimizer = make_optimizer(
        OptimConfig(1e-2, 1e-3, 3, 0.9, 0.95, 1e-8, 0.1, 1.0), 10
    )
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
