"""Says whether this installation's numbers are right, on whatever device it has.

python scripts/verify.py

Recomputes, in float32 and bfloat16, the logits and ten updates that
tests/make_goldens.py took from transformers on torch in float32.
"""

from gpt2_jax.commands.door import run  # first: what Ctrl-C does from here on

# isort: split
from pathlib import Path

import jax

from gpt2_jax.commands.verify import differences

GOLDENS = Path(__file__).resolve().parents[1] / "tests/goldens/gpt2_tiny.npz"
# Largest differences allowed, of logits that reach 2.5: float32 sums in another order,
# and bfloat16's 8 bits (0.01 there, a few times over in two layers).
LIMITS = {"float32": 1e-5, "bfloat16": 1e-1}


def main(_: list[str]) -> int:
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.platform}: {device.device_kind}")
    print(f"{'compute':10} {'what':22} {'difference':>10} {'limit':>8}")
    wrong = 0
    for dtype, limit in LIMITS.items():
        # TPUs and GPUs round the factors of float32 products unless asked not to.
        with jax.default_matmul_precision("highest"):
            found = differences(GOLDENS, dtype)
        for what, difference in found.items():
            verdict = "right" if difference <= limit else "WRONG"
            wrong += verdict == "WRONG"
            print(f"{dtype:10} {what:22} {difference:10.1e} {limit:8.0e} {verdict}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
