"""What a preparation has done: shards that grow, in a folder that a kill leaves whole.

`<out>.partial` is where they grow. Its state.json says how far each has been written to
the disk, and where in the text that is: a run that was killed goes on from there.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gpt2_jax.data.encode import Counts
from gpt2_jax.data.shards import SPLITS, Index, Shard, Split
from gpt2_jax.data.stored import Cursor
from gpt2_jax.runtime.lock import Lock


@dataclass(slots=True)
class State:
    """How far a preparation has come.

    Attributes:
      piece, place: of the plan, where the text goes on.
      done: stored bytes that have been read.
      dtype: of the shards.
      counts: of each split, what has been written.
    """

    piece: int
    place: Cursor
    done: int
    dtype: str
    counts: dict[str, Counts]


class Writer:
    """The shards of a split, which grow at their end.

    It takes them up where `counts`, which it then keeps, says that they are.
    """

    def __init__(
        self, folder: Path, split: str, dtype: str, shard_tokens: int, counts: Counts
    ):
        self.folder, self.split, self.counts = folder, split, counts
        self._width, self._full = np.dtype(dtype).itemsize, shard_tokens
        self._file: BinaryIO | None = None
        number, self._filled = divmod(counts.tokens, shard_tokens)
        for path in folder.glob(f"{split}-*.bin"):
            if int(path.stem.rpartition("-")[2]) >= number + (self._filled > 0):
                path.unlink()
        if self._filled:
            self._file = self._path(number).open("r+b")
            self._file.truncate(self._filled * self._width)
            self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05d}.bin"

    def write(self, ids: np.ndarray, counts: Counts) -> bool:
        """Whether a shard has become full."""
        ended = False
        while ids.size:
            if self._file is None:
                number = self.counts.tokens // self._full
                self._file, self._filled = self._path(number).open("wb"), 0
            now = ids[: self._full - self._filled]
            self._file.write(now.data)
            self._filled += now.size
            self.counts.tokens += now.size
            ids = ids[now.size :]
            if self._filled == self._full:
                self.sync()
                self._file.close()
                self._file, ended = None, True
        self.counts.documents += counts.documents
        self.counts.bytes += counts.bytes
        self.counts.unknown += counts.unknown
        return ended

    def sync(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def summary(self) -> Split:
        shards = [
            Shard(self._path(n).name, min(self._full, self.counts.tokens - at))
            for n, at in enumerate(range(0, self.counts.tokens, self._full))
        ]
        return Split(**asdict(self.counts), shards=tuple(shards))


_OUR_NAMES = re.compile(
    rf"(index|state)\.json|tokenizer|\.lock|({'|'.join(SPLITS)})-\d{{5,}}\.bin"
)


def is_ours(folder: Path) -> bool:
    """Whether nothing is in it but what `prepare` writes: it may be replaced."""
    return all(_OUR_NAMES.fullmatch(path.name) for path in folder.iterdir())


class PartialFolder:
    """The folder `<out>.partial`, which one process at a time may use."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self._state = self.folder / "state.json"
        self._request: Mapping[str, Any] = {}

    def __enter__(self) -> "PartialFolder":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder / ".lock", f"preparing {self.out}")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What bad input left is of no use; what was interrupted can go on.
        failed = kind is not None and issubclass(kind, ValueError) and self._request
        if failed or (kind is not None and not self._state.exists()):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def holds(self, name: str) -> bool:
        return Path(name).parent == self.folder

    def resume(self, request: Mapping[str, Any]) -> State | None:
        """What an earlier run of the same request has left; without, a clean folder.

        Raises FileExistsError where it left something of another request.
        """
        if self._state.is_file():
            try:
                kept = json.loads(self._state.read_bytes())
                asked, state = kept["request"], _read_state(kept)
            except (ValueError, KeyError, TypeError):
                asked, state = {}, None
            text = ("bytes", "documents")  # changed: nobody can finish that one
            for name in sorted(asked.keys() - text):
                if asked[name] != request.get(name):
                    raise FileExistsError(
                        f"{self.folder} holds an unfinished preparation with {name}="
                        f"{asked[name]}, this one has {request.get(name)}: finish that "
                        f"one, or remove the folder"
                    )
            self._request = dict(request)
            if state is not None and asked == request and self._is_whole(state):
                return state
        self._request = dict(request)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != ".lock" and not path.name.startswith("stdin"):
                path.unlink()
        return None

    def _is_whole(self, state: State) -> bool:
        """Whether the shards are as long as was committed."""
        full = self._request["shard_tokens"]
        for name, counts in state.counts.items():
            for n, at in enumerate(range(0, counts.tokens, full)):
                path = self.folder / f"{name}-{n:05d}.bin"
                width = np.dtype(state.dtype).itemsize
                needed = width * min(full, counts.tokens - at)
                if not path.is_file() or path.stat().st_size < needed:
                    return False
        return (self.folder / "tokenizer").is_dir()

    def commit(self, state: State, writers: Iterable[Writer]) -> None:
        """From now on a killed run goes on at `state`."""
        for writer in writers:
            writer.sync()
        write_json(self._state, {"request": self._request, **asdict(state)})

    def publish(self, index: Index) -> None:
        """The folder becomes `out`."""
        write_json(self.folder / "index.json", asdict(index))
        for path in self.folder.glob("stdin*"):
            path.unlink()
        old = self.out.with_name(f"{self.out.name}.old")
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.folder.rename(self.out)
        _sync(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)
        for name in (self._state.name, ".lock"):
            (self.out / name).unlink(missing_ok=True)


def _read_state(kept: Mapping[str, Any]) -> State:
    counts = {name: Counts(**values) for name, values in kept["counts"].items()}
    return State(
        kept["piece"], Cursor(**kept["place"]), kept["done"], kept["dtype"], counts
    )


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """JSON that is there whole, or as it was before, whenever the machine stops."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
