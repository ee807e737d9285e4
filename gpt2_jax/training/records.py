"""The JSON Lines files of a run: a record a line, each with the step that it is of.

A disk that ran full, a machine that lost power or an editor may leave lines that hold
no record. They cost nothing but themselves: the others are read, and a note names the
file and the first such line.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.checks import shown
from gpt2_jax.runtime.files import check_regular, parse_json

LINE_BYTES = 1 << 24  # of a record, at most
# What the values beside the step are; those of environment.jsonl differ.
_VALUES: dict[str, tuple[Any, str]] = {
    "metrics.jsonl": ((int, float), "number"),
    "samples.jsonl": (str, "text"),
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, samples.jsonl or environment.jsonl."""
    bad: list[str] = []
    records = [record for _, record in _records(path, bad)]
    _note(bad)
    return records


def cut_records(path: Path, is_kept: Callable[[Mapping[str, Any]], bool]) -> None:
    """Takes out of a file the records that are not kept.

    Lines that hold no record go too: a copy of the file as it was is kept then.
    """
    bad: list[str] = []
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        for line, record in _records(path, bad):
            if is_kept(record):
                file.write(line.rstrip(b"\n") + b"\n")
    if bad:
        aside, n = path.with_name(f"{path.name}.damaged"), 1
        while aside.exists():
            aside, n = path.with_name(f"{path.name}.damaged-{n}"), n + 1
        shutil.copyfile(path, aside)
        _note(bad, f"; {aside} is the file as it was")
    temporary.replace(path)


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a line, apart from one that was cut short."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def _records(path: Path, bad: list[str]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines and their records; `bad` takes what is wrong with the others."""
    if not path.exists():
        return
    check_regular(path)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES):
            number += 1
            where = f"{path}, line {number}"
            is_whole = len(line) < LINE_BYTES or line.endswith(b"\n")
            while not is_whole and (rest := file.readline(LINE_BYTES)):
                is_whole = rest.endswith(b"\n")
                line = b""
            if line.isspace():
                continue
            try:
                record = _parse(line, where, path.name)
            except ValueError as error:
                bad.append(str(error))
            else:
                yield line, record


def _parse(line: bytes, where: str, name: str) -> dict[str, Any]:
    if not line:
        raise ValueError(f"{where}: longer than {LINE_BYTES:,} bytes")
    # Where power was lost, file systems fill up with zeros.
    record = parse_json(line.strip(b"\0 \t\r\n"), where)
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {shown(record)} is not an object")
    step = record.get("step")
    if type(step) is not int or not 0 <= step < 1 << 63:
        raise ValueError(f"{where}: step={shown(step)} is not a number of updates")
    if name in _VALUES:
        kinds, what = _VALUES[name]
        for key in record.keys() - {"step"}:
            value = record[key]
            is_wide = isinstance(value, int) and abs(value) >= 1 << 63
            if is_wide or isinstance(value, bool) or not isinstance(value, kinds):
                raise ValueError(f"{where}: {shown(key)} is {shown(value)}, no {what}")
    return record


def _note(bad: list[str], end: str = "") -> None:
    if bad:
        more = f", and {len(bad) - 1:,} more lines" if len(bad) > 1 else ""
        text = f"note: left out {bad[0]}{more}{end}"
        print(text, file=sys.stderr, flush=True)
