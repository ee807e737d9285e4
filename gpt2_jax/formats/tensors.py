"""A tensor in a file: its shape and dtype are known, its numbers are read when asked.

Every reader of a foreign format gives `{name: Tensor}`, so that a model is loaded one
tensor at a time, straight to where it shall live.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Attributes:
    shape, dtype: of what `read` gives (bfloat16 as ml_dtypes' type).
    read: the numbers; the caller copies what it keeps.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> Self:
        return cls(array.shape, array.dtype, lambda: array)

    @classmethod
    def in_file(
        cls, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> Self:
        """Contiguous numbers of a file from byte `offset` on.

        Raises:
          ValueError: when the file ends before they do; in `read`, when its size is
            another by then.
        """
        end = offset + math.prod(shape) * dtype.itemsize
        size = path.stat().st_size
        if end > size:
            raise ValueError(f"{path} is cut: {size} bytes, its header needs {end}")

        def read() -> np.ndarray:
            count = math.prod(shape)
            return read_numbers(path, size, offset, count, dtype).reshape(shape)

        return cls(shape, dtype, read)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def then(
        self, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]
    ) -> Self:
        """The numbers after a `change`, such as a transpose, as an array of `shape`."""
        return dataclasses.replace(
            self, shape=shape, read=lambda: change(self.read()).reshape(shape)
        )

    def reshaped(self, *shape: int) -> Self:
        return self.then(shape, lambda x: x)

    def transposed(self) -> Self:
        """A matrix with its two axes exchanged."""
        return self.then(self.shape[::-1], lambda x: x.T)


def read_numbers(
    path: Path, size: int, offset: int, count: int, dtype: np.dtype
) -> np.ndarray:
    """`count` numbers of a file from byte `offset` on.

    This is no memmap: a file that is cut while it is mapped ends the process.

    Args:
      size: of the file when it was opened.

    Raises:
      ValueError: when its size is another by now.
    """
    array = np.empty(count, dtype)
    with path.open("rb") as file:
        file.seek(offset)
        found = file.readinto(array.view(np.uint8).data)
        now = os.fstat(file.fileno()).st_size
    if found != array.nbytes or now != size:
        raise ValueError(
            f"{path} changed while it was read: {size:,} bytes, now {now:,}"
        )
    return array


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and equal numbers, whatever their dtypes.

    They are compared in parts, in float64, which holds all of any float's values.
    """
    if a is b:
        return True
    if a.shape != b.shape:
        return False
    x, y = np.atleast_1d(a.read()), np.atleast_1d(b.read())
    step = max(1, len(x) * 2**18 // max(1, x.size))
    return all(
        np.array_equal(
            x[i : i + step].astype(np.float64),
            y[i : i + step].astype(np.float64),
            equal_nan=True,
        )
        for i in range(0, len(x), step)
    )
