"""A tensor in a file: its shape and dtype are known, its numbers are read when asked.

Every reader of a foreign format gives `{name: Tensor}`, so that a model is loaded one
tensor at a time, straight to where it shall live.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Attributes:
    shape, dtype: of what `read` gives (bfloat16 as ml_dtypes' type).
    read: the numbers, memmapped where they can be; the caller copies what it keeps.
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
          ValueError: when the file ends before they do.
        """
        end = offset + math.prod(shape) * dtype.itemsize
        size = path.stat().st_size
        if end > size:
            raise ValueError(f"{path} is cut: {size} bytes, its header needs {end}")

        def read() -> np.ndarray:
            flat = np.memmap(path, np.uint8, "r", offset, (end - offset,))
            return flat.view(dtype).reshape(shape)

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
