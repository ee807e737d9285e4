"""Text to train on, as documents that are read block by block.

A source is a text file (one document), a file of many (JSON Lines, Parquet), a Hugging
Face data set, a folder or a pattern of files, or nothing: the text that every Python
installation carries. A text file is never held in memory whole; of the others, one
document is.
"""

import contextlib
import fnmatch
import glob
import hashlib
import io
import os
import stat
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from gpt2_jax.checks import check_choice, items, shown
from gpt2_jax.data.corpus import default_documents
from gpt2_jax.data.records import Records, hf_source
from gpt2_jax.data.stored import open_file, read_lines, reading, remote, text_start
from gpt2_jax.runtime.files import check_regular, is_url, user_path
from gpt2_jax.runtime.partial import removed

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
FORMATS = ("auto", "text", "jsonl", "parquet")
BLOCK_BYTES = 1 << 20

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

    def read(
        self, start: int = 0, stop: int | None = None, block_bytes: int = BLOCK_BYTES
    ) -> Iterator[tuple[str, int]]:
        """(text, the offset after it) of bytes [start, stop), block by block.

        Blocks have at most `block_bytes`; they end after a newline where there is one,
        and never inside a character. Raises ValueError, naming file and byte, on what
        is not UTF-8 and on a file that became shorter.
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
                block, rest = data[:end], data[end:]
                if start == 0 and self.text is None:
                    block = text_start(block, self.name)
                start += end
                try:
                    text = block.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{self.name} is not UTF-8: {error.reason} at byte "
                        f"{start - len(block) + error.start}"
                    ) from None
                if text:  # else a byte order mark was all there was
                    yield text, start

    def texts(self) -> Iterator[str]:
        return (text for text, _ in self.read())

    def lines(self) -> Iterator[tuple[str, str]]:
        """(file and number, for errors, and the line) of each line of a file."""
        for line, place in read_lines(self.name, self.size):
            where = f"{self.name}: line {place.number}"
            try:
                yield where, line.removesuffix(b"\n").removesuffix(b"\r").decode()
            except UnicodeDecodeError as error:
                reason = f"{error.reason} at byte {error.start}"
                raise ValueError(f"{where}: not UTF-8 ({reason})") from None


def _whole_characters(data: bytes) -> int:
    """How many bytes of `data` remain when a character cut at its end is left out."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] >= 0xC0:  # a leading byte: 2, 3 or 4 long
            length = 2 + (data[-back] >= 0xE0) + (data[-back] >= 0xF0)
            return len(data) - back if length > back else len(data)
        if data[-back] < 0x80:
            break
    return len(data)


# --- What a path stands for -----------------------------------------------------------


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
    check_choice("format", form, FORMATS)
    if not field:
        raise ValueError("field='' names no field")
    if path is None:
        return [
            Document(name, len(text), text=text)
            for name, text in default_documents()
            if text
        ]
    given = listed(path)
    found: list[Document | Records] = []
    for each in map(str, given):
        if is_hub(each):
            found.append(hf_source(each, field))
        elif is_url(each):
            found += _remote_files(each, field, form)
        else:
            for file in text_files(each):
                if (status := file.stat()).st_size:
                    time = str(status.st_mtime_ns)
                    found.append(_file_of(str(file), status.st_size, time, field, form))
    if not found:
        raise ValueError(f"no text in {_listed(given)}: every file is empty")
    names = Counter(
        source.name if is_remote(source.name) else os.path.realpath(source.name)
        for source in found
    )
    name, times = names.most_common(1)[0]
    if times > 1:
        raise ValueError(f"{name} is given {times} times")
    return found


def listed(path: Paths) -> list[str | Path]:
    """One path or several, as a list. ValueError on what is neither."""
    if isinstance(path, str | Path):
        return [path]
    paths = items("path", path)
    for each in paths:
        if not isinstance(each, str | Path):
            kind = type(each).__name__
            raise ValueError(f"path={shown(each)} must be a path, not {kind}")
    return paths


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
    form = form_of(name) if form == "auto" else form
    if form == "text":
        return Document(name, size, stamp)
    return Records(name, size, stamp, form, field)


def form_of(name: str) -> str:
    """What a file is by its name: jsonl, parquet or text."""
    ending = next((s for s in RECORD_SUFFIXES if name.lower().endswith(s)), "")
    return ending.split(".")[1] if ending else "text"


def _remote_files(url: str, field: str, form: str) -> list[Document | Records]:
    filesystem, path = remote(url)
    with reading(url):
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
    """A remote file's hash or time, whatever its file system calls them."""
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
    a dot, and what is below them, are skipped. Links are followed, and a file to which
    several ways lead is taken once. Sorted by path, so that the order is the same
    everywhere.

    Raises FileNotFoundError if there is no such path, or no text file in the folder,
    and ValueError or OSError as `files.check_regular` does.
    """
    path = user_path(path)
    if path.is_dir():
        relative = (file.relative_to(path).as_posix() for file in _files_below(path))
        files = [path / name for name in sorted(relative) if _is_text(name)]
        if not files:
            raise FileNotFoundError(
                f"no text file in the folder {path}: looked for {_wanted()}"
            )
        return _each_once(files)
    if not path.exists() and glob.has_magic(str(path)):
        if files := [file for file in sorted(_matches(path)) if file.is_file()]:
            return _each_once(files)
        raise FileNotFoundError(f"no file matches {path}")
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    check_regular(path)
    return [path]


def _each_once(files: Sequence[Path]) -> list[Path]:
    return list({os.path.realpath(file): file for file in reversed(files)}.values())[
        ::-1
    ]


def _files_below(folder: Path) -> Iterator[Path]:
    """All files, links followed; a folder to which several ways lead is seen once."""
    seen = set()
    for base, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        if (real := os.path.realpath(base)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (file for name in names if (file := Path(base, name)).is_file())


def _raise(error: OSError) -> NoReturn:
    raise error


def _matches(pattern: Path) -> list[Path]:
    """What matches, as of `glob.glob`, which follows links in a circle under `**`."""
    parts = pattern.parts
    if "**" not in parts:
        return [Path(name) for name in glob.glob(str(pattern))]
    at = parts.index("**")
    return [
        file
        for base in glob.glob(os.path.join(*parts[:at]) if at else ".")
        if os.path.isdir(base)
        for file in _files_below(Path(base))
        if _fits(file.relative_to(base).parts, parts[at:])
    ]


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts:
        return not names
    part, rest = parts[0], parts[1:]
    if part == "**" and _fits(names, rest):
        return True
    if not names or (names[0].startswith(".") and not part.startswith(".")):
        return False
    if part == "**":
        return _fits(names[1:], parts)
    return fnmatch.fnmatchcase(names[0], part) and _fits(names[1:], rest)


# --- Standard input, and what else can be read just once ------------------------------


def is_stream(path: str | Path | None) -> bool:
    """Whether it is "-", or a FIFO: one with a name, or that of a shell's `<(...)`."""
    if path is None or is_hub(str(path)) or is_url(path):
        return False
    return str(path) == "-" or (
        (file := user_path(path)).exists() and stat.S_ISFIFO(file.stat().st_mode)
    )


def store_streams(
    given: Sequence[str | Path], folder: Path, form: str
) -> tuple[list[str], str]:
    """Streams become files in `folder`: (the paths with them, hash of their text)."""
    if list(map(str, given)).count("-") > 1:
        raise ValueError("standard input, -, is given more than once")
    paths, digest = [], hashlib.sha256()
    for number, path in enumerate(map(str, given)):
        if is_stream(path):
            kind = form_of(path) if form == "auto" else form
            ending = {"text": "txt"}.get(kind, kind)
            stored = folder / f"stdin{number or ''}.{ending}"
            _store(path, stored, digest)
            path = str(stored)
        paths.append(path)
    return paths, digest.hexdigest()


@contextlib.contextmanager
def streams_stored(path: Paths | None, form: str = "auto") -> Iterator[Paths | None]:
    """The same paths, of which streams are files until the end of the block."""
    given = [] if path is None else [path] if isinstance(path, str | Path) else path
    if not any(map(is_stream, given)):
        yield path
        return
    folder = Path(tempfile.mkdtemp())
    with removed(folder):
        yield store_streams(given, folder, form)[0]


def _store(path: str, stored: Path, digest: Any) -> None:
    if path == "-" and sys.stdin is None:
        raise ValueError("standard input, -, is closed")
    source = sys.stdin.buffer if path == "-" else user_path(path).open("rb")
    with stored.open("wb") as file:
        while data := source.read(BLOCK_BYTES):
            digest.update(data)
            file.write(data)
    if path != "-":
        source.close()
    if not stored.stat().st_size:
        raise ValueError(f"no text in {'standard input' if path == '-' else path}")
