"""What beginning with a trained model is worth: fine-tuned, adapted, and from scratch.

python benchmarks/finetune.py --text=tinyshakespeare.txt
python benchmarks/finetune.py --text=tinyshakespeare.txt --steps=400 --seeds=0,1,2

A small model is trained on the text that Python itself carries, then on --text: all of
it, and by adapters. Beside it a fresh one is trained on --text for as many steps. Each
line is a seed, with the validation loss before the first step and after the last, over
1,000 windows; the exit status is 1 where one that was trained before does not end below
the fresh one. Tokens are bytes.
"""

import runpy
import tempfile
from pathlib import Path

from absl import app, flags, logging

from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.records import read_metrics
from gpt2_jax.training.train import train

DEFAULT = Path(__file__).resolve().parents[1] / "configs/default.py"
_TEXT = flags.DEFINE_string("text", None, "The second corpus.", required=True)
_BASE_STEPS = flags.DEFINE_integer("base_steps", 600, "On the first.", lower_bound=20)
_STEPS = flags.DEFINE_integer("steps", 200, "On the second.", lower_bound=20)
_SEEDS = flags.DEFINE_list("seeds", "0,1,2", "A row of the table for each.")
_RANK = flags.DEFINE_integer("rank", 8, "Of the adapters.", lower_bound=1)

WAYS = {
    "from scratch": {},
    "fine-tuned": {"optim.learning_rate": 1e-3, "optim.min_learning_rate": 1e-4},
    "adapted": {"optim.learning_rate": 5e-3, "optim.min_learning_rate": 5e-4},
}


def losses(
    workdir: Path, seed: int, steps: int, **values: object
) -> tuple[float, float]:
    """The validation loss of a run before its first step and after its last."""
    c = runpy.run_path(str(DEFAULT))["get_config"]()
    c.update_from_flattened_dict(
        {
            **{"seed": seed, "steps": steps, "batch_size": 16, "block_size": 64},
            **{"model.n_embd": 64, "data.tokenizer": "bytes", "data.vocab_size": 0},
            **{"data.splits": (0.9, 0.1, 0.0), "optim.warmup_steps": 20},
            **{"optim.learning_rate": 2e-3, "optim.min_learning_rate": 2e-4},
            **{"eval.every": steps, "eval.examples": 1000, "checkpoint.every": steps},
            **values,
        }
    )
    train(TrainConfig.from_dict(c.to_dict()), workdir)
    records = read_metrics(workdir / "metrics.jsonl")
    found = [r["val_loss"] for r in records if "val_loss" in r]
    return found[0], found[-1]


def main(_: list[str]) -> int:
    logging.set_verbosity(logging.WARNING)  # Orbax says much
    rows = []
    for seed in map(int, _SEEDS.value):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _, base = losses(folder / "base", seed, _BASE_STEPS.value)
            found = {}
            for way, rates in WAYS.items():
                values: dict[str, object] = {**rates, "data.path": _TEXT.value}
                if rates:
                    values["init_from"] = str(folder / "base")
                if way == "adapted":
                    values |= {
                        "lora.rank": _RANK.value,
                        "lora.alpha": 2.0 * _RANK.value,
                    }
                found[way] = losses(folder / way, seed, _STEPS.value, **values)
        rows.append((seed, base, found))
    print(f"{'seed':>4} {'base':>7}" + "".join(f"{way:>20}" for way in WAYS))
    for seed, base, found in rows:
        cells = (f"{first:.4f} -> {last:.4f}" for first, last in found.values())
        print(f"{seed:4} {base:7.4f}" + "".join(f"{cell:>20}" for cell in cells))
    worse = [
        (seed, way)
        for seed, _, found in rows
        for way in ("fine-tuned", "adapted")
        if found[way][1] >= found["from scratch"][1]
    ]
    for seed, way in worse:
        print(f"seed {seed}: {way} does not end below training from scratch")
    return 1 if worse else 0


if __name__ == "__main__":
    app.run(main)
