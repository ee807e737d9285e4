"""Token shards -> batches. An example is a function of (seed, its number) alone.

Example g of a run is the same window of tokens whatever the batch size and the number
of hosts, so the position in the data is one integer, and a host reads just its own
rows. NumPy only: nothing here knows of devices.
"""

import functools
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np

from gpt2_jax.data.prepare import load_index


class TokenDataset:
    """The tokens of one split of a prepared folder, memmapped.

    Raises as `load_index` does, and ValueError on a split that is not there.
    """

    def __init__(self, folder: str | Path, split: str):
        self.index = load_index(folder)
        if split not in self.index.splits:
            raise ValueError(
                f"{folder} has no {split} split, only {', '.join(self.index.splits)}"
            )
        self.folder, self.split = Path(folder), split
        dtype = np.dtype(self.index.dtype).newbyteorder("<")
        shards = self.index.splits[split].shards
        self._shards = [
            np.memmap(self.folder / shard.name, dtype, "r", shard.offset)
            for shard in shards
        ]
        self._begins = [0, *accumulate(shard.tokens for shard in shards)]

    def __len__(self) -> int:
        """Number of tokens."""
        return self._begins[-1]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """int32 [n, length]: the tokens from each of `starts`, int [n], on.

        Raises IndexError if a window leaves the split.
        """
        out = np.empty((len(starts), length), np.int32)
        for row, start in zip(out, np.asarray(starts).tolist(), strict=True):
            if start < 0 or start + length > len(self):
                raise IndexError(
                    f"window {start} + {length} exceeds {len(self)} tokens"
                )
            filled = 0
            while filled < length:
                at = bisect_right(self._begins, start + filled) - 1
                begin = start + filled - self._begins[at]
                part = self._shards[at][begin : begin + length - filled]
                row[filled : filled + len(part)] = part
                filled += len(part)
        return out


def windows_per_epoch(n_tokens: int, block_size: int) -> int:
    """Windows of an epoch: as many as fit whatever the phase, and at least one."""
    return max(1, (n_tokens - block_size) // block_size)


@functools.lru_cache(maxsize=2)
def _epoch(n_tokens: int, block_size: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [windows_per_epoch]: starts of the windows of an epoch, in its order."""
    count = windows_per_epoch(n_tokens, block_size)
    rng = np.random.default_rng([seed, epoch])
    phase = rng.integers(min(block_size, n_tokens - count * block_size))
    starts = phase + block_size * rng.permutation(count)
    starts.flags.writeable = False
    return starts


def train_examples(
    dataset: TokenDataset,
    numbers: np.ndarray,
    *,
    seed: int,
    block_size: int,
) -> np.ndarray:
    """int32 [n, block_size + 1]: the examples of a run of those numbers, int [n].

    Tokens [:, :-1] are inputs, [:, 1:] targets. In an epoch each window of `block_size`
    targets comes once, in an order and from a first token that (seed, epoch) decide.
    Any example is reached at once.

    Raises ValueError if a number is out of range or the split is shorter than
    block_size + 1.
    """
    if len(dataset) < block_size + 1:
        raise ValueError(
            f"the {dataset.split} split has {len(dataset)} tokens, fewer than "
            f"block_size + 1 = {block_size + 1}"
        )
    numbers = np.asarray(numbers, np.int64)
    least = int(numbers.min(initial=0))
    if block_size < 1 or seed < 0 or least < 0:
        raise ValueError(f"out of range: {block_size=}, {seed=} or number={least}")
    epochs, within = np.divmod(numbers, windows_per_epoch(len(dataset), block_size))
    starts = np.empty_like(within)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        starts[here] = _epoch(len(dataset), block_size, seed, epoch)[within[here]]
    return dataset.windows(starts, block_size + 1)


def eval_batches(
    dataset: TokenDataset,
    *,
    batch_size: int,
    block_size: int,
    max_examples: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The split in order: tokens int32 [B, T + 1] and mask bool [B, T] of its targets.

    Every token but the first is a target exactly once, so over all batches the masks
    add up to len(dataset) - 1; the end is padded with token 0 under mask False. At most
    `max_examples` rows that hold targets, from the beginning.

    Raises ValueError if a number is not positive or the split has no target.
    """
    if (
        batch_size < 1
        or block_size < 1
        or (max_examples is not None and max_examples < 1)
    ):
        raise ValueError(
            f"out of range: {batch_size=}, {block_size=} or {max_examples=}"
        )
    targets = len(dataset) - 1
    if targets < 1:
        raise ValueError(
            f"the {dataset.split} split has {len(dataset)} token: no target"
        )
    return _eval_batches(dataset, batch_size, block_size, max_examples)


def _eval_batches(
    dataset: TokenDataset, batch_size: int, block_size: int, max_examples: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    targets = len(dataset) - 1
    if max_examples is not None:
        targets = min(targets, max_examples * block_size)
    for first in range(0, targets, batch_size * block_size):
        starts = first + block_size * np.arange(batch_size)
        left = np.clip(targets - starts, 0, block_size)  # targets of each row
        mask = np.arange(block_size) < left[:, None]
        tokens = np.zeros((batch_size, block_size + 1), np.int32)
        whole = left == block_size
        tokens[whole] = dataset.windows(starts[whole], block_size + 1)
        for row in np.flatnonzero(~whole & (left > 0)):
            length = int(left[row]) + 1
            tokens[row, :length] = dataset.windows(starts[row, None], length)[0]
        yield tokens, mask
