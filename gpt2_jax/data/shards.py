"""What a folder of token shards is, and its index.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checks import one_line, shown
from gpt2_jax.fields import check_names, check_range, check_types
from gpt2_jax.runtime.files import read_json, user_path
from gpt2_jax.tokenizers.files import files_hash

VERSION = 1
SAMPLE = 1 << 20  # ids that tell a dtype, or are checked in one piece
DTYPES = ("uint16", "uint32")
MOST = 2**62  # of tokens and bytes
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
    data = read_json(file)
    try:
        index = _parse(data)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    width = np.dtype(index.dtype).itemsize
    was_none = index.eot_id == -1  # how older versions wrote it
    if was_none:
        index = replace(index, eot_id=None)
    for split in index.splits.values():
        for shard in split.shards:
            path = folder / user_path(shard.name)
            if not path.is_file():
                raise FileNotFoundError(f"{one_line(path)} is missing")
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
            f"its hash is not {one_line(index.tokenizer_hash, 12)}"
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


def _parse(data: Any) -> Index:
    """The index that JSON says; ValueError on what can't be one, field by field."""
    check_names("", data, Index)
    if data["version"] != VERSION:
        raise ValueError(
            f"it has version {shown(data['version'])}, this program reads {VERSION}"
        )
    if not isinstance(data["splits"], dict):
        raise ValueError(f"splits={shown(data['splits'])} must be a table")
    splits = {name: _split(name, each) for name, each in data["splits"].items()}
    index = Index(**{**data, "splits": splits})
    check_types(index)
    if index.dtype not in DTYPES:
        raise ValueError(f"dtype={shown(index.dtype)} is not {' or '.join(DTYPES)}")
    check_range("vocab_size", index.vocab_size, 1)
    if index.eot_id is not None:
        check_range("eot_id", index.eot_id, -1, index.vocab_size - 1)
    return index


def _split(name: str, data: Any) -> Split:
    if name not in SPLITS:
        raise ValueError(f"split {shown(name)} is not one of {', '.join(SPLITS)}")
    check_names(f"{name}.", data, Split)
    if not isinstance(data["shards"], list):
        raise ValueError(f"{name}.shards={shown(data['shards'])} must be a list")
    shards = []
    for n, each in enumerate(data["shards"]):
        check_names(f"{name}.shards[{n}].", each, Shard)
        shards.append(Shard(**each))
        check_types(shards[n], f"{name}.shards[{n}].")
        check_range(f"{name}.shards[{n}].tokens", shards[n].tokens, 1, MOST)
        check_range(f"{name}.shards[{n}].offset", shards[n].offset, 0, MOST)
    split = Split(**{**data, "shards": tuple(shards)})
    check_types(split, f"{name}.")
    for count in ("documents", "bytes", "unknown"):
        check_range(f"{name}.{count}", getattr(split, count), 0, MOST)
    if split.tokens != (found := sum(shard.tokens for shard in shards)) or not shards:
        raise ValueError(
            f"{name}.tokens={shown(split.tokens)}, but its {len(shards)} shards have "
            f"{found}"
        )
    return split
