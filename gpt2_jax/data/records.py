"""Files of many documents, and data sets: JSON objects, rows or examples, one by one.

Whatever reads them (preparation, tokenizers, tasks, examples for fine-tuning) reads
them here, and an error names the file and the line, row or example.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2_jax.checks import one_line, shown
from gpt2_jax.data.stored import (
    BEGINNING,
    UNPACKED,
    Cursor,
    missing,
    open_file,
    read_lines,
)
from gpt2_jax.runtime.files import parse_json

Row = dict[str, Any]
_UNITS = {"jsonl": "line", "parquet": "row", "hf": "example"}


def text_of(row: Row, name: str) -> str:
    """The text in the field `name`.

    Raises:
      ValueError: where there is none, and on surrogates, which no text can hold.
    """
    if name not in row:
        raise lacks(name, row)
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {shown(value, 40)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{value[error.start]!a} is no character") from None
    return value


def texts_of(row: Row, name: str) -> list[str]:
    """The texts in the list that is the field `name`; ValueError as `text_of`."""
    if name not in row:
        raise lacks(name, row)
    if not isinstance(row[name], list):
        raise ValueError(f"{name!r} is {shown(row[name], 40)}")
    return [text_of({name: value}, name) for value in row[name]]


def lacks(name: str, row: Iterable[str]) -> ValueError:
    """The error of a record without the field `name`."""
    found = one_line(", ".join(map(str, row)) or "nothing", 100)
    return ValueError(f"no field {name!r}, only {found}")


@dataclass(frozen=True, slots=True)
class Records:
    """A file or data set of many documents, which are strings in its `field`.

    Attributes:
      name: path, URL or hf:NAME.
      size: bytes as they are stored, or None where that is unknown.
      stamp: another one when the content was changed.
      form: jsonl, parquet or hf.
    """

    name: str
    size: int | None
    stamp: str
    form: str
    field: str

    def read(self, place: Cursor = BEGINNING) -> Iterator[tuple[str, Cursor]]:
        """(text, the place after it) of each document from there.

        Empty documents and nulls are left out. Raises ValueError, naming file and
        record, on what is damaged or no text.
        """
        for row, after in self.rows(place, [self.field]):
            if row.get(self.field, "?") in (None, ""):
                continue
            try:
                text = text_of(row, self.field)
            except ValueError as error:
                raise ValueError(f"{self.where(after.number)}: {error}") from None
            yield text, after

    def texts(self) -> Iterator[str]:
        return (text for text, _ in self.read())

    def rows(
        self, place: Cursor = BEGINNING, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[Row, Cursor]]:
        """(record, the place after it) of each record from there.

        Args:
          columns: the fields that are needed; None: all.
        """
        reader = {"jsonl": _read_jsonl, "parquet": _read_parquet, "hf": _read_hf}
        return reader[self.form](self, place, columns)

    def where(self, number: int) -> str:
        """A record's file and place, for errors."""
        return f"{self.name}: {_UNITS[self.form]} {number}"


_Rows = Iterator[tuple[Row, Cursor]]


def _read_jsonl(source: Records, place: Cursor, _: Sequence[str] | None) -> _Rows:
    for line, after in read_lines(source.name, source.size, place):
        if line.strip():
            where = source.where(after.number)
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: {shown(row, 40)} is no JSON object")
            yield row, after


def _read_parquet(
    source: Records, place: Cursor, columns: Sequence[str] | None
) -> _Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise missing("Parquet files", "pyarrow", "parquet") from None
    with open_file(source.name) as stored:
        try:
            file = parquet.ParquetFile(stored)
            names = file.schema_arrow.names
            for name in columns or ():
                if name not in names:
                    raise ValueError(f"{source.where(1)}: {lacks(name, names)}")
            _check_unpacked(source, file.metadata)
            number, rows = 0, max(1, file.metadata.num_rows)
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number + size <= place.number:  # all of it is done
                    number += size
                    continue
                for batch in file.iter_batches(256, [group], columns, False):
                    for row in _rows_of(batch, source, number + 1):
                        number += 1
                        if number > place.number:
                            done = (source.size or 0) * number // rows
                            yield row, Cursor(done, number)
        except (ArrowException, OSError) as error:
            raise ValueError(
                f"{source.name}: damaged: {one_line(error, 160)}"
            ) from None


def _check_unpacked(source: Records, metadata: Any) -> None:
    groups = range(metadata.num_row_groups)
    size = sum(metadata.row_group(i).total_byte_size for i in groups)
    most = UNPACKED[0] + UNPACKED[1] * (source.size or size)
    if size > most:
        raise ValueError(
            f"{source.name}: {source.size} bytes unpack to {size}, more than {most}"
        )


def _rows_of(batch: Any, source: Records, number: int) -> list[Row]:
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:  # no UTF-8, no date of Python's
        raise ValueError(
            f"{source.name}: after row {number}: {one_line(error, 160)}"
        ) from None


def _read_hf(source: Records, place: Cursor, _: Sequence[str] | None) -> _Rows:
    dataset, _ = _load_hf(source.name)
    number = place.number
    examples = iter(dataset.skip(number))
    while True:
        try:
            example = next(examples, None)
        # Network, file formats, its own: they have no base in common.
        except Exception as error:
            raise OSError(f"{source.name}: after example {number}: {error}") from error
        if example is None:
            return
        number += 1
        yield example, Cursor(0, number)


def _load_hf(name: str) -> tuple[Any, str]:
    """The streamed data set of `hf:NAME[:CONFIG[:SPLIT]]`, and its revision."""
    try:
        import datasets
    except ImportError:
        raise missing("Hugging Face data sets", "datasets", "datasets") from None
    path, config, split = (*name.removeprefix("hf:").split(":"), "", "")[:3]
    revision = None
    try:
        if not Path(path).exists():
            import huggingface_hub

            revision = huggingface_hub.HfApi().dataset_info(path).sha
        return datasets.load_dataset(
            path, config or None, split=split or "train", streaming=True,
            revision=revision,
        ), revision or ""  # fmt: skip
    except Exception as error:  # no base in common, as in `_read_hf`
        raise OSError(f"{name} can't be opened: {error}") from error


def hf_source(name: str, field: str) -> Records:
    """The data set of `hf:NAME[:CONFIG[:SPLIT]]`."""
    if not name.removeprefix("hf:").split(":")[0]:
        raise ValueError(f"{name!r} names no data set: hf:NAME[:CONFIG[:SPLIT]]")
    return Records(name, None, _load_hf(name)[1], "hf", field)
