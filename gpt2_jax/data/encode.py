"""What a preparation has to do: pieces of text, each to a split, encoded by threads."""

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from gpt2_jax.data import sources
from gpt2_jax.data.records import Records
from gpt2_jax.data.shards import SPLITS
from gpt2_jax.data.sources import Document
from gpt2_jax.data.stored import Cursor
from gpt2_jax.tokenizers.protocol import Tokenizer

BATCH_BYTES = 1 << 18  # of text that a thread encodes at a time, about


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [start, stop) of a document, or all of a file of many.

    `split` is where it goes; None: by the hash of each document.
    """

    source: Document | Records
    start: int
    stop: int
    split: str | None


def make_plan(
    found: Sequence[Document | Records], fractions: Sequence[float], seed: int
) -> list[Piece]:
    texts = [source for source in found if isinstance(source, Document)]
    if len(texts) < len(found):
        return [Piece(source, 0, source.size or 0, None) for source in found]
    order = np.random.default_rng(seed).permutation(len(texts))
    return _cut([texts[i] for i in order], fractions)


def _cut(found: Sequence[Document], fractions: Sequence[float]) -> list[Piece]:
    """The pieces of all splits, one split after the other."""
    ends = list(accumulate(document.size for document in found))
    total = ends[-1]
    last = max(i for i, fraction in enumerate(fractions) if fraction)
    cuts = [0]
    for i in range(len(fractions)):
        cut = total if i >= last else int(total * math.fsum(fractions[: i + 1]))
        at = bisect_left(ends, cut)
        begin = ends[at] - found[at].size
        cuts.append(begin + found[at].character_start(cut - begin))
    pieces = []
    for name, fraction, (low, high) in zip(
        SPLITS, fractions, pairwise(cuts), strict=True
    ):
        if not fraction:
            continue
        if low == high:
            raise ValueError(
                f"the {name} split, {fraction:g} of {total} bytes of text, is empty"
            )
        pieces += [
            Piece(document, max(low - begin, 0), min(high - begin, document.size), name)
            for document, end in zip(found, ends, strict=True)
            if (begin := end - document.size) < high and end > low
        ]
    return pieces


@dataclass(slots=True)
class Counts:
    """What a split holds; bytes are those of its text."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """Text that is encoded in one go, of the source `name`.

    `split` None: by its hash. `last`: of its document in this split; `ends`: of it all.
    """

    name: str
    text: str
    split: str | None
    last: bool
    ends: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Parts that are encoded together; the text goes on at `piece` and `place`.

    `place` is None in the middle of a document of a file of many.
    """

    parts: list[Part]
    piece: int
    place: Cursor | None
    size: int  # stored bytes


Encoded = dict[str, tuple[np.ndarray, Counts]]


class Job:
    """What every part is encoded by."""

    def __init__(
        self, tokenizer: Tokenizer, dtype: str, fractions: Sequence[float], seed: int
    ):
        self.tokenizer, self.dtype, self.seed = tokenizer, dtype, seed
        self._bounds = list(accumulate(fractions))
        self._last = max(i for i, fraction in enumerate(fractions) if fraction)

    def split_of(self, text: str) -> str:
        """By the hash of seed and text: the same text is always in the same split."""
        key = self.seed.to_bytes(8, "little")
        digest = hashlib.blake2b(text.encode(), digest_size=8, key=key).digest()
        at = int.from_bytes(digest, "little") / 2**64
        return SPLITS[min(bisect_right(self._bounds, at), self._last)]

    def encode(self, parts: Sequence[Part]) -> Encoded:
        """The ids of each split, in order, and what they are."""
        order = np.dtype(self.dtype).newbyteorder("<")
        eot_id, unk_id = self.tokenizer.eot_id, self.tokenizer.unk_id
        end = np.array([] if eot_id is None else [eot_id], np.int64)
        arrays: dict[str, list[np.ndarray]] = {}
        counts: dict[str, Counts] = {}
        for part in parts:
            split = part.split or self.split_of(part.text)
            try:
                ids = self.tokenizer.encode_array(part.text)
            except ValueError as error:
                raise ValueError(f"{part.name}: {error}") from None
            after = end if part.ends else end[:0]
            arrays.setdefault(split, []).extend((ids, after))
            count = counts.setdefault(split, Counts())
            count.documents += part.last
            count.bytes += len(part.text.encode())
            count.tokens += len(ids) + len(after)
            if unk_id is not None:
                count.unknown += int((ids == unk_id).sum())
        return {
            split: (np.concatenate(found).astype(order), counts[split])
            for split, found in arrays.items()
        }


def encoded(
    job: Job, plan: Sequence[Piece], first: int, place: Cursor, threads: int
) -> Generator[tuple[Batch, Encoded]]:
    """Each batch from `place` in the piece `first` on; some are in work at a time."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[Batch, Future[Encoded]]] = deque()
        try:
            for batch in _batches(job, plan, first, place):
                pending.append((batch, pool.submit(job.encode, batch.parts)))
                if len(pending) > 2 * threads:
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
            while pending:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(
    job: Job, plan: Sequence[Piece], first: int, place: Cursor
) -> Iterator[Batch]:
    parts: list[Part] = []
    length = size = 0
    for n in range(first, len(plan)):
        found = plan[n].source
        stream = _of_text if isinstance(found, Document) else _of_records
        for part, after, read in stream(job, plan[n], place):
            parts.append(part)
            length, size = length + len(part.text), size + read
            if length >= BATCH_BYTES:
                yield Batch(parts, n, after, size)
                parts, length, size = [], 0, 0
        place = Cursor()
    if parts:
        yield Batch(parts, len(plan), Cursor(), size)


_Parts = Iterator[tuple[Part, Cursor | None, int]]  # place after it, bytes read


def _of_text(job: Job, piece: Piece, place: Cursor) -> _Parts:
    document = piece.source
    assert isinstance(document, Document)
    split = piece.split or job.split_of(next(document.texts(), ""))
    at = place.offset or piece.start
    for text, after in document.read(at, piece.stop):
        size, at = after - at, after
        last = at == piece.stop
        ends = at == document.size
        yield Part(document.name, text, split, last, ends), Cursor(at), size


def _of_records(job: Job, piece: Piece, place: Cursor) -> _Parts:
    records = piece.source
    assert isinstance(records, Records)
    before = place.offset
    for text, after in records.read(place):
        size, before = after.offset - before, after.offset
        if len(text) <= sources.BLOCK_BYTES:
            yield Part(records.name, text, None, True, True), after, size
        else:
            split, content = job.split_of(text), text.encode()
            del text
            whole = Document(records.name, len(content), text=content)
            for part, _, _ in _of_text(
                job, Piece(whole, 0, whole.size, split), Cursor()
            ):
                yield part, after if part.last else None, size * part.last
