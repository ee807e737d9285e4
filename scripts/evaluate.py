"""Prints loss and perplexity of a run's checkpoint over a whole split.

python scripts/evaluate.py --workdir=runs/quickstart --split=test
"""

from absl import flags

from gpt2_jax import cli
from gpt2_jax.evaluate import evaluate_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.", required=True)
_STEP = flags.DEFINE_string("step", None, "Of a run: number or best; none: latest.")
_SPLIT = flags.DEFINE_string("split", "test", "train, validation or test.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Examples at a time.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32, bfloat16 or int8.")


def main(_: list[str]) -> None:
    result, protocol = evaluate_run(
        _WORKDIR.value,
        _SPLIT.value,
        step=_STEP.value,
        batch_size=_BATCH_SIZE.value,
        dtype=_DTYPE.value,
    )
    print(
        f"{_SPLIT.value} loss {result.loss:.4f} perplexity {result.perplexity:.4f} "
        f"over {result.tokens} tokens ({protocol})"
    )


if __name__ == "__main__":
    cli.run(main)
