"""Token shards that others made, read where they lie: nanoGPT's, llm.c's.

nanoGPT's `train.bin` and `val.bin` are bare uint16 ids. Those of llm.c and of
modded-nanogpt, `NAME_train_000001.bin` and `NAME_val_000000.bin`, begin with 256 int32:
a magic number, a version and the number of tokens.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gpt2_jax.checks import check_choice
from gpt2_jax.data.shards import (
    DTYPES,
    SAMPLE,
    SPLITS,
    VERSION,
    Index,
    Shard,
    Split,
    check_ids,
)
from gpt2_jax.data.sources import is_remote
from gpt2_jax.formats import nanogpt
from gpt2_jax.runtime.files import check_regular, user_path
from gpt2_jax.tokenizers.files import load_tokenizer, tokenizer_hash
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer

MAGIC = {20240520: "uint16", 20240801: "uint32"}  # GPT-2's ids, Llama 3's
HEADER_BYTES = 4 * 256
# Ours, train-00000.bin, are not among them: without an index they are unfinished.
_SPLIT = "(train|validation|val|test)"
_NAME = re.compile(rf"{_SPLIT}\.bin|.+[_-]{_SPLIT}(?:[_-]\d+)?\.bin")


def is_foreign(path: str | Path | None) -> bool:
    """Whether it is a folder with shards for training, and none of ours."""
    if path is None or is_remote(path) or not (folder := user_path(path)).is_dir():
        return False
    ours = (folder / "index.json").is_file()
    return not ours and "train" in (split for split, _ in _shards(folder))


def _shards(folder: Path) -> Iterator[tuple[str, Path]]:
    """(split, file), in the order of names."""
    for file in sorted(folder.glob("*.bin")):
        if found := _NAME.fullmatch(file.name):
            split = found[1] or found[2]
            yield {"val": "validation"}.get(split, split), file


def tokenizer_of(folder: str | Path, given: Tokenizer | None = None) -> Tokenizer:
    """The tokenizer of a folder's shards.

    It is the one that is given; or nanoGPT's table of characters in meta.pkl, which is
    read without executing anything, or meta.json; or what `load_tokenizer` finds there.
    For a model without a tokenizer, a NoTokenizer, these may lack.

    Raises ValueError where there is none, and on a damaged one.
    """
    folder = user_path(folder)
    if given is not None and not isinstance(given, NoTokenizer):
        return given
    if found := nanogpt.tokenizer_beside(folder / "train.bin"):
        return found
    try:
        return load_tokenizer(folder)
    except FileNotFoundError:
        if given is not None:
            return given
        raise ValueError(
            f"{folder} holds token shards and no tokenizer: give the path of theirs "
            "as tokenizer, mostly GPT-2's"
        ) from None


def fingerprint(folder: str | Path, tokenizer: Tokenizer) -> dict[str, object]:
    """What an index of the folder depends on: names, sizes, times, the tokenizer."""
    digest = hashlib.sha256()
    size = 0
    for split, file in _shards(user_path(folder)):
        status = file.stat()
        size += status.st_size
        stamp = f"{split}\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0"
        digest.update(stamp.encode())
    return {
        "path": str(user_path(folder).resolve()),
        "bytes": size,
        "documents": digest.hexdigest(),
        "tokenizer": tokenizer_hash(tokenizer),
    }


def content_hash(folder: str | Path) -> str:
    """A hash of what the shards hold, whatever their times are: all are read."""
    digest = hashlib.sha256()
    for _, file in _shards(user_path(folder)):
        with file.open("rb") as stored:
            content = hashlib.file_digest(stored, "sha256").hexdigest()
        digest.update(os.fsencode(f"{file.name}\0{content}\0"))
    return digest.hexdigest()


def read_index(
    folder: str | Path, tokenizer: Tokenizer, *, dtype: str | None = None
) -> Index:
    """An index of the shards in a folder, by their full paths; no id is copied.

    Args:
      folder: what `is_foreign` is true of.
      tokenizer: of the ids, as from `tokenizer_of`.
      dtype: of ids without a header: uint16 or uint32. None finds out: uint32 where
        the vocabulary needs it, or where every second 16 bits of the beginning are 0.

    Every id is looked at once. Raises ValueError, naming file, value and limit, on a
    wrong magic number or version, a size that does not fit the number of tokens, shards
    of several dtypes, an empty shard and ids that the tokenizer does not have.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    found: dict[str, list[Shard]] = {}
    first: tuple[str, Path] | None = None
    for split, file in _shards(user_path(folder).resolve()):
        kind, shard = _shard(file, dtype, tokenizer.vocab_size)
        first = first or (kind, file)
        if kind != first[0]:
            raise ValueError(f"{file} holds {kind}, but {first[1]} {first[0]}")
        check_ids(file, kind, shard, tokenizer.vocab_size)
        found.setdefault(split, []).append(shard)
    if first is None:
        raise FileNotFoundError(f"no token shards in {folder}")
    return Index(
        version=VERSION,
        dtype=first[0],
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer_kind=tokenizer.kind,
        tokenizer_hash=tokenizer_hash(tokenizer),
        splits={
            name: Split(0, 0, sum(s.tokens for s in found[name]), tuple(found[name]))
            for name in SPLITS
            if name in found
        },
        source=fingerprint(folder, tokenizer),
    )


def _shard(file: Path, given: str | None, vocab_size: int) -> tuple[str, Shard]:
    """(dtype, shard) of a file, from its header if there must be one."""
    check_regular(file)
    size = file.stat().st_size
    header = np.fromfile(file, "<i4", 3)
    magic = int(header[0]) if header.size else 0
    # nanoGPT's names are bare; others have a header, whatever it says.
    if file.stem in ("train", "val", "validation", "test") and magic not in MAGIC:
        dtype = given or _infer(file, size, vocab_size)
        width = np.dtype(dtype).itemsize
        if size == 0 or size % width:
            raise ValueError(
                f"{file} has {size} bytes: not a positive multiple of the {width} of "
                f"{dtype}"
            )
        return dtype, Shard(str(file), size // width)
    if size < HEADER_BYTES:
        raise ValueError(f"{file} has {size} bytes, its header {HEADER_BYTES}")
    if magic not in MAGIC:
        known = " or ".join(map(str, MAGIC))
        raise ValueError(f"{file} has the magic number {magic}, not {known}")
    dtype, (version, tokens) = MAGIC[magic], header[1:].tolist()
    if given not in (None, dtype):
        raise ValueError(f"{file} holds {dtype} by its header, not dtype={given!r}")
    versions = {"uint16": (1,), "uint32": (1, 7)}[dtype]
    if version not in versions:
        raise ValueError(f"{file} has version {version}, not {versions}")
    needed = HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if tokens < 1 or size != needed:
        raise ValueError(
            f"{file} has {size} bytes, its header's {tokens} tokens of {dtype} need "
            f"{needed}"
        )
    return dtype, Shard(str(file), tokens, HEADER_BYTES)


def _infer(file: Path, size: int, vocab_size: int) -> str:
    if vocab_size > 1 << 16:
        return "uint32"
    words = np.fromfile(file, "<u2", 2 * SAMPLE)
    whole = size % 4 == 0 and len(words) >= 4
    return "uint32" if whole and not words[1::2].any() else "uint16"
