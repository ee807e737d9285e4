"""Prints what a model is worth, each figure with its protocol.

python scripts/evaluate.py --workdir=runs/quickstart --split=test
python scripts/evaluate.py --model=MODEL --task=TASK --path=FILE --out=result.json

The first gives loss and perplexity of a run over a whole split of its data. MODEL is
whatever gpt2_jax.load takes; tasks and their files are in docs/evaluation.md.
"""

from gpt2_jax.commands.door import run  # first: what Ctrl-C does from here on

# isort: split
from absl import flags

from gpt2_jax.decoding.detokenize import DETOKENIZERS
from gpt2_jax.evaluation.task_runs import evaluate_task
from gpt2_jax.evaluation.tasks import TARGETS, TASKS, Options
from gpt2_jax.training.evaluate import evaluate_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
_SPLIT = flags.DEFINE_string("split", "test", "train, validation or test.")
_MODEL = flags.DEFINE_string("model", None, "Whatever gpt2_jax.load takes.")
_TASK = flags.DEFINE_string("task", None, f"{', '.join(TASKS)}.")
_PATH = flags.DEFINE_string("path", None, "The task's file.")
_STEP = flags.DEFINE_string("step", None, "Of a run: number or best; none: latest.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Rows or windows.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32, bfloat16 or int8.")
_STRIDE = flags.DEFINE_integer("stride", None, "Of windows; none: half the context.")
_DETOKENIZER = flags.DEFINE_string("detokenizer", None, f"{', '.join(DETOKENIZERS)}.")
_TARGET = flags.DEFINE_string("target", None, f"Of lambada: {' or '.join(TARGETS)}.")
_OUT = flags.DEFINE_string("out", None, "A .json file; the same command goes on.")


def main(_: list[str]) -> None:
    step, dtype, size = _STEP.value, _DTYPE.value, _BATCH_SIZE.value
    model, task, path, workdir = _MODEL.value, _TASK.value, _PATH.value, _WORKDIR.value
    if workdir is not None and model is None and task is None:
        size = 16 if size is None else size
        result, protocol = evaluate_run(
            workdir, _SPLIT.value, step=step, batch_size=size, dtype=dtype
        )
        print(
            f"{_SPLIT.value} loss {result.loss:.4f} perplexity {result.perplexity:.4f} "
            f"over {result.tokens} tokens ({protocol})"
        )
        return
    if workdir is not None or model is None or task is None or path is None:
        raise ValueError("give --workdir alone, or --model, --task and --path")
    options = Options(_STRIDE.value, _DETOKENIZER.value, _TARGET.value)
    figures = evaluate_task(
        model, task, path, options, step=step, dtype=dtype, batch_size=size,
        out=_OUT.value,
    )  # fmt: skip
    for name, (value, protocol) in figures.items():
        print(f"{task} {name} {value:.4f} ({protocol})")


if __name__ == "__main__":
    run(main)
