"""Token shards -> batches. An example is a function of (seed, its number) alone.

Example g of a run is the same window of tokens whatever the batch size and the number
of hosts, so the position in the data is one integer, and a host reads just its own
rows. NumPy only: nothing here knows of devices.
"""

import dataclasses
import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from gpt2_jax.checks import check_choice
from gpt2_jax.data.prepare import load_index
from gpt2_jax.runtime.files import user_path


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
        self.folder, self.split = user_path(folder), split
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


def check_length(dataset: TokenDataset, block_size: int) -> None:
    """Raises ValueError when the split is shorter than block_size + 1, an example."""
    if len(dataset) < block_size + 1:
        raise ValueError(
            f"the {dataset.split} split of {dataset.folder} has {len(dataset)} tokens, "
            f"fewer than block_size + 1 = {block_size + 1}"
        )


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
    check_length(dataset, block_size)
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


class Batch(NamedTuple):
    """Examples in rows.

    Attributes:
      tokens: int32 [n, T + 1], inputs and targets overlapping.
      mask: bool [n, T], which targets count; None: all.
      segments: int32 [n, T], of the inputs: the texts that a row holds, numbered. None:
        all of a row is one.
    """

    tokens: np.ndarray
    mask: np.ndarray | None = None
    segments: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class InOrder:
    """Examples of a split in order, in which each target stands once.

    Attributes:
      count: how many.
      read: int [n] -> those of these numbers, with a mask. Numbers from `count` on are
        rows without a target.
    """

    count: int
    read: Callable[[np.ndarray], Batch]


def eval_examples(
    dataset: TokenDataset, block_size: int, max_examples: int | None = None
) -> InOrder:
    """Windows one after the other, at most `max_examples` of them.

    Every token but the first is a target exactly once, so over all examples the masks
    add up to len(dataset) - 1; the end is padded with token 0 under mask False.

    Raises ValueError if a number is not positive or the split has no target.
    """
    if block_size < 1 or (max_examples is not None and max_examples < 1):
        raise ValueError(f"out of range: {block_size=} or {max_examples=}")
    targets = len(dataset) - 1
    if targets < 1:
        raise ValueError(
            f"the {dataset.split} split has {len(dataset)} token: no target"
        )
    if max_examples is not None:
        targets = min(targets, max_examples * block_size)

    def read(numbers: np.ndarray) -> Batch:
        starts = block_size * np.asarray(numbers, np.int64)
        left = np.clip(targets - starts, 0, block_size)  # targets of each row
        mask = np.arange(block_size) < left[:, None]
        tokens = np.zeros((len(starts), block_size + 1), np.int32)
        whole = left == block_size
        tokens[whole] = dataset.windows(starts[whole], block_size + 1)
        for row in np.flatnonzero(~whole & (left > 0)):
            length = int(left[row]) + 1
            tokens[row, :length] = dataset.windows(starts[row, None], length)[0]
        return Batch(tokens, mask)

    return InOrder(-(-targets // block_size), read)


class Examples(Protocol):
    """One split of what a run is trained on, or evaluated."""

    def __len__(self) -> int:
        """Number of tokens."""

    def train(self, numbers: np.ndarray) -> Batch:
        """The examples of a run of those numbers, int [n]: each reached at once."""

    def evaluation(self, max_examples: int | None = None) -> InOrder:
        """The split, or its first examples."""


PACKINGS = ("flat", "documents")


class TextExamples:
    """Windows of one or several prepared folders.

    Under the packing "flat" a window is a text as any other. Under "documents" an end
    of text begins a segment, as it stands for the beginning where text is generated:
    what follows sees nothing before it.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        split: str,
        *,
        block_size: int,
        seed: int = 0,
        weights: Sequence[float] = (),
        packing: str = "flat",
    ):
        """Opens them.

        Args:
          weights: of the folders in the mixture, see `mixed`; of one: none.

        Raises:
          ValueError: on folders that were made with different tokenizers, on the
            packing "documents" where nothing stands between them, and as
            `TokenDataset`.
        """
        check_choice("data.packing", packing, PACKINGS)
        self.parts = [TokenDataset(folder, split) for folder in folders]
        first, *others = self.parts
        for other in others:
            if other.index.tokenizer_hash != first.index.tokenizer_hash:
                raise ValueError(
                    f"{other.folder} was made with another tokenizer than "
                    f"{first.folder}"
                )
        self.weights = tuple(weights)
        self.block_size, self.seed = block_size, seed
        self.eot_id = first.index.eot_id if packing == "documents" else None
        if packing == "documents" and self.eot_id is None:
            raise ValueError(
                "data.packing='documents' needs an end of text between them, and the "
                f"tokenizer of {first.folder} has none: data.packing='flat' needs none"
            )

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def train(self, numbers: np.ndarray) -> Batch:
        numbers = np.asarray(numbers, np.int64)
        sources, within = np.zeros_like(numbers), numbers
        if len(self.parts) > 1:
            sources, within = mixed(numbers, self.weights, self.seed)
        tokens = np.empty((len(numbers), self.block_size + 1), np.int32)
        for i in np.unique(sources).tolist():
            tokens[sources == i] = train_examples(
                self.parts[i],
                within[sources == i],
                seed=self.seed,
                block_size=self.block_size,
            )
        return Batch(tokens, None, self._segments(tokens))

    def evaluation(self, max_examples: int | None = None) -> InOrder:
        """One folder after another, each up to `max_examples`."""
        every = [eval_examples(x, self.block_size, max_examples) for x in self.parts]
        ends = np.cumsum([part.count for part in every])

        def read(numbers: np.ndarray) -> Batch:
            at = np.minimum(np.searchsorted(ends, numbers, "right"), len(ends) - 1)
            tokens = np.empty((len(numbers), self.block_size + 1), np.int32)
            mask = np.empty((len(numbers), self.block_size), bool)
            for i in np.unique(at).tolist():
                first = ends[i] - every[i].count
                part = every[i].read(numbers[at == i] - first)
                tokens[at == i], mask[at == i] = part.tokens, part.mask
            return Batch(tokens, mask, self._segments(tokens))

        return InOrder(int(ends[-1]), read)

    def _segments(self, tokens: np.ndarray) -> np.ndarray | None:
        if self.eot_id is None:
            return None
        return np.cumsum(tokens[:, :-1] == self.eot_id, axis=1, dtype=np.int32)


MIXED = 1000  # examples in which sources have their shares


def mixed(
    numbers: np.ndarray, weights: Sequence[float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Examples of a mixture -> (source, the number of the example there), int64 [n].

    Of each thousand examples a source has its share, to the nearest one, in an order
    that (seed, thousand) decide. A source's own examples come in their order, none left
    out.

    Raises ValueError on a weight that has no share.
    """
    shares = mixture_shares(weights)
    block, at = np.divmod(np.asarray(numbers, np.int64), MIXED)
    sources, within = np.empty_like(at), np.empty_like(at)
    for b in np.unique(block).tolist():
        here = block == b
        order, rank = _mixed_block(shares, seed, b)
        sources[here] = order[at[here]]
        within[here] = b * np.array(shares)[sources[here]] + rank[at[here]]
    return sources, within


def mixture_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Examples of each source in a thousand; the largest remainders are rounded up.

    Raises ValueError on a weight that is not positive, or too small for one.
    """
    if not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(f"data.mixture: weights {list(weights)} must be > 0")
    exact = np.array(weights, float) / math.fsum(weights) * MIXED
    shares = np.floor(exact).astype(int)
    largest = np.argsort(shares - exact, kind="stable")
    shares[largest[: MIXED - shares.sum()]] += 1
    if not shares.all():
        raise ValueError(
            f"data.mixture: a weight of {list(weights)} has no share of a thousand"
        )
    return tuple(shares.tolist())


@functools.lru_cache(maxsize=4)
def _mixed_block(
    shares: tuple[int, ...], seed: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sources of a thousand examples, and how many of the same come before each."""
    rng = np.random.default_rng([seed, block, MIXED])
    order = rng.permutation(np.repeat(np.arange(len(shares)), shares))
    rank = np.empty_like(order)
    for source, share in enumerate(shares):
        rank[order == source] = np.arange(share)
    return order, rank
