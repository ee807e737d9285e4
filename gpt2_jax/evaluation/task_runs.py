"""Evaluations of tasks: run over all devices, kept as they come, gone on with.

A file of results holds a line for each example, so that an evaluation that was killed
goes on where it was.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from gpt2_jax.checks import check_choice, integer, shown
from gpt2_jax.data.stored import read_lines
from gpt2_jax.decoding.score import Row, Score
from gpt2_jax.evaluation.tasks import (
    DEFAULT,
    TASKS,
    Example,
    Figure,
    Options,
    Prepared,
    RowScores,
    prepare,
)
from gpt2_jax.fields import check_range
from gpt2_jax.lm import LanguageModel, load
from gpt2_jax.runtime.files import parse_json, user_path
from gpt2_jax.runtime.sharding import make_mesh


def evaluate_task(
    model: str,
    task: str,
    path: str,
    options: Options = DEFAULT,
    *,
    step: int | str | None = None,
    dtype: str = "float32",
    batch_size: int | None = None,
    out: str | Path | None = None,
) -> dict[str, Figure]:
    """The figures of a task, computed over all devices.

    Args:
      model, step, dtype: as of `gpt2_jax.load`.
      path: of the task's files.
      batch_size: windows at a time; None: as many as suit the device.
      out: a `.json` file for the figures. What each example gave is appended to the
        `.jsonl` beside it as it comes, and the same command goes on from there.

    Raises:
      ValueError, OSError: as `prepare` and `load`; and where the `.jsonl` is of another
        evaluation.
    """
    out = None if out is None else user_path(out)
    if out is not None and out.suffix != ".json":
        raise ValueError(f"out={str(out)!r} must end in .json")
    if batch_size is not None:
        check_range("batch_size", integer("batch_size", batch_size), 1)
    check_choice("task", task, TASKS)
    mesh = make_mesh() if jax.device_count() > 1 else None
    lm = load(model, step=step, dtype=dtype, mesh=mesh)
    prepared = prepare(task, path, lm, options)
    if out is None:
        found = run(lm, prepared.examples, batch_size=batch_size)
    else:
        with Results(out.with_suffix(".jsonl"), lm, task, prepared) as results:
            found = run(lm, prepared.examples, results, batch_size=batch_size)
    at = "" if lm.step is None else f" at step {lm.step}"
    figures = {
        name: Figure(value, f"{how}; {model}{at}, {dtype}")
        for name, (value, how) in prepared.figures(found).items()
    }
    if out is not None:
        said: dict[str, Any] = {"task": task, "model": str(model), "step": lm.step}
        said |= {"dtype": dtype, "path": str(path), **dataclasses.asdict(options)}
        said["figures"] = {name: figure._asdict() for name, figure in figures.items()}
        out.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    return figures


class Results:
    """What was found, an example a line, in a file that goes with one evaluation.

    It begins with a hash of weights, task, tokens and answers; a last line that is not
    whole is dropped.
    """

    def __init__(
        self, path: Path, lm: LanguageModel, task: str, prepared: Prepared
    ) -> None:
        self.found: dict[int, RowScores] = {}
        head = json.dumps({"evaluation": _identity(lm, task, prepared.examples)})
        end = 0  # of the last whole line
        for line, place in read_lines(str(path), None) if path.exists() else ():
            if not line.endswith(b"\n"):
                break
            end = place.offset
            if place.number > 1:
                self._read(line, f"{path}: line {place.number}", prepared.examples)
            elif line != f"{head}\n".encode():
                raise ValueError(
                    f"{path} holds results of another evaluation (model, task, data or "
                    "options): remove it, or choose another name"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+" if end else "w", encoding="utf-8")
        self._file.seek(end)
        self._file.truncate()
        if not end:
            self._file.write(head + "\n")

    def _read(self, line: bytes, where: str, examples: Sequence[Example]) -> None:
        record = parse_json(line, where)
        try:
            i, logprobs, is_greedy = (
                record[x] for x in ("example", *RowScores._fields)
            )
            kinds = {type(i), *map(type, logprobs)}, {*map(type, is_greedy)}
            n_rows = len(examples[i].rows) if i >= 0 else -1
        except (LookupError, TypeError) as error:
            raise ValueError(f"{where}: damaged ({error!r})") from None
        if kinds != ({int, float}, {bool}) or {len(logprobs), len(is_greedy)} != {
            n_rows
        }:
            raise ValueError(f"{where}: damaged ({shown(record)})")
        self.found[i] = RowScores(logprobs, is_greedy)

    def add(self, i: int, found: RowScores) -> None:
        self.found[i] = found
        self._file.write(json.dumps({"example": i, **found._asdict()}) + "\n")
        self._file.flush()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _identity(lm: LanguageModel, task: str, examples: Sequence[Example]) -> str:
    digest = hashlib.sha256(f"{task} {lm.model} {lm.tokenizer.vocab_size}".encode())
    for leaf in jax.tree.leaves(lm.params):  # the first row of each tells runs apart
        digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)]).tobytes())
    for example in examples:
        digest.update(repr((len(example.rows), example.answer)).encode())
        for ids, n in example.rows:
            digest.update(np.asarray([n, *ids], "<i8").tobytes())
    return digest.hexdigest()


def run(
    lm: LanguageModel,
    examples: Sequence[Example],
    results: Results | None = None,
    *,
    batch_size: int | None = None,
) -> list[RowScores]:
    """What the model gives each example; those in `results` are not computed again."""
    found = {} if results is None else results.found
    rows: list[Row] = []
    owners: list[tuple[int, int]] = []  # the example and its row
    for i, example in enumerate(examples):
        if i not in found:
            rows += example.rows
            owners += [(i, j) for j in range(len(example.rows))]
    scores: dict[int, dict[int, Score]] = {}
    progress = tqdm(total=len(examples), initial=len(found), disable=None, unit=" ex")
    with progress:
        for at, score in lm.score_rows(rows, batch_size=batch_size):
            i, j = owners[at]
            of_rows = scores.setdefault(i, {})
            of_rows[j] = score
            if len(of_rows) == len(examples[i].rows):
                del scores[i]
                ordered = [of_rows[j] for j in range(len(of_rows))]
                one = RowScores(
                    [s.total for s in ordered],
                    [bool(s.is_greedy.all()) for s in ordered],
                )
                if results is None:
                    found[i] = one
                else:
                    results.add(i, one)
                progress.update()
    return [found[i] for i in range(len(examples))]
