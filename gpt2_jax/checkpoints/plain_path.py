"""Names under which a folder can be given to Orbax and TensorStore.

They read a path as more than a path: Orbax looks for files by a pattern that holds the
whole path, so that `[`, `*` and `?` in it match something else or nothing, and
TensorStore takes `\\` for `/` and no bytes that are not UTF-8.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

_MISREAD = re.compile(r"[*?\[\\\ud800-\udfff]")  # surrogates stand for such bytes
_LONGEST = 2048  # bytes; the system's limit of 4096 is to hold what they add


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """An absolute path of a folder that libraries read as it is, while entered.

    That of the folder itself, if it can be; otherwise that of a symbolic link to it, in
    a private folder for temporary files.

    Raises:
      OSError: when there is no place for such a link.
    """
    folder = folder.absolute()
    if not _is_misread(folder):
        yield folder
        return
    places = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    place = next((p for p in places if not _is_misread(p)), None)
    with tempfile.TemporaryDirectory(prefix="gpt2_jax-", dir=place) as private:
        link = Path(private) / "folder"
        link.symlink_to(folder, target_is_directory=True)
        yield link


def _is_misread(path: Path) -> bool:
    return bool(_MISREAD.search(str(path))) or len(os.fsencode(path)) > _LONGEST
