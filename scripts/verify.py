"""Says whether this installation's numbers are right, on whatever device it has.

python scripts/verify.py

Recomputes, in float32 and bfloat16, the logits and ten updates that
scripts/make_goldens.py took from transformers on torch in float32.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax import GPT2, GPT2Config, cli
from gpt2_jax.interop.hf import our_path
from gpt2_jax.interop.params import load_params
from gpt2_jax.interop.tensors import Tensor
from gpt2_jax.optim import OptimConfig, make_optimizer
from gpt2_jax.train_step import TrainState, train_step

GOLDENS = Path(__file__).resolve().parents[1] / "tests/goldens/gpt2_tiny.npz"
# Largest differences allowed, of logits that reach 2.5: float32 sums in another order,
# and bfloat16's 8 bits (0.01 there, a few times over in two layers).
LIMITS = {"float32": 1e-5, "bfloat16": 1e-1}


def differences(dtype: str) -> dict[str, float]:
    """Largest absolute difference of the logits and of ten losses."""
    with np.load(GOLDENS) as file:
        golden = dict(file)
    tensors = {
        our_path(name.removeprefix("weights/"), GOLDENS): Tensor.of(x)
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
    params = load_params(cfg, tensors, dtype=jnp.float32, where=GOLDENS)
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


def main(_: list[str]) -> int:
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.platform}: {device.device_kind}")
    print(f"{'compute':10} {'what':22} {'difference':>10} {'limit':>8}")
    wrong = 0
    for dtype, limit in LIMITS.items():
        # TPUs and GPUs round the factors of float32 products unless asked not to.
        with jax.default_matmul_precision("highest"):
            found = differences(dtype)
        for what, difference in found.items():
            verdict = "right" if difference <= limit else "WRONG"
            wrong += verdict == "WRONG"
            print(f"{dtype:10} {what:22} {difference:10.1e} {limit:8.0e} {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    cli.run(main)
