"""Text -> token shards: a folder that `gpt2_jax.data.loader` reads by memmap.

    index.json              what is here: see `shards.Index`
    tokenizer/              the tokenizer's files
    train-00000.bin ...     token ids, little-endian uint16 or uint32, no header
    validation-00000.bin
    test-00000.bin

Text files, a document each, are put in a seeded order and laid end to end; the line of
all their bytes is cut at the given fractions, where need be inside a document, at the
start of a character. As soon as there are files of many documents, whose number and
sizes nobody knows beforehand, the documents keep their order and the hash of seed and
text decides the split of each. The end-of-text token follows each document's end.

The folder is written beside as `<out>.partial` and renamed when it is complete. Its
state.json says how far every shard has been written to the disk, and where in the text
that is: a run that was killed goes on from there, to the same bytes.
"""

import contextlib
import fcntl
import hashlib
import heapq
import json
import math
import os
import re
import shutil
import sys
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from gpt2_jax.data import foreign, sources
from gpt2_jax.data.shards import (
    SPLITS,
    VERSION,
    Index,
    Shard,
    Split,
    dtype_for,
    read_index,
)
from gpt2_jax.data.sources import Document, Paths, Place, Records
from gpt2_jax.tokenizer import (
    SENTENCEPIECE_MODELS,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    check_special_tokens,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_byte_level_bpe,
    train_sentencepiece,
)

KINDS = ("sentencepiece", "char", "bytes")
TRAINING_BYTES = 20_000_000  # SentencePiece is trained on at most this much text
SAMPLE_PART = 10_000  # characters
BATCH_BYTES = 1 << 18  # of text that a thread encodes at a time, about
COMMIT_SECONDS = 5.0  # of work that a kill can cost

Progress = Callable[[int, int | None, int], object]


def build_tokenizer(
    kind: str,
    path: Paths | None = None,
    vocab_size: int | None = None,
    *,
    field: str = "text",
    form: str = "auto",
) -> Tokenizer:
    """The tokenizer of a run.

    Args:
      kind: "sentencepiece" trains one of `vocab_size` pieces on the first 20 MB of the
        source, "char" takes all its characters, "bytes" needs no text; anything else is
        the path of a given tokenizer, as for `load_tokenizer`.
      path, field, form: the text, as for `sources.documents`.
      vocab_size: needed for "sentencepiece"; elsewhere None, or what must come out.

    Raises ValueError if vocab_size is missing or is not what the tokenizer has.
    """
    if kind == "sentencepiece":
        if vocab_size is None:
            raise ValueError("a sentencepiece tokenizer needs vocab_size")
        return train_sentencepiece(
            _first(_texts(path, field, form), TRAINING_BYTES), vocab_size
        )
    tokenizer: Tokenizer
    if kind == "char":
        tokenizer = CharTokenizer.train(_texts(path, field, form))
    elif kind == "bytes":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = load_tokenizer(kind)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"{vocab_size=}, but the tokenizer {kind!r} has {tokenizer.vocab_size}"
        )
    return tokenizer


def sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """At most `max_bytes` of all texts, in their order, chosen by seed and content.

    Texts are cut in parts of some 10,000 characters, of which those with the least
    hashes are kept: one pass, and no more memory than what is kept.
    """
    if max_bytes < 1:
        raise ValueError(f"{max_bytes=} is not positive")
    key = seed.to_bytes(8, "little")
    kept: list[tuple[bytes, int, str]] = []  # a heap: the greatest hash is first
    size = number = 0
    for text in texts:
        for at in range(0, len(text), SAMPLE_PART):
            part = text[at : at + SAMPLE_PART]
            content = part.encode()
            digest = hashlib.blake2b(content, digest_size=16, key=key).digest()
            inverse = bytes(255 - byte for byte in digest)
            heapq.heappush(kept, (inverse, number, part))
            size, number = size + len(content), number + 1
            while size > max_bytes:
                size -= len(heapq.heappop(kept)[2].encode())
    return [part for _, _, part in sorted(kept, key=lambda entry: entry[1])]


def train_tokenizer(
    path: Paths | None,
    out: str | Path,
    vocab_size: int,
    *,
    model: str = "bpe",
    byte_fallback: bool = True,
    special_tokens: Sequence[str] = (),
    max_bytes: int | None = None,
    seed: int = 0,
    field: str = "text",
    form: str = "auto",
) -> Tokenizer:
    """Trains a tokenizer into the folder `out`, which appears whole or not at all.

    Args:
      path, field, form: the text, as for `sources.documents`.
      out: the folder to make.
      vocab_size: number of ids, special tokens included.
      model: bpe, unigram or char of SentencePiece, or byte_level: GPT-2's kind.
      byte_fallback, special_tokens: as for `train_sentencepiece`.
      max_bytes: train on a `sample` of so many; None: on all, which is held in memory.
      seed: of the sample.

    Raises FileExistsError if `out` is there; ValueError and OSError as
    `sources.documents`, `train_sentencepiece` and `train_byte_level_bpe`.
    """
    out = Path(out).absolute()
    if out.exists():
        raise FileExistsError(f"{out} exists already")
    if model not in (allowed := (*SENTENCEPIECE_MODELS, "byte_level")):
        raise ValueError(f"{model=} is not one of {', '.join(allowed)}")
    _check_seed(seed)
    check_special_tokens(special_tokens)
    texts: Iterable[str] = _texts(path, field, form)
    if max_bytes is not None:
        texts = sample(texts, max_bytes, seed)
    tokenizer: Tokenizer
    if model == "byte_level":
        if not byte_fallback:
            raise ValueError("byte_fallback=False: a byte-level BPE has nothing else")
        tokenizer = train_byte_level_bpe(
            texts, vocab_size, special_tokens=special_tokens
        )
    else:
        tokenizer = train_sentencepiece(
            texts,
            vocab_size,
            model_type=model,
            byte_fallback=byte_fallback,
            special_tokens=special_tokens,
        )
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_tokenizer(tokenizer, partial)
    partial.rename(out)
    return tokenizer


def _texts(path: Paths | None, field: str, form: str) -> Iterator[str]:
    for document in sources.documents(path, field=field, form=form):
        yield from document.texts()


def _first(texts: Iterator[str], size: int) -> Iterator[str]:
    """Texts, until about `size` characters have passed."""
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


def fingerprint(
    path: Paths | None,
    *,
    tokenizer: str,
    vocab_size: int | None,
    splits: Sequence[float] = (0.9, 0.05, 0.05),
    seed: int = 0,
    field: str = "text",
    form: str = "auto",
) -> dict[str, Any]:
    """What prepared data depend on, in JSON's types, so that two can be compared.

    Files count by name, size and time of modification; a tokenizer that is a path, by
    its content. The text itself is not read.
    """
    found = sources.documents(path, field=field, form=form)
    if tokenizer not in KINDS:
        tokenizer = tokenizer_hash(load_tokenizer(tokenizer))
    return {
        **_text_fingerprint(path, found, splits, seed),
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
    }


def _text_fingerprint(
    path: Paths | None,
    found: Sequence[Document | Records],
    splits: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for source in found:
        digest.update(f"{source.name}\0{source.size}\0".encode())
        if isinstance(source, Document) and source.text is not None:
            digest.update(source.text)
        else:
            digest.update(f"{source.stamp}\0".encode())
        if isinstance(source, Records):
            digest.update(f"{source.form}\0{source.field}\0".encode())
    return {
        "path": None if path is None else _absolute(path),
        "bytes": sum(source.size or 0 for source in found),
        "documents": digest.hexdigest(),
        "splits": [float(fraction) for fraction in splits],
        "seed": seed,
    }


def _absolute(path: Paths) -> Any:
    if not isinstance(path, str | Path):
        return [_absolute(each) for each in path]
    return str(path) if ":" in str(path) else str(Path(path).resolve())


def prepare(
    path: Paths | None,
    out: str | Path,
    tokenizer: Tokenizer | str,
    *,
    vocab_size: int | None = None,
    splits: Sequence[float] = (0.9, 0.05, 0.05),
    seed: int = 0,
    field: str = "text",
    form: str = "auto",
    shard_tokens: int = 100_000_000,
    threads: int | None = None,
    source: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    progress: Progress = lambda done, total, tokens: None,
) -> Index:
    """Tokenizes a source into the folder `out`, in constant memory.

    The folder appears at once, when it is complete. A call that was killed goes on when
    it is made again; one that fails by bad input leaves nothing. A folder of prepared
    data that is there is replaced.

    Args:
      path: the text, as for `sources.documents`, or None for the default corpus. "-" is
        standard input, which is stored beside the shards until they are done. A folder
        of shards that others made (`foreign`) is referred to as it is: only tokenizer,
        as far as it is a path or an object, and dtype count then.
      out: the folder to make.
      tokenizer: one, or what `build_tokenizer` takes.
      vocab_size: for `build_tokenizer`.
      splits: fractions of train, validation and test text; they add up to 1.
      seed: of the order of documents, or of their splits.
      field, form: as for `sources.documents`.
      shard_tokens: tokens in a shard file, at most.
      threads: that encode, about 12 MB of memory each; None is one a core, up to 8.
        They change nothing in the result.
      source: the fingerprint to store; by default that of this call, with the
        tokenizer's kind and vocabulary size where a tokenizer is given.
      dtype: of others' shards, as for `foreign.read_index`.
      progress: called with the stored bytes that are done, how many there are or None
        where nobody knows, and the number of tokens.

    Raises FileNotFoundError or ValueError on a source without text or that is not
    UTF-8, ValueError on bad fractions and on a split that would be empty,
    FileExistsError if `out` holds anything but prepared data, BlockingIOError while
    another process prepares it.
    """
    out = _place(out)
    fractions = _checked(splits)
    if shard_tokens < 1:
        raise ValueError(f"{shard_tokens=} is not positive")
    threads = min(os.cpu_count() or 1, 8) if threads is None else threads
    if threads < 1:
        raise ValueError(f"{threads=} is not positive")
    _check_seed(seed)
    if isinstance(tokenizer, str) and tokenizer not in KINDS:
        tokenizer = build_tokenizer(tokenizer, vocab_size=vocab_size)
    given = [path] if path is None or isinstance(path, str | Path) else list(path)
    if len(given) == 1 and foreign.is_foreign(given[0]):
        return _refer(Path(str(given[0])), out, tokenizer, dtype)
    if dtype is not None:
        raise ValueError(f"{dtype=} is of token shards, and {path} holds none")
    if "-" not in given:
        found = sources.documents(path, field=field, form=form)

    with contextlib.ExitStack() as stack:
        work = stack.enter_context(_Workplace(out))
        if "-" in given:
            path, digest = work.store_stdin(given, form)
            found = [
                replace(each, stamp=digest) if work.holds(each.name) else each
                for each in sources.documents(path, field=field, form=form)
            ]
        asked = _text_fingerprint(path, found, splits, seed)
        if isinstance(tokenizer, str):
            asked |= {"tokenizer": tokenizer, "vocab_size": vocab_size}
            request = asked
        else:
            asked |= {"tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
            request = {**asked, "tokenizer": tokenizer_hash(tokenizer)}
        plan = _plan(found, fractions, seed)
        names = [n for n, part in zip(SPLITS, fractions, strict=True) if part]
        state = work.resume({**request, "shard_tokens": shard_tokens})
        if isinstance(tokenizer, str):
            if state is not None:
                tokenizer = load_tokenizer(work.folder / "tokenizer")
            else:
                tokenizer = build_tokenizer(
                    tokenizer, path, vocab_size, field=field, form=form
                )
        if state is None:
            save_tokenizer(tokenizer, work.folder / "tokenizer")
            counts = {name: _Counts() for name in names}
            kind = dtype_for(tokenizer.vocab_size)
            state = _State(0, Place(), 0, kind, counts)
        job = _Job(tokenizer, state.dtype, fractions, seed)
        writers = {
            name: stack.enter_context(
                _Writer(work.folder, name, job.dtype, shard_tokens, each)
            )
            for name, each in state.counts.items()
        }
        total = sum(each.size or 0 for each in found)
        known = all(each.size is not None for each in found)
        committed, due = time.monotonic(), False
        batches = _encoded(job, plan, state, threads)
        for batch, encoded in stack.enter_context(contextlib.closing(batches)):
            for name, (ids, more) in encoded.items():
                due |= writers[name].write(ids, more)
            state.done += batch.size
            tokens = sum(each.tokens for each in state.counts.values())
            progress(state.done, total if known else None, tokens)
            due |= time.monotonic() > committed + COMMIT_SECONDS
            if batch.place is not None:
                state.piece, state.place = batch.piece, batch.place
                if due:
                    work.commit(state, writers.values())
                    committed, due = time.monotonic(), False
        for name, each in state.counts.items():
            if not each.tokens:
                share = fractions[SPLITS.index(name)]
                raise ValueError(f"the {name} split, {share:g} of the text, is empty")
        work.commit(state, writers.values())
        index = Index(
            version=VERSION,
            dtype=job.dtype,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            tokenizer_kind=tokenizer.kind,
            tokenizer_hash=tokenizer_hash(tokenizer),
            splits={name: writer.summary() for name, writer in writers.items()},
            source=dict(source or asked),
        )
        work.publish(index)
    return index


def _refer(
    folder: Path, out: Path, tokenizer: Tokenizer | str, dtype: str | None
) -> Index:
    """An index in `out` of shards that stay where they are."""
    index = foreign.read_index(
        folder, _foreign_tokenizer(folder, tokenizer), dtype=dtype
    )
    with _Workplace(out) as work:
        work.resume(index.source)
        save_tokenizer(_foreign_tokenizer(folder, tokenizer), work.folder / "tokenizer")
        work.publish(index)
    return index


def _foreign_tokenizer(folder: Path, tokenizer: Tokenizer | str) -> Tokenizer:
    """Nothing can be trained on ids: only a path, bytes or a tokenizer is one given."""
    if tokenizer in ("sentencepiece", "char"):
        return foreign.tokenizer_of(folder)
    if isinstance(tokenizer, str):
        tokenizer = build_tokenizer(tokenizer)
    return foreign.tokenizer_of(folder, tokenizer)


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar of bytes and tokens on stderr, if that is a terminal."""
    quiet = not sys.stderr.isatty()
    with tqdm(unit="B", unit_scale=True, disable=quiet) as bar:

        def show(done: int, total: int | None, tokens: int) -> None:
            if bar.total is None:  # what an earlier run has done is no speed of this
                bar.initial, bar.total = done, total
            bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens", refresh=False)
            bar.update(done - bar.n)

        yield show


def _place(out: str | Path) -> Path:
    if "://" in str(out):
        raise ValueError(f"out={out} must be a folder of this machine")
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and _is_ours(out)):
        raise FileExistsError(f"{out} exists and is not a folder of prepared data")
    return out


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"{seed=} is negative")
    if seed >= 1 << 64:
        raise ValueError(f"{seed=} is not less than 2**64")


def _checked(splits: Sequence[float]) -> list[float]:
    if len(splits) != len(SPLITS):
        raise ValueError(f"{splits=}: three fractions, of {', '.join(SPLITS)}")
    if not all(0 <= fraction <= 1 for fraction in splits):
        raise ValueError(f"{splits=}: a fraction is not in 0 .. 1")
    if abs(math.fsum(splits) - 1) > 1e-6:
        raise ValueError(f"{splits=} add up to {math.fsum(splits):g}, not to 1")
    return [float(fraction) for fraction in splits]


# --- What is to be done ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes [start, stop) of a document, or all of a file of many.

    `split` is where it goes; None: by the hash of each document.
    """

    source: Document | Records
    start: int
    stop: int
    split: str | None


def _plan(
    found: Sequence[Document | Records], fractions: Sequence[float], seed: int
) -> list[_Piece]:
    texts = [source for source in found if isinstance(source, Document)]
    if len(texts) < len(found):
        return [_Piece(source, 0, source.size or 0, None) for source in found]
    order = np.random.default_rng(seed).permutation(len(texts))
    return _cut([texts[i] for i in order], fractions)


def _cut(found: Sequence[Document], fractions: Sequence[float]) -> list[_Piece]:
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
            _Piece(
                document, max(low - begin, 0), min(high - begin, document.size), name
            )
            for document, end in zip(found, ends, strict=True)
            if (begin := end - document.size) < high and end > low
        ]
    return pieces


@dataclass(slots=True)
class _Counts:
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0


@dataclass(slots=True)
class _State:
    """How far a preparation has come.

    Attributes:
      piece, place: of the plan, where the text goes on.
      done: stored bytes that have been read.
      dtype: of the shards.
      counts: of each split, what has been written.
    """

    piece: int
    place: Place
    done: int
    dtype: str
    counts: dict[str, _Counts]


@dataclass(frozen=True, slots=True)
class _Part:
    """Text that is encoded in one go, of the source `name`.

    `split` None: by its hash. `last`: of its document in this split; `ends`: of it all.
    """

    name: str
    text: str
    split: str | None
    last: bool
    ends: bool


@dataclass(frozen=True, slots=True)
class _Batch:
    """Parts that are encoded together; the text goes on at `piece` and `place`.

    `place` is None in the middle of a document of a file of many.
    """

    parts: list[_Part]
    piece: int
    place: Place | None
    size: int  # stored bytes


_Encoded = dict[str, tuple[np.ndarray, _Counts]]


class _Job:
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

    def encode(self, parts: Sequence[_Part]) -> _Encoded:
        """The ids of each split, in order, and what they are."""
        order = np.dtype(self.dtype).newbyteorder("<")
        eot = np.array([self.tokenizer.eot_id])
        arrays: dict[str, list[np.ndarray]] = {}
        counts: dict[str, _Counts] = {}
        for part in parts:
            split = part.split or self.split_of(part.text)
            try:
                ids = self.tokenizer.encode_array(part.text)
            except ValueError as error:
                raise ValueError(f"{part.name}: {error}") from None
            arrays.setdefault(split, []).append(ids)
            if part.ends:
                arrays[split].append(eot)
            count = counts.setdefault(split, _Counts())
            count.documents += part.last
            count.bytes += len(part.text.encode())
            count.tokens += len(ids) + part.ends
            if self.tokenizer.unk_id >= 0:
                count.unknown += int((ids == self.tokenizer.unk_id).sum())
        return {
            split: (np.concatenate(found).astype(order), counts[split])
            for split, found in arrays.items()
        }


def _encoded(
    job: _Job, plan: Sequence[_Piece], state: _State, threads: int
) -> Generator[tuple[_Batch, _Encoded]]:
    """Each batch from the state on, in order; some are in work at a time."""
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[_Batch, Future[_Encoded]]] = deque()
        try:
            for batch in _batches(job, plan, state.piece, state.place):
                pending.append((batch, pool.submit(job.encode, batch.parts)))
                if len(pending) > 2 * threads:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(
    job: _Job, plan: Sequence[_Piece], first: int, place: Place
) -> Iterator[_Batch]:
    parts: list[_Part] = []
    length = size = 0
    for n in range(first, len(plan)):
        found = plan[n].source
        stream = _of_text if isinstance(found, Document) else _of_records
        for part, after, read in stream(job, plan[n], place):
            parts.append(part)
            length, size = length + len(part.text), size + read
            if length >= BATCH_BYTES:
                yield _Batch(parts, n, after, size)
                parts, length, size = [], 0, 0
        place = Place()
    if parts:
        yield _Batch(parts, len(plan), Place(), size)


_Parts = Iterator[tuple[_Part, Place | None, int]]  # place after it, bytes read


def _of_text(job: _Job, piece: _Piece, place: Place) -> _Parts:
    document = piece.source
    assert isinstance(document, Document)
    split = piece.split or job.split_of(next(document.blocks()))
    at = place.offset or piece.start
    for text in document.blocks(at, piece.stop):
        size = len(text.encode())
        at += size
        last = at == piece.stop
        ends = at == document.size
        yield _Part(document.name, text, split, last, ends), Place(at), size


def _of_records(job: _Job, piece: _Piece, place: Place) -> _Parts:
    records = piece.source
    assert isinstance(records, Records)
    before = place.offset
    for text, after in records.read(place):
        size, before = after.offset - before, after.offset
        if len(text) <= sources.BLOCK_BYTES:
            yield _Part(records.name, text, None, True, True), after, size
        else:
            split, content = job.split_of(text), text.encode()
            del text
            whole = Document(records.name, len(content), text=content)
            for part, _, _ in _of_text(
                job, _Piece(whole, 0, whole.size, split), Place()
            ):
                yield part, after if part.last else None, size * part.last


# --- What has been done ---------------------------------------------------------------


class _Writer:
    """The shards of a split, which grow at their end.

    It takes them up where `counts`, which it then keeps, says that they are.
    """

    def __init__(
        self, folder: Path, split: str, dtype: str, shard_tokens: int, counts: _Counts
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

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.split}-{number:05d}.bin"

    def write(self, ids: np.ndarray, counts: _Counts) -> bool:
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


def _is_ours(folder: Path) -> bool:
    """Whether nothing is in it but what `prepare` writes: it may be replaced."""
    return all(_OUR_NAMES.fullmatch(path.name) for path in folder.iterdir())


class _Workplace:
    """The folder `<out>.partial`, which one process at a time may use."""

    def __init__(self, out: Path):
        self.out, self.folder = out, out.with_name(f"{out.name}.partial")
        self._state = self.folder / "state.json"
        self._request: Mapping[str, Any] = {}

    def __enter__(self) -> "_Workplace":
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / ".lock"
        self._lock = path.open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(self._lock.fileno())
            if path.exists() and os.path.samestat(path.stat(), held):
                return self  # and not of a folder that has just been finished
        except BlockingIOError:
            pass
        self._lock.close()
        raise BlockingIOError(
            f"another process is preparing {self.out}: it has locked {self.folder}"
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # What bad input left is of no use; what was interrupted can go on.
        failed = kind is not None and issubclass(kind, ValueError) and self._request
        if failed or (kind is not None and not self._state.exists()):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def store_stdin(
        self, given: Sequence[str | Path | None], form: str
    ) -> tuple[list[str], str]:
        """Standard input becomes a file here: (the paths with it, hash of its text)."""
        if given.count("-") > 1:
            raise ValueError("standard input, -, is given more than once")
        stored = self.folder / f"stdin.{'txt' if form in ('auto', 'text') else form}"
        digest = hashlib.sha256()
        with stored.open("wb") as file:
            while data := sys.stdin.buffer.read(sources.BLOCK_BYTES):
                digest.update(data)
                file.write(data)
        if not stored.stat().st_size:
            raise ValueError("no text in standard input")
        paths = [str(stored) if each == "-" else str(each) for each in given]
        return paths, digest.hexdigest()

    def holds(self, name: str) -> bool:
        return Path(name).parent == self.folder

    def resume(self, request: Mapping[str, Any]) -> _State | None:
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
            elif path.name != ".lock" and path.stem != "stdin":
                path.unlink()
        return None

    def _is_whole(self, state: _State) -> bool:
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

    def commit(self, state: _State, writers: Iterable[_Writer]) -> None:
        """From now on a killed run goes on at `state`."""
        for writer in writers:
            writer.sync()
        _write(self._state, {"request": self._request, **asdict(state)})

    def publish(self, index: Index) -> None:
        """The folder becomes `out`."""
        _write(self.folder / "index.json", asdict(index))
        for path in self.folder.glob("stdin.*"):
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


def _read_state(kept: Mapping[str, Any]) -> _State:
    counts = {name: _Counts(**values) for name, values in kept["counts"].items()}
    return _State(
        kept["piece"], Place(**kept["place"]), kept["done"], kept["dtype"], counts
    )


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """JSON that is there whole, or as it was before, whenever the machine stops."""
    temporary = path.with_name(f"{path.name}.new")
    with temporary.open("w") as file:
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


# --- Prepared folders -----------------------------------------------------------------


def load_index(folder: str | Path) -> Index:
    """Reads and checks a prepared folder, or one of `foreign` shards and tokenizer.

    Raises FileNotFoundError if it, its index, a shard or the tokenizer is missing, and
    ValueError if the index is damaged or of another version, if a shard's size is not
    that of its tokens, or if the tokenizer's files are not those the data were made by.
    """
    if foreign.is_foreign(folder):
        return foreign.read_index(folder, foreign.tokenizer_of(folder))
    return read_index(Path(folder))


def prepared_folder(
    path: str | Path | None,
    out: Path,
    *,
    tokenizer: str,
    vocab_size: int | None,
    splits: Sequence[float],
) -> Path:
    """The folder of token shards for a run: `path` itself, or `out`, made when missing.

    Args:
      path: a prepared folder, or text or others' shards as for `prepare`.
      out: where text is prepared; used again when it fits this request.
      tokenizer, vocab_size: as for `build_tokenizer`.
      splits: as for `prepare`.

    Raises:
      ValueError: when `out` holds data that were asked for in another way; and as
        `prepare` and `load_index`.
    """
    if path is not None and (Path(path) / "index.json").is_file():
        load_index(path)
        return Path(path)
    if path is not None and foreign.is_foreign(path):
        chosen = _foreign_tokenizer(Path(path), tokenizer)
        source: Mapping[str, Any] = foreign.fingerprint(path, chosen)
    else:
        source = fingerprint(
            path, tokenizer=tokenizer, vocab_size=vocab_size, splits=splits
        )
    if (out / "index.json").is_file():
        found = load_index(out).source
        for name, value in source.items():
            if path is None and name in ("bytes", "documents"):
                continue  # Python's own text changes with its version
            if found.get(name) != value:
                raise ValueError(
                    f"{out} was prepared with {name}={found.get(name)}, this run asks "
                    f"for {value}: choose another workdir or the same data"
                )
        return out
    prepare(path, out, tokenizer, vocab_size=vocab_size, splits=splits, source=source)
    return out
