"""Stored bytes: files, on this machine or behind a URL, and the lines in them.

A line ends at \\n, with or without a \\r before it, and at nothing else: U+2028, a form
feed and the other characters at which `str.splitlines` cuts are characters of the text.
A byte order mark is no part of it.
"""

import contextlib
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from gpt2_jax.runtime.files import check_regular, is_url, user_path

LINE_BYTES = 1 << 26  # of a line, at most
UNPACKED = 1 << 26, 256  # bytes that a file may unpack to: so many, and times its own
_OTHERS = {  # what files begin with that are no text
    b"\xff\xfe": "of UTF-16",
    b"\xfe\xff": "of UTF-16",
    b"\x00\x00\xfe\xff": "of UTF-32",
    b"\x1f\x8b": "of gzip",
    b"\x28\xb5\x2f\xfd": "of zstandard",
}


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where reading goes on: `offset` stored bytes and `number` records are done."""

    offset: int = 0
    number: int = 0


BEGINNING = Cursor()


def open_file(name: str) -> BinaryIO:
    """A path, or a URL by fsspec, for reading.

    Raises:
      OSError, ValueError: as `files.check_regular` does.
    """
    if not is_url(name):
        check_regular(path := user_path(name))
        return path.open("rb")
    filesystem, path_there = remote(name)
    with reading(name):
        return cast(BinaryIO, filesystem.open(path_there, "rb"))


def remote(url: str) -> tuple[Any, str]:
    """(fsspec's file system, path there) of a URL."""
    import fsspec

    with reading(url):
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))


@contextlib.contextmanager
def reading(url: str) -> Iterator[None]:
    """One kind of error, with the URL, for all that file systems raise."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"no such file or folder: {url}") from None
    # botocore's, aiohttp's, gcsfs's errors, and others': they have no base in common.
    except Exception as error:
        raise OSError(f"{url} can't be read: {error}") from error


def text_start(data: bytes, name: str) -> bytes:
    """The first bytes of a text, without a byte order mark.

    Raises:
      ValueError: where they are of another encoding or of a compressed file.
    """
    for mark, what in _OTHERS.items():
        if data.startswith(mark):
            raise ValueError(f"{name} is not UTF-8: the mark {what} at byte 0")
    head = data[:1024]
    if len(head) >= 16 and 3 * head.count(0) > len(head):
        raise ValueError(
            f"{name} is not UTF-8: {head.count(0)} of its first {len(head)} bytes are "
            "0, as in UTF-16"
        )
    return data.removeprefix(b"\xef\xbb\xbf")


def read_lines(
    name: str, size: int | None, place: Cursor = BEGINNING
) -> Iterator[tuple[bytes, Cursor]]:
    """(line, the place after it) of each line from there, unpacked where need be.

    Args:
      name: a path or URL; .gz and .zst at its end say that it is compressed.
      size: bytes as they are stored, or None where that is unknown.

    Raises:
      ValueError: naming file and line, where it is damaged, longer than LINE_BYTES, or
        unpacks to far more than a text would.
    """
    number, unpacked = place.number, 0
    most = None if size is None else UNPACKED[0] + UNPACKED[1] * size
    with open_file(name) as stored, _unpacked(name, stored) as file:
        try:
            if file is stored:
                file.seek(place.offset)
            else:
                for _ in range(number):
                    unpacked += len(file.readline(LINE_BYTES))
            offset = place.offset
            while line := file.readline(LINE_BYTES + 1):
                number, unpacked = number + 1, unpacked + len(line)
                if len(line) > LINE_BYTES:
                    raise ValueError(
                        f"{name}: line {number}: longer than {LINE_BYTES} bytes"
                    )
                if most is not None and unpacked > most:
                    raise ValueError(
                        f"{name}: line {number}: {size} bytes unpack to more than "
                        f"{most}"
                    )
                offset = offset + len(line) if file is stored else stored.tell()
                yield (
                    line if number > 1 else text_start(line, name),
                    Cursor(offset, number),
                )
        except FileNotFoundError:
            raise
        except _unpacking_errors(name) as error:
            raise ValueError(
                f"{name}: line {number + 1}: can't be read: {error}"
            ) from None


def _unpacking_errors(name: str) -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    plain = (OSError, EOFError, zlib.error)
    return (*plain, _zstd().ZstdError) if name.lower().endswith(".zst") else plain


def _unpacked(name: str, stored: BinaryIO) -> BinaryIO:
    if name.lower().endswith(".gz"):
        return cast(BinaryIO, gzip.GzipFile(fileobj=stored))
    if name.lower().endswith(".zst"):
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
            raise missing("zstandard files", "backports.zstd", "zstd") from None
    return zstd


def missing(what: str, package: str, extra: str) -> ValueError:
    """The error that says which package `what` needs."""
    return ValueError(
        f"{what} need the package {package}: pip install 'gpt2-jax[{extra}]'"
    )
