"""Text to train on, as documents that are read block by block.

A source is a text file (one document), a folder of text files (a document each), or
nothing: the text that every Python installation carries. No document that is a file is
ever held in memory whole.
"""

import ast
import functools
import io
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org")
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """A text of `size` bytes of UTF-8: a file at `path`, or `text` itself."""

    name: str
    size: int
    path: Path | None = None
    text: bytes = field(default=b"", repr=False)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.text) if self.path is None else self.path.open("rb")

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


def _whole_characters(data: bytes) -> int:
    """How many bytes of `data` remain when a character cut at its end is left out."""
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] >= 0xC0:  # a leading byte: 2, 3 or 4 long
            length = 2 + (data[-back] >= 0xE0) + (data[-back] >= 0xF0)
            return len(data) - back if length > back else len(data)
        if data[-back] < 0x80:
            break
    return len(data)


def documents(path: str | Path | None = None) -> list[Document]:
    """The documents of a source, empty ones left out; None is `default_corpus`.

    Raises FileNotFoundError or ValueError as `text_files` does, and ValueError if
    there is no text at all.
    """
    if path is None:
        return [
            Document(name, len(text), text=text)
            for name, text in _default_documents()
            if text
        ]
    files = ((file, file.stat().st_size) for file in text_files(path))
    found = [Document(str(file), size, path=file) for file, size in files if size]
    if not found:
        raise ValueError(f"no text in {path}: every file is empty")
    return found


def text_files(path: str | Path) -> list[Path]:
    """A file given directly, whatever its name; or all text files below a folder.

    In a folder a text file is one that ends in .txt, .text, .md, .markdown, .rst, .tex
    or .org, in any case; names that start with a dot, and what is below them, are
    skipped. Sorted by path, so that the order is the same everywhere.

    Raises FileNotFoundError if there is no such path, or no text file in the folder.
    """
    path = Path(path)
    if path.is_dir():
        relative = sorted(
            file.relative_to(path).as_posix()
            for file in path.rglob("*")
            if file.suffix.lower() in TEXT_SUFFIXES and file.is_file()
        )
        files = [
            path / name
            for name in relative
            if not any(part.startswith(".") for part in name.split("/"))
        ]
        if not files:
            raise FileNotFoundError(
                f"no text file in the folder {path}: looked for "
                f"{', '.join('*' + suffix for suffix in TEXT_SUFFIXES)}"
            )
        return files
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
