"""Files that somebody else wrote: which are taken, and JSON in them."""

import errno
import json
import os
import re
import stat
import sys
import urllib.parse
from pathlib import Path
from typing import Any

from gpt2_jax.checks import one_line, shown
from gpt2_jax.runtime.budget import Budget

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LARGE = 1 << 30
_EXTENTS = 1000  # parts of a file that are looked at for holes
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def is_url(path: object) -> bool:
    """Whether it is the URL of something that is not on this machine."""
    scheme = _SCHEME.match(str(path))
    return scheme is not None and scheme[1].lower() != "file"


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user means: every path from outside goes through here.

    `~` and `~user` are home folders, as in a shell, and `file://` URLs are paths.

    Raises:
      ValueError: on what can't be the path of a file or folder of this machine: what is
        neither text nor a `os.PathLike`, another URL, the home of nobody, an empty
        path, a NUL byte, a name that is too long.
    """
    if not isinstance(path, str | os.PathLike):
        kind = type(path).__name__
        raise ValueError(f"{shown(path)} must be a path, not {kind}")
    text = os.fsdecode(path)
    if not text:
        raise ValueError("a path is empty")
    if "\0" in text:
        raise ValueError(f"{shown(text)} has a NUL byte, which no path has")
    if is_url(text):
        raise ValueError(f"{shown(text)} is a URL, not a path of this machine")
    if _SCHEME.match(text):
        host, slash, rest = text.split("://", 1)[1].partition("/")
        if host not in ("", "localhost") or not slash:
            raise ValueError(f"{shown(text)}: file:///PATH is a file of this machine")
        text = slash + urllib.parse.unquote(rest)
    if text.startswith("~"):
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            raise ValueError(f"{shown(text)}: there is no home folder of that name")
        text = expanded
    longest = max(text.split("/"), key=len)
    for what, limit in ((text, 4095), (longest, 255)):  # Linux's limits, in bytes
        if (size := len(os.fsencode(what))) > limit:
            raise ValueError(
                f"{shown(text)}: a path or name of {size} bytes is longer than {limit}"
            )
    return Path(text)


def is_there(path: Path) -> bool:
    """Whether there is something that stands for a file, be it a link to nothing."""
    return os.path.lexists(path) and not path.is_dir()


def check_regular(path: Path) -> None:
    """Raises unless `path` is a file that holds what it stands for.

    Raises:
      FileNotFoundError, IsADirectoryError: as `open` does.
      ValueError: on a device, FIFO or socket, which may never end; on a pointer that
        Git LFS left in the place of a file; and on a large file of which hardly
        anything was ever written.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path} is a folder, not a file")
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "special")
        raise ValueError(f"{path} is {kind}, not a regular file")
    if status.st_size < 1024:  # a pointer has about 130 bytes
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ValueError(
                    f"{path} is a pointer of Git LFS, not the file itself: "
                    "`git lfs pull` fetches it"
                )
    if status.st_size >= _LARGE and _is_sparse(path, status.st_size):
        raise ValueError(
            f"{path} is sparse: hardly any of its {status.st_size:,} bytes were written"
        )


def _is_sparse(path: Path, size: int) -> bool:
    """Whether under an eighth of the file is more than a hole.

    The file system says where data lie (lseek's SEEK_DATA), so that compression makes
    no difference, as it would to the number of blocks. One that doesn't keep track of
    holes says that all is data.
    """
    data = end = 0
    with path.open("rb") as file:
        for _ in range(_EXTENTS):
            try:
                begin = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), begin, os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:  # not supported: nothing is known
                    return False
                end = size  # no data from there on
            else:
                data += end - begin
            if end >= size:
                break
    return data < end // 8


def parse_json(
    data: bytes | str, where: object, *, budget: Budget | None = None
) -> Any:
    """The value of a JSON text; a byte order mark is no part of it.

    Args:
      where: what the text is, for errors: a file, or a line of one.
      budget: of the file that it is a part of; None: of the text itself.

    Raises:
      ValueError: naming `where`, on what is not UTF-8, not JSON or nested too deep, or
        takes more than the budget.
    """
    if budget is None:
        budget = Budget(len(data))
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{where}: not UTF-8 ({reason})") from None
    try:
        # A container, item or pair takes under 88 bytes and is begun by one of these.
        items = sum(map(text.count, "[{,:"))
        budget.draw(len(data) + 2 * sys.getsizeof(text) + 88 * items)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({one_line(error, 100)})") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON (nested too deep)") from None


def read_json(path: Path, *, limit: int = 1 << 28) -> Any:
    """The value in a JSON file of at most `limit` bytes.

    Raises as `check_regular` and `parse_json` do, and ValueError on a larger file.
    """
    check_regular(path)
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, more than {limit:,}")
    return parse_json(path.read_bytes(), path)
