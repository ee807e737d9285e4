"""Text to train on, as documents that are read block by block.

A source is a text file (one document), a file of many (JSON Lines, Parquet), a Hugging
Face data set, a folder or a pattern of files, or nothing: the text that every Python
installation carries. A text file is never held in memory whole; of the others, one
document is.
"""

import ast
import contextlib
import functools
import glob
import gzip
import io
import json
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from gpt2_jax.files import is_url, user_path

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
FORMATS = ("auto", "text", "jsonl", "parquet")
BLOCK_BYTES = 1 << 20
LINE_BYTES = 1 << 26  # of a JSON object, at most

Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class Document:
    """A text of `size` bytes of UTF-8: a file, or `text` itself.

    `name` is the file's path or URL; `stamp` is another one when it was changed.
    """

    name: str
    size: int
    stamp: str = ""
    text: bytes | None = field(default=None, repr=False)

    def open(self) -> BinaryIO:
        return open_file(self.name) if self.text is None else io.BytesIO(self.text)

    def character_start(self, offset: int) -> int:
        """The last byte offset <= `offset` at which a character starts."""
        if offset >= self.size:
            return self.size
        with self.open() as file:
            file.seek(max(0, offset - 3))
            around = file.read(min(offset, 3) + 1)
        while len(around) > 1 and 0x80 <= around[-1] < 0xC0:  # inside a character
            around, offset = around[:-1], offset - 1
        return offset

    def blocks(
        self, start: int = 0, stop: int | None = None, block_bytes: int = BLOCK_BYTES
    ) -> Iterator[str]:
        """The text of bytes [start, stop), in blocks of at most `block_bytes`.

        Blocks end after a newline where there is one, and never inside a character.
        Raises ValueError, naming file and byte, on what is not UTF-8 and on a file that
        became shorter.
        """
        stop = self.size if stop is None else stop
        rest = b""
        with self.open() as file:
            file.seek(start)
            while start < stop:
                want = min(block_bytes, stop - start) - len(rest)
                data = rest + (new := file.read(want))
                if len(new) < want:
                    raise ValueError(
                        f"{self.name} became shorter while it was read: {stop} bytes "
                        f"expected, {start + len(data)} found"
                    )
                end = len(data)
                if start + end < stop:
                    end = data.rfind(b"\n") + 1 or _whole_characters(data)
                try:
                    yield data[:end].decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{self.name} is not UTF-8: {error.reason} at byte "
                        f"{start + error.start}"
                    ) from None
                start, rest = start + end, data[end:]

    def texts(self) -> Iterator[str]:
        return self.blocks()


def _whole_characters(data: bytes) -> int:
    """How many bytes of `data` remain when a character cut at its end is left out."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] >= 0xC0:  # a leading byte: 2, 3 or 4 long
            length = 2 + (data[-back] >= 0xE0) + (data[-back] >= 0xF0)
            return len(data) - back if length > back else len(data)
        if data[-back] < 0x80:
            break
    return len(data)


@dataclass(frozen=True, slots=True)
class Place:
    """Where reading goes on: `offset` stored bytes and `number` records are done."""

    offset: int = 0
    number: int = 0


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

    def read(self, place: Place = Place()) -> Iterator[tuple[str, Place]]:
        """(text, the place after it) of each document from there.

        Empty documents and nulls are left out. Raises ValueError, naming file and
        record, on what is damaged or no text.
        """
        reader = {"jsonl": _read_jsonl, "parquet": _read_parquet, "hf": _read_hf}
        for value, after in reader[self.form](self, place):
            if value is None or value == "":
                continue
            if not isinstance(value, str):
                raise self._bad(after.number, f"{self.field!r} is {_brief(value)}")
            if not value.isascii():
                try:
                    value.encode()
                except UnicodeEncodeError as error:
                    what = f"{value[error.start]!a} is no character"
                    raise self._bad(after.number, what) from None
            yield value, after

    def texts(self) -> Iterator[str]:
        return (text for text, _ in self.read())

    def _bad(self, number: int, what: str) -> ValueError:
        unit = {"jsonl": "line", "parquet": "row", "hf": "example"}[self.form]
        return ValueError(f"{self.name}: {unit} {number}: {what}")

    def _lacks(self, names: Iterable[str], number: int) -> ValueError:
        found = ", ".join(map(str, names)) or "nothing"
        return self._bad(number, f"no field {self.field!r}, only {found}")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


_Values = Iterator[tuple[Any, Place]]


def _read_jsonl(source: Records, place: Place) -> _Values:
    with open_file(source.name) as stored, _unpacked(source.name, stored) as file:
        number = place.number
        try:
            if file is stored:
                file.seek(place.offset)
            else:
                for _ in range(number):
                    file.readline()
            offset = place.offset
            while line := file.readline(LINE_BYTES + 1):
                number, offset = number + 1, offset + len(line)
                if len(line) > LINE_BYTES:
                    raise source._bad(number, f"longer than {LINE_BYTES} bytes")
                if line.isspace():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    what = "UTF-8" if isinstance(error, UnicodeError) else "JSON"
                    raise source._bad(number, f"not {what} ({error})") from None
                except RecursionError:
                    raise source._bad(number, "not JSON (too deep)") from None
                if not isinstance(record, dict):
                    what = f"{_brief(record)} is no JSON object"
                    raise source._bad(number, what)
                if source.field not in record:
                    raise source._lacks(record, number)
                done = offset if file is stored else stored.tell()
                yield record[source.field], Place(done, number)
        except FileNotFoundError:
            raise
        except _unpacking_errors(source.name) as error:
            raise source._bad(number + 1, f"can't be read: {error}") from None


def _unpacking_errors(name: str) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    plain = (OSError, EOFError, zlib.error)
    return (*plain, _zstd().ZstdError) if name.endswith(".zst") else plain


def _unpacked(name: str, stored: BinaryIO) -> BinaryIO:
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stored))
    if name.endswith(".zst"):
        return cast(BinaryIO, _zstd().ZstdFile(stored))
    return stored


def _zstd() -> Any:
    """Python 3.14's module, which `backports` brings to the older ones."""
    try:
        from compression import zstd
    except ImportError:
        try:
            import backports.zstd as zstd
        except ImportError:
            raise _missing("zstandard files", "backports.zstd", "zstd") from None
    return zstd


def _missing(what: str, package: str, extra: str) -> ValueError:
    return ValueError(
        f"{what} need the package {package}: pip install 'gpt2-jax[{extra}]'"
    )


def _read_parquet(source: Records, place: Place) -> _Values:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError:
        raise _missing("Parquet files", "pyarrow", "parquet") from None
    with open_file(source.name) as stored:
        try:
            file = parquet.ParquetFile(stored)
            schema = file.schema_arrow
            if source.field not in schema.names:
                raise source._lacks(schema.names, 1)
            kind = schema.field(source.field).type
            if not (types.is_string(kind) or types.is_large_string(kind)):
                raise source._bad(1, f"{source.field!r} is of type {kind}, no string")
            number, rows = 0, max(1, file.metadata.num_rows)
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if number + size <= place.number:  # all of it is done
                    number += size
                    continue
                for batch in file.iter_batches(
                    256, [group], [source.field], use_threads=False
                ):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        if number > place.number:
                            done = (source.size or 0) * number // rows
                            yield value, Place(done, number)
        except ArrowException as error:
            raise ValueError(f"{source.name}: damaged: {error}") from None


def _read_hf(source: Records, place: Place) -> _Values:
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
        if source.field not in example:
            raise source._lacks(example, number)
        yield example[source.field], Place(0, number)


def _load_hf(name: str) -> tuple[Any, str]:
    """The streamed data set of `hf:NAME[:CONFIG[:SPLIT]]`, and its revision."""
    try:
        import datasets
    except ImportError:
        raise _missing("Hugging Face data sets", "datasets", "datasets") from None
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


def examples_of_hub(name: str) -> Iterator[dict[str, Any]]:
    """The examples of `hf:NAME[:CONFIG[:SPLIT]]`. Raises OSError on what can't be."""
    dataset, _ = _load_hf(name)
    try:
        yield from dataset
    except Exception as error:  # no base in common, as in `_read_hf`
        raise OSError(f"{name} can't be read: {error}") from error


def _hf_source(name: str, field: str) -> Records:
    if not name.removeprefix("hf:").split(":")[0]:
        raise ValueError(f"{name!r} names no data set: hf:NAME[:CONFIG[:SPLIT]]")
    return Records(name, None, _load_hf(name)[1], "hf", field)


# --- What a path stands for -----------------------------------------------------------


def open_file(name: str) -> BinaryIO:
    """A path, or a URL by fsspec, for reading."""
    if not is_url(name):
        return open(name, "rb")
    filesystem, path = _remote(name)
    with _reading(name):
        return cast(BinaryIO, filesystem.open(path, "rb"))


def _remote(url: str) -> tuple[Any, str]:
    """(fsspec's file system, path there) of a URL."""
    import fsspec

    with _reading(url):
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    """One kind of error, with the URL, for all that file systems raise."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file or folder: {url}") from None
    # botocore's, aiohttp's, gcsfs's errors, and others': they have no base in common.
    except Exception as error:
        raise OSError(f"{url} can't be read: {error}") from error


def documents(
    path: Paths | None = None, *, field: str = "text", form: str = "auto"
) -> list[Document | Records]:
    """The documents of a source, empty files left out; None is `default_corpus`.

    Args:
      path: a file, a folder, a pattern (`*`, `?`, `[...]`, `**` for any folders), a
        URL of one of these, `hf:NAME[:CONFIG[:SPLIT]]`, or a list of such.
      field: of JSON objects, of Parquet's columns, of examples: the text.
      form: what files are: text, jsonl or parquet; auto goes by their names, and what
        is neither `.jsonl`, `.jsonl.gz`, `.jsonl.zst` nor `.parquet` is a text.

    Raises FileNotFoundError or ValueError as `text_files` does, OSError on what can't
    be read, and ValueError if there is no text at all or a file comes twice.
    """
    if form not in FORMATS:
        raise ValueError(f"format={form!r} is not one of {', '.join(FORMATS)}")
    if not field:
        raise ValueError("field='' names no field")
    if path is None:
        return [
            Document(name, len(text), text=text)
            for name, text in _default_documents()
            if text
        ]
    given = [path] if isinstance(path, str | Path) else list(path)
    found: list[Document | Records] = []
    for each in map(str, given):
        if is_hub(each):
            found.append(_hf_source(each, field))
        elif is_url(each):
            found += _remote_files(each, field, form)
        else:
            found += (
                _file_of(
                    str(file), status.st_size, str(status.st_mtime_ns), field, form
                )
                for file in text_files(each)
                if (status := file.stat()).st_size
            )
    if not found:
        raise ValueError(f"no text in {_listed(given)}: every file is empty")
    name, times = Counter(source.name for source in found).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{name} is given {times} times")
    return found


def is_hub(path: str) -> bool:
    """Whether it names a data set: hf:NAME[:CONFIG[:SPLIT]]."""
    return path.startswith("hf:") and not is_url(path)


def is_remote(path: str | Path) -> bool:
    """Whether what it stands for is not a file or folder of this machine."""
    return str(path) == "-" or is_hub(str(path)) or is_url(path)


def split_paths(flags: Iterable[str]) -> list[str]:
    """The paths of repeatable flags, which may hold several with commas between."""
    return [
        path
        for flag in flags
        for path in ([flag] if _is_there(flag) else flag.split(","))
    ]


def _is_there(path: str) -> bool:
    return "," not in path or (not is_url(path) and user_path(path).exists())


def _listed(given: Sequence[str | Path]) -> str:
    return ", ".join(map(str, given))


def _file_of(
    name: str, size: int, stamp: str, field: str, form: str
) -> Document | Records:
    if form == "auto":
        ending = next((s for s in RECORD_SUFFIXES if name.lower().endswith(s)), "")
        form = ending.split(".")[1] if ending else "text"
    if form == "text":
        return Document(name, size, stamp)
    return Records(name, size, stamp, form, field)


def _remote_files(url: str, field: str, form: str) -> list[Document | Records]:
    filesystem, path = _remote(url)
    with _reading(url):
        if glob.has_magic(path):
            details = filesystem.glob(path, detail=True)
            details = {n: i for n, i in details.items() if not _is_hidden(n)}
        elif filesystem.isdir(path):
            details = filesystem.find(path, detail=True)
            details = {
                name: info
                for name, info in details.items()
                if _is_text(name.removeprefix(path).strip("/"))
            }
        else:
            details = {path: filesystem.info(path)}
        details = {n: i for n, i in details.items() if i["type"] == "file"}
    if not details:
        raise FileNotFoundError(f"no text file in {url}: looked for {_wanted()}")
    return [
        _file_of(
            filesystem.unstrip_protocol(name), info["size"], _stamp(info), field, form
        )
        for name, info in sorted(details.items())
        if info["size"]
    ]


def _stamp(info: Mapping[str, Any]) -> str:
    """Of a remote file: its hash or time, whatever its file system calls them."""
    names = ("ETag", "etag", "md5Hash", "mtime", "updated", "LastModified", "created")
    return next((str(info[name]) for name in names if info.get(name)), "")


def _is_text(name: str) -> bool:
    """Whether a file in a folder is taken, by its path below it."""
    suffixes = TEXT_SUFFIXES + RECORD_SUFFIXES
    return name.lower().endswith(suffixes) and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _wanted() -> str:
    return ", ".join(f"*{suffix}" for suffix in TEXT_SUFFIXES + RECORD_SUFFIXES)


def text_files(path: str | Path) -> list[Path]:
    """A file given directly, whatever its name; all of a pattern; or those of a folder.

    In a folder a file is taken if it ends in .txt, .text, .md, .markdown, .rst, .tex,
    .org, .jsonl, .jsonl.gz, .jsonl.zst or .parquet, in any case; names that start with
    a dot, and what is below them, are skipped. Sorted by path, so that the order is the
    same everywhere.

    Raises FileNotFoundError if there is no such path, or no text file in the folder.
    """
    path = user_path(path)
    if path.is_dir():
        relative = sorted(
            file.relative_to(path).as_posix()
            for file in path.rglob("*")
            if file.is_file()
        )
        files = [path / name for name in relative if _is_text(name)]
        if not files:
            raise FileNotFoundError(
                f"no text file in the folder {path}: looked for {_wanted()}"
            )
        return files
    if not path.exists() and glob.has_magic(str(path)):
        matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
        if files := [file for file in matches if file.is_file()]:
            return files
        raise FileNotFoundError(f"no file matches {path}")
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if not path.is_file():
        raise ValueError(f"neither a file nor a folder: {path}")
    return [path]


# --- The text that Python carries -----------------------------------------------------

CORPUS_BYTES = 1_500_000  # docstrings are added until the corpus reaches this size
_SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip


def default_corpus() -> Iterator[str]:
    """About 1.5 MB of English about Python, a document at a time, in a fixed order.

    The topics of `pydoc_data` (the language reference), then the docstrings of the
    standard library, a module each, read from its source files, which are not imported.
    Where Python carries no sources the topics alone. The text differs a little from one
    Python version to another. Reading takes some seconds, once a process.
    """
    for _, text in _default_documents():
        yield text.decode("utf-8")


@functools.cache
def _default_documents() -> tuple[tuple[str, bytes], ...]:
    """(name, UTF-8) pairs."""
    from pydoc_data.topics import topics

    found = [(f"topic {name}", topics[name].encode()) for name in sorted(topics)]
    size = sum(len(text) for _, text in found)
    for module in _modules(Path(sysconfig.get_path("stdlib"))):
        if size >= CORPUS_BYTES:
            break
        if text := _docstrings(module):
            found.append((f"module {module.stem}", text))
            size += len(text)
    return tuple(found)


def _modules(folder: Path) -> Iterator[Path]:
    """Source files: those of the folder first, then those of its packages."""
    yield from sorted(folder.glob("*.py"))
    for package in sorted(path for path in folder.glob("*") if path.is_dir()):
        if package.name not in _SKIPPED_FOLDERS:
            yield from _modules(package)


def _docstrings(module: Path) -> bytes:
    """All docstrings of a source file in order, apart by an empty line, as UTF-8."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in somebody else's code
            tree = ast.parse(module.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return b""
    text = "\n\n".join(doc.strip() for doc in _walk_docstrings(tree)).strip()
    # A docstring may spell a lone surrogate by an escape.
    return f"{text}\n".encode(errors="replace") if text else b""


def _walk_docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[str]:
    if doc := ast.get_docstring(node):
        yield doc
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk_docstrings(child)
