"""Files that somebody else wrote: which are taken, and JSON in them."""

import json
import os
import re
import stat
import urllib.parse
from pathlib import Path
from typing import Any

from gpt2_jax.checks import one_line, shown

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
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


def check_regular(path: Path) -> None:
    """Raises unless `path` is a file that holds what it stands for.

    Raises:
      FileNotFoundError, IsADirectoryError: as `open` does.
      ValueError: on a device, FIFO or socket, which may never end, and on a pointer
        that Git LFS left in the place of a file.
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


def parse_json(data: bytes | str, where: object) -> Any:
    """The value of a JSON text; a byte order mark is no part of it.

    Args:
      where: what the text is, for errors: a file, or a line of one.

    Raises:
      ValueError: naming `where`, on what is not UTF-8, not JSON or nested too deep.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return json.loads(text.removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{where}: not UTF-8 ({reason})") from None
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
