"""The text that every Python installation carries, to train on without any other."""

import ast
import functools
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

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
    for _, text in default_documents():
        yield text.decode("utf-8")


@functools.cache
def default_documents() -> tuple[tuple[str, bytes], ...]:
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
