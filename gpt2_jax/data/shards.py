"""What a folder of token shards is, and its index.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.tokenizer import files_hash

VERSION = 1
SAMPLE = 1 << 20  # ids that tell a dtype, or are checked in one piece
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Shard:
    """A file of `tokens` ids, after `offset` bytes of something else.

    `name` is its path, from the folder of the index on.
    """

    name: str
    tokens: int
    offset: int = 0


@dataclass(frozen=True)
class Split:
    """Sizes of a split.

    `documents` counts a document that was cut in each part, `unknown` the tokens that
    stand for what the tokenizer does not know. Where others made the shards, documents
    and bytes are not known and 0.
    """

    documents: int
    bytes: int
    tokens: int
    shards: tuple[Shard, ...]
    unknown: int = 0

    def __str__(self) -> str:
        tokens = f"{self.tokens} tokens"
        if not self.documents:
            return tokens
        return (
            f"{self.documents} documents, {self.bytes} bytes, {tokens}, "
            f"{self.bytes / self.tokens:.2f} bytes per token, "
            f"{self.unknown / self.tokens:.3%} unknown"
        )


@dataclass(frozen=True)
class Index:
    """What a prepared folder holds.

    `dtype` is "uint16" or "uint32"; `eot_id` is None where nothing stands between
    documents; `source` is the `fingerprint` of what was asked for. A split of fraction
    0 is absent.
    """

    version: int
    dtype: str
    vocab_size: int
    eot_id: int | None
    tokenizer_kind: str
    tokenizer_hash: str
    splits: Mapping[str, Split]
    source: Mapping[str, Any]


def dtype_for(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_index(folder: Path) -> Index:
    """Reads and checks a prepared folder; errors as of `prepare.load_index`."""
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

    was_none = index.eot_id == -1  # how older versions wrote it
    if was_none:
        index = replace(index, eot_id=None)
    for split in index.splits.values():
        for shard in split.shards:
            path = folder / shard.name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing")
            needed = shard.offset + shard.tokens * width
            if (size := path.stat().st_size) != needed:
                raise ValueError(
                    f"{path} has {size} bytes, its {shard.tokens} tokens of "
                    f"{index.dtype} need {needed}"
                )
            if was_none:  # and as an id after each document of text
                check_ids(path, index.dtype, shard, index.vocab_size)
    if not (folder / "tokenizer").is_dir():
        raise FileNotFoundError(f"{folder / 'tokenizer'} is missing")
    files = {path.name: path.read_bytes() for path in (folder / "tokenizer").iterdir()}
    if files_hash(index.tokenizer_kind, files) != index.tokenizer_hash:
        raise ValueError(
            f"{folder / 'tokenizer'} is not the tokenizer that the data were made by: "
            f"its hash is not {index.tokenizer_hash[:12]}..."
        )
    return index


def check_ids(file: Path, dtype: str, shard: Shard, vocab_size: int) -> None:
    """Raises ValueError on an id of a shard that is not in [0, vocab_size)."""
    if vocab_size > np.iinfo(dtype).max:
        return
    ids = np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r", shard.offset)
    for at in range(0, len(ids), SAMPLE):
        part = ids[at : at + SAMPLE]
        if (largest := int(part.max())) >= vocab_size:
            place = at + int(part.argmax())
            raise ValueError(
                f"{file}: token {place} is {largest}, but vocab_size={vocab_size}"
            )


def _parse(data: dict[str, Any]) -> Index:
    splits = {
        name: Split(**{**split, "shards": tuple(Shard(**s) for s in split["shards"])})
        for name, split in data["splits"].items()
    }
    return Index(**{**data, "splits": splits})
