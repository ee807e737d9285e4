"""What among the files of a run is a step."""

import os
import re
from pathlib import Path

NUMBER = re.compile(r"0|[1-9][0-9]*")  # a step's folder is named as Python writes ints
MANIFEST = "manifest.ocdbt"  # by which TensorStore finds what is in a database


def saved_steps(folder: Path) -> list[int]:
    """The numbers of the steps in a run's checkpoint folder, ascending.

    A step is a folder whose name is its number as Python writes it. Whatever else lies
    there is left alone, unless it has such a name: a step could not be saved there, or
    is one that can't be reached.

    Raises:
      ValueError: naming what has the name of a step and is no folder.
      OSError: when `folder` can't be listed.
    """
    if not os.path.lexists(folder):
        return []
    steps = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not NUMBER.fullmatch(entry.name):
                continue
            if not entry.is_dir(follow_symlinks=False):
                kind = "a symbolic link" if entry.is_symlink() else "no folder"
                raise ValueError(
                    f"{entry.path} has the name of a checkpoint and is {kind}: move it "
                    "elsewhere"
                )
            steps.append(int(entry.name))
    return sorted(steps)


def lacks_its_index(state: Path) -> bool:
    """Whether the databases of the processes are there, and none that joins them.

    This is what earlier versions left in a folder with `[`, `*` or `?` in its path.
    """
    return not (state / MANIFEST).exists() and bool(databases(state))


def databases(state: Path) -> list[Path]:
    """The folders that processes have written their arrays to."""
    if not state.is_dir():
        return []
    return [p for p in sorted(state.iterdir()) if (p / MANIFEST).exists()]
