"""Text -> token shards: a folder that `gpt2_jax.data.loader` reads by memmap.

    index.json              what is here: see `Index`
    tokenizer/              the tokenizer's files
    train-00000.bin ...     token ids, little-endian uint16 or uint32, no header
    validation-00000.bin
    test-00000.bin

Documents are put in a seeded order and laid end to end; the line of all their bytes is
cut at the given fractions, where need be inside a document, at the start of a
character. The end-of-text token follows each document's end.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.data import sources
from gpt2_jax.data.sources import Document
from gpt2_jax.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    files_hash,
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_sentencepiece,
)

VERSION = 1
SPLITS = ("train", "validation", "test")
TRAINING_BYTES = 20_000_000  # SentencePiece is trained on at most this much text


@dataclass(frozen=True)
class Shard:
    """A file of `tokens` ids."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Split:
    """Sizes of a split; `documents` counts a document that was cut in each part."""

    documents: int
    bytes: int
    tokens: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Index:
    """What a prepared folder holds.

    `dtype` is "uint16" or "uint32"; `source` is the `fingerprint` of what was asked
    for. A split of fraction 0 is absent.
    """

    version: int
    dtype: str
    vocab_size: int
    eot_id: int
    tokenizer_kind: str
    tokenizer_hash: str
    splits: Mapping[str, Split]
    source: Mapping[str, Any]


def build_tokenizer(
    kind: str, path: str | Path | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer of a run.

    Args:
      kind: "sentencepiece" trains one of `vocab_size` pieces on the first 20 MB of the
        source, "char" takes all its characters, "bytes" needs no text; anything else is
        the path of a given tokenizer, as for `load_tokenizer`.
      path: the text: file, folder, or None for the default corpus.
      vocab_size: needed for "sentencepiece"; elsewhere None, or what must come out.

    Raises ValueError if vocab_size is missing or is not what the tokenizer has.
    """
    if kind == "sentencepiece":
        if vocab_size is None:
            raise ValueError("a sentencepiece tokenizer needs vocab_size")
        return train_sentencepiece(_first(_texts(path), TRAINING_BYTES), vocab_size)
    tokenizer: Tokenizer
    if kind == "char":
        tokenizer = CharTokenizer.train(_texts(path))
    elif kind == "bytes":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = load_tokenizer(kind)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"{vocab_size=}, but the tokenizer {kind!r} has {tokenizer.vocab_size}"
        )
    return tokenizer


def _texts(path: str | Path | None) -> Iterator[str]:
    for document in sources.documents(path):
        yield from document.blocks()


def _first(texts: Iterator[str], size: int) -> Iterator[str]:
    """Texts, until about `size` characters have passed."""
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


def fingerprint(
    path: str | Path | None,
    *,
    tokenizer: str,
    vocab_size: int | None,
    splits: Sequence[float] = (0.9, 0.05, 0.05),
    seed: int = 0,
) -> dict[str, Any]:
    """What prepared data depend on, in JSON's types, so that two can be compared.

    Files count by name, size and time of modification; a tokenizer that is a path, by
    its content. The text itself is not read.
    """
    if tokenizer not in ("sentencepiece", "char", "bytes"):
        tokenizer = tokenizer_hash(load_tokenizer(tokenizer))
    return {
        **_text_fingerprint(path, splits, seed),
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
    }


def _text_fingerprint(
    path: str | Path | None, splits: Sequence[float], seed: int
) -> dict[str, Any]:
    if path is not None:
        path = Path(path).resolve()
    digest = hashlib.sha256()
    size = 0
    for document in sources.documents(path):
        size += document.size
        digest.update(f"{document.name}\0{document.size}\0".encode())
        if document.path is None:
            digest.update(document.text)
        else:
            digest.update(b"%d\0" % document.path.stat().st_mtime_ns)
    return {
        "path": None if path is None else str(path),
        "bytes": size,
        "documents": digest.hexdigest(),
        "splits": [float(fraction) for fraction in splits],
        "seed": seed,
    }


def prepare(
    path: str | Path | None,
    out: str | Path,
    tokenizer: Tokenizer,
    *,
    splits: Sequence[float] = (0.9, 0.05, 0.05),
    seed: int = 0,
    shard_tokens: int = 100_000_000,
    threads: int | None = None,
    source: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Index:
    """Tokenizes a source into the folder `out`, in constant memory.

    The folder appears at once, when it is complete: it is written beside as
    `<out>.tmp-<pid>` and renamed. A folder of prepared data that is there is replaced.

    Args:
      path: a text file, a folder of text files, or None for the default corpus.
      out: the folder to make.
      tokenizer: see `build_tokenizer`.
      splits: fractions of train, validation and test text; they add up to 1.
      seed: of the order of documents.
      shard_tokens: tokens in a shard file, at most.
      threads: that encode, about 12 MB of memory each; None is one a core, up to 8.
        They change nothing in the result.
      source: the fingerprint to store; by default that of this call, with the
        tokenizer's kind and vocabulary size.
      progress: called with the number of bytes of text done since the last call.

    Raises FileNotFoundError or ValueError on a source without text or that is not
    UTF-8, ValueError on bad fractions and on a split that would be empty,
    FileExistsError if `out` holds anything but prepared data.
    """
    out = Path(out).absolute()
    fractions = _checked(splits)
    if shard_tokens < 1:
        raise ValueError(f"{shard_tokens=} is not positive")
    threads = min(os.cpu_count() or 1, 8) if threads is None else threads
    if threads < 1:
        raise ValueError(f"{threads=} is not positive")
    if seed < 0:
        raise ValueError(f"{seed=} is negative")
    if out.exists() and not (out.is_dir() and _is_ours(out)):
        raise FileExistsError(f"{out} exists and is not a folder of prepared data")
    found = sources.documents(path)
    source = source or {
        **_text_fingerprint(path, splits, seed),
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
    }
    order = np.random.default_rng(seed).permutation(len(found))
    plan = _plan([found[i] for i in order], fractions)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"

    partial = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_tokenizer(tokenizer, partial / "tokenizer")
        index = Index(
            version=VERSION,
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            tokenizer_kind=tokenizer.kind,
            tokenizer_hash=tokenizer_hash(tokenizer),
            splits={
                name: _write_split(
                    partial,
                    name,
                    _encode(pieces, tokenizer, dtype, threads, progress),
                    pieces,
                    shard_tokens,
                )
                for name, pieces in plan.items()
            },
            source=dict(source),
        )
        (partial / "index.json").write_text(json.dumps(asdict(index), indent=1) + "\n")
        if out.exists():
            old = out.with_name(f"{out.name}.old-{os.getpid()}")
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return index


def _checked(splits: Sequence[float]) -> list[float]:
    if len(splits) != len(SPLITS):
        raise ValueError(f"{splits=}: three fractions, of {', '.join(SPLITS)}")
    if not all(0 <= fraction <= 1 for fraction in splits):
        raise ValueError(f"{splits=}: a fraction is not in 0 .. 1")
    if abs(math.fsum(splits) - 1) > 1e-6:
        raise ValueError(f"{splits=} add up to {math.fsum(splits):g}, not to 1")
    return [float(fraction) for fraction in splits]


_OUR_NAMES = re.compile(rf"index\.json|tokenizer|({'|'.join(SPLITS)})-\d{{5,}}\.bin")


def _is_ours(folder: Path) -> bool:
    """Whether nothing is in it but what `prepare` writes: it may be replaced."""
    return all(_OUR_NAMES.fullmatch(path.name) for path in folder.iterdir())


@dataclass(frozen=True)
class _Piece:
    """Bytes [start, stop) of a document."""

    document: Document
    start: int
    stop: int


def _plan(
    found: Sequence[Document], fractions: Sequence[float]
) -> dict[str, list[_Piece]]:
    """The pieces of each split that is not 0."""
    ends = list(accumulate(document.size for document in found))
    total = ends[-1]
    last = max(i for i, fraction in enumerate(fractions) if fraction)
    cuts = [0]
    for i in range(len(fractions)):
        cut = total if i >= last else int(total * math.fsum(fractions[: i + 1]))
        at = next(n for n, end in enumerate(ends) if cut <= end)
        begin = ends[at] - found[at].size
        cuts.append(begin + found[at].character_start(cut - begin))
    plan = {}
    for name, fraction, (low, high) in zip(
        SPLITS, fractions, pairwise(cuts), strict=True
    ):
        if not fraction:
            continue
        if low == high:
            raise ValueError(
                f"the {name} split, {fraction:g} of {total} bytes of text, is empty"
            )
        plan[name] = [
            _Piece(document, max(low - begin, 0), min(high - begin, document.size))
            for document, end in zip(found, ends, strict=True)
            if (begin := end - document.size) < high and end > low
        ]
    return plan


def _write_split(
    folder: Path,
    name: str,
    encoded: Iterator[np.ndarray],
    pieces: Sequence[_Piece],
    shard_tokens: int,
) -> Split:
    shards: list[Shard] = []
    for array in encoded:
        while array.size:
            if not shards or shards[-1].tokens == shard_tokens:
                shards.append(Shard(f"{name}-{len(shards):05d}.bin", 0))
            shard = shards[-1]
            now = array[: shard_tokens - shard.tokens]
            with (folder / shard.name).open("ab") as file:
                file.write(now.tobytes())
            shards[-1] = Shard(shard.name, shard.tokens + now.size)
            array = array[now.size :]
    return Split(
        documents=len(pieces),
        bytes=sum(piece.stop - piece.start for piece in pieces),
        tokens=sum(shard.tokens for shard in shards),
        shards=tuple(shards),
    )


def _encode(
    pieces: Sequence[_Piece],
    tokenizer: Tokenizer,
    dtype: str,
    threads: int,
    progress: Callable[[int], object],
) -> Iterator[np.ndarray]:
    """Ids [n] of each block in order; `threads` blocks are in work at a time."""
    order = np.dtype(dtype).newbyteorder("<")

    def work(text: str, ends: bool) -> tuple[np.ndarray, int]:
        ids = tokenizer.encode(text) + [tokenizer.eot_id] * ends
        return np.asarray(ids, order), len(text.encode("utf-8"))

    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[tuple[np.ndarray, int]]] = deque()
        for piece in pieces:
            size = piece.stop - piece.start
            for text in piece.document.blocks(piece.start, piece.stop):
                size -= len(text.encode("utf-8"))
                ends = size == 0 and piece.stop == piece.document.size
                pending.append(pool.submit(work, text, ends))
                if len(pending) > threads:
                    array, done = pending.popleft().result()
                    yield array
                    progress(done)
        for future in pending:
            array, done = future.result()
            yield array
            progress(done)


def load_index(folder: str | Path) -> Index:
    """Reads and checks a prepared folder.

    Raises FileNotFoundError if it, its index, a shard or the tokenizer is missing, and
    ValueError if the index is damaged or of another version, if a shard's size is not
    that of its tokens, or if the tokenizer's files are not those the data were made by.
    """
    folder = Path(folder)
    file = folder / "index.json"
    if not file.is_file():
        raise FileNotFoundError(f"no prepared data in {folder}: {file.name} is missing")
    try:
        data = json.loads(file.read_bytes())
        version = data["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from None
    if version != VERSION:
        raise ValueError(
            f"{file} has version {version!r}, this program reads {VERSION}"
        )
    try:
        index = _parse(data)
        width = np.dtype(index.dtype).itemsize
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from None

    for split in index.splits.values():
        for shard in split.shards:
            path = folder / shard.name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing")
            if (size := path.stat().st_size) != shard.tokens * width:
                raise ValueError(
                    f"{path} has {size} bytes, its {shard.tokens} tokens of "
                    f"{index.dtype} need {shard.tokens * width}"
                )
    if not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(f"{folder / 'tokenizer'} is missing")
    files = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    if files_hash(index.tokenizer_kind, files) != index.tokenizer_hash:
        raise ValueError(
            f"{folder / 'tokenizer'} is not the tokenizer that the data were made by: "
            f"its hash is not {index.tokenizer_hash[:12]}..."
        )
    return index


def _parse(data: dict[str, Any]) -> Index:
    splits = {
        name: Split(**{**split, "shards": tuple(Shard(**s) for s in split["shards"])})
        for name, split in data["splits"].items()
    }
    return Index(**{**data, "splits": splits})


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
      path: a prepared folder, or text as for `prepare`.
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
    chosen = build_tokenizer(tokenizer, path, vocab_size)
    prepare(path, out, chosen, splits=splits, source=source)
    return out
