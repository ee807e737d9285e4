"""Batches on a mesh: each host reads its own part, and prefetches the next batch."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.data.loader import Batch, Examples, InOrder
from gpt2_jax.runtime import sharding
from gpt2_jax.training.config import BEGINNING, Position, TrainConfig

T = TypeVar("T")


def shard_batch(
    read: Callable[[np.ndarray], Batch],
    number_AB: np.ndarray,
    block_size: int,
    mesh: Mesh,
) -> tuple[jax.Array | None, ...]:
    """Tokens int32 [..., B, T + 1], mask bool and segments int32 [..., B, T] or None.

    Args:
      read: int [n] -> the examples of those numbers. Each host asks for the rows of its
        own devices only.
      number_AB: int [..., B], of the examples; B is spread over the mesh.
    """
    axis = number_AB.ndim - 1
    to = sharding.batch_sharding(mesh, ndim=axis + 2, axis=axis)
    parts: dict[bytes, Batch] = {}  # what the devices here hold, each read once

    def part(field: int, index: tuple[slice, ...]) -> np.ndarray:
        mine = number_AB[index[:-1]]
        key = mine.tobytes()
        if key not in parts:
            parts[key] = read(mine.ravel())
        array = parts[key][field]
        assert array is not None
        return array.reshape(*mine.shape, -1)

    arrays: list[jax.Array | None] = []
    for field, size in enumerate((block_size + 1, block_size, block_size)):
        if any(held[field] is None for held in parts.values()):
            arrays.append(None)
            continue
        shape = (*number_AB.shape, size)
        arrays.append(jax.make_array_from_callback(shape, to, partial(part, field)))
    return tuple(arrays)


def in_order(
    examples: InOrder, batch_size: int, block_size: int, mesh: Mesh
) -> Iterator[tuple[jax.Array | None, ...]]:
    """All examples, batch by batch; empty ones fill the last batch up.

    Raises ValueError when `batch_size` can't be spread evenly over the mesh.
    """
    shards = sharding.n_batch_shards(mesh)
    if batch_size % shards:
        raise ValueError(
            f"a microbatch of {batch_size} examples does not divide by the "
            f"{shards} devices it is spread over"
        )
    return (
        shard_batch(examples.read, np.arange(i, i + batch_size), block_size, mesh)
        for i in range(0, examples.count, batch_size)
    )


def global_batch(
    source: Examples,
    cfg: TrainConfig,
    mesh: Mesh,
    step: int,
    since: Position = BEGINNING,
) -> tuple[jax.Array | None, ...]:
    """The batch of a step as `train_step` takes it: tokens, mask and segments.

    Tokens are int32 [A, B, T + 1], and B is sharded over the mesh; example i of the
    batch is [i // B, i % B].
    """
    examples = np.array(cfg.batch(step, since))
    number_AB = examples.reshape(cfg.microbatches(len(examples), mesh), -1)
    return shard_batch(source.train, number_AB, cfg.block_size, mesh)


class Prefetcher(Generic[T]):
    """Prepares the next step's batch in a thread while the device computes this one."""

    def __init__(self, make: Callable[[int], T], steps: range) -> None:
        self._make, self._steps = make, steps
        self._pool = ThreadPoolExecutor(1, "batches")
        self._coming: dict[int, Future[T]] = {}
        self._waited = 0.0

    def get(self, step: int) -> T:
        """The batch of one of the steps."""
        start = time.perf_counter()
        self.begin(step)
        batch = self._coming.pop(step).result()
        self._waited += time.perf_counter() - start
        return batch

    def begin(self, step: int) -> None:
        """Begins to prepare one, best when the device is busy: threads share Python."""
        if step in self._steps and step not in self._coming:
            self._coming[step] = self._pool.submit(self._make, step)

    def take_waited(self) -> float:
        """Seconds that were spent in `get` since the last call of this method."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
