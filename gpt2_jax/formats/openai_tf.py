"""OpenAI's GPT-2 as it was released: a TensorFlow checkpoint, read without TensorFlow.

A folder holds `hparams.json`, one NAME.index (the released ones have model.ckpt.index)
and NAME.data-00000-of-00001; the tokenizer's files, `checkpoint` and NAME.meta are not
read here. The index is a sorted string table of LevelDB's kind
(https://github.com/google/leveldb/blob/main/doc/table_format.md), uncompressed; its
values are the messages of TensorFlow's core/protobuf/tensor_bundle.proto.

The checksums of the index's blocks are verified. Those of the tensors are not: crc32c
in plain Python takes over a minute a gigabyte.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import jax.numpy as jnp
import numpy as np

from gpt2_jax.checks import shown
from gpt2_jax.config import GPT2Config
from gpt2_jax.formats.tensors import Tensor
from gpt2_jax.runtime.files import check_regular, is_there, read_json

HPARAMS, INDEX = "hparams.json", ".index"
MAX_HPARAMS_BYTES = 2**20
MAX_INDEX_BYTES = 2**20  # the released indices have under 2**15
MAX_KEY_BYTES = 2**12  # keys share prefixes: without a limit a small file is large

MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
FOOTER_BYTES = 48  # two handles, padding, MAGIC
TRAILER_BYTES = 5  # after each block: its compression, its checksum

# DataType of TensorFlow's core/framework/types.proto.
DTYPES = {
    1: np.dtype("<f4"),
    14: np.dtype(jnp.bfloat16),
    19: np.dtype("<f2"),
}

FIELDS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}

NAME = re.compile(
    rb"model/(wte|wpe|ln_f/[gb]|h(?:0|[1-9]\d{0,3})/"
    rb"(?:ln_[12]/[gb]|(?:attn/c_attn|attn/c_proj|mlp/c_fc|mlp/c_proj)/[wb]))"
)
LEAVES = {"g": "scale", "b": "bias", "w": "kernel"}


def is_tf_folder(folder: Path) -> bool:
    """Whether `read` is the reader for it: it has hparams.json and a *.index."""
    return is_there(folder / HPARAMS) and any(folder.glob(f"*{INDEX}"))


def index_of(path: Path) -> Path | None:
    """The index of a checkpoint that is named without suffix, as TensorFlow does."""
    index = path.with_name(path.name + INDEX)
    return index if is_there(index) and is_there(path.with_name(HPARAMS)) else None


def read(
    folder: Path, step: int | str | Path | None = None
) -> tuple[GPT2Config, dict[str, Tensor]]:
    """A checkpoint's configuration, and its tensors by the path of our parameter.

    Kernels are [in, out], as ours are. Which tensors there are and whether their shapes
    are the configuration's is for the caller to check; what is not under "model/" (a
    step, say) is left out.

    Args:
      step: the number at the end of an index' name, or the index itself; None: the
        checkpoint that the file `checkpoint` names, or else the one of highest number.

    Raises:
      FileNotFoundError: when a file is missing.
      ValueError: when one is damaged or not of this form; the message names it.
    """
    config = _read_hparams(folder / HPARAMS)
    index = step if isinstance(step, Path) else _choose(folder, step)
    data = _read_bytes(index, MAX_INDEX_BYTES)
    try:
        num_shards, entries = _parse_index(data)
    except ValueError as error:
        raise ValueError(f"{index}: {error}") from None

    tensors, shards = {}, set()
    for name, entry in entries.items():
        shard = f"{index.stem}.data-{entry.shard:05d}-of-{num_shards:05d}"
        path = folder / shard
        if path not in shards:
            if not is_there(path):
                raise FileNotFoundError(f"{path} is missing, {index.name} names it")
            check_regular(path)
            shards.add(path)
        tensor = Tensor.in_file(path, entry.offset, entry.shape, entry.dtype)
        if name.endswith("/kernel"):
            tensor = tensor.reshaped(*entry.shape[1:])
        tensors[name] = tensor
    return config, tensors


def _choose(folder: Path, step: int | str | None) -> Path:
    """The index of one of the checkpoints in a folder."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    if not indices:
        raise FileNotFoundError(f"{folder} has no *.index, such as model.ckpt.index")
    numbers = {
        path: int(found[1])
        for path in indices
        if (found := re.search(r"-([0-9]{1,18})$", path.stem))
    }
    if step is not None:
        chosen = [path for path, number in numbers.items() if str(number) == str(step)]
        if len(chosen) != 1:
            raise FileNotFoundError(
                f"{folder} has {len(chosen)} checkpoints of step {shown(step)}, only "
                f"{shown(sorted(numbers.values()))}"
            )
        return chosen[0]
    if len(indices) == 1:
        return indices[0]
    if is_there(folder / "checkpoint"):
        text = _read_bytes(folder / "checkpoint", MAX_HPARAMS_BYTES)
        named = re.search(rb'^model_checkpoint_path: *"([^"\n]*)"', text, re.MULTILINE)
        name = named[1].decode(errors="replace") if named else ""
        # The folder may have been moved since the path was written.
        index = folder / f"{PurePosixPath(name).name}{INDEX}"
        if index not in indices:
            raise ValueError(
                f"{folder / 'checkpoint'} names {shown(name)}, which is not beside it: "
                "step= takes another"
            )
        return index
    highest = max(numbers.values(), default=None)
    latest = [path for path, number in numbers.items() if number == highest]
    if len(latest) != 1 or len(numbers) != len(indices):
        names = ", ".join(path.name for path in indices[:4])
        raise ValueError(
            f"{folder} has {len(indices)} checkpoints and nothing says which is the "
            f"latest: {names}"
        )
    return latest[0]


def _read_bytes(path: Path, limit: int) -> bytes:
    check_regular(path)
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, more than {limit:,}")
    return path.read_bytes()


def _read_hparams(path: Path) -> GPT2Config:
    if not is_there(path):
        raise FileNotFoundError(f"{path} is missing")
    values = read_json(path, limit=MAX_HPARAMS_BYTES)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object")
    for name in FIELDS:
        if name not in values:
            raise ValueError(f"{path} lacks {name!r}")
    for name in values:
        if name not in FIELDS:
            raise ValueError(f"{path}: {shown(name)} is not one of {', '.join(FIELDS)}")
    try:
        return GPT2Config(**{ours: values[name] for name, ours in FIELDS.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Where a tensor lies. `shape` is the file's: a kernel's is [1, in, out]."""

    shard: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


def _parse_index(data: bytes) -> tuple[int, dict[str, _Entry]]:
    """The number of data files, and the entries by the path of our parameter."""
    pairs = _table(data)
    key, value = next(pairs, (None, b""))
    if key != b"":
        raise ValueError("it has no header: its first key is not empty")
    num_shards = _parse_header(value)
    entries = {}
    for key, value in pairs:
        if not key.startswith(b"model/"):
            continue
        if not NAME.fullmatch(key):
            raise ValueError(f"tensor {shown(key)} is none of GPT-2's")
        name = key.decode()
        try:
            entries[_our_path(name)] = _parse_entry(value, name, num_shards)
        except ValueError as error:
            raise ValueError(f"tensor {name}: {error}") from None
    return num_shards, entries


def _our_path(name: str) -> str:
    """model/h0/attn/c_attn/w -> h_0/attn/c_attn/kernel"""
    path = re.sub("^h", "h_", name.removeprefix("model/"))
    if path in ("wte", "wpe"):
        return f"{path}/embedding"
    module, leaf = path.rsplit("/", 1)
    return f"{module}/{LEAVES[leaf]}"


def _parse_header(value: bytes) -> int:
    """The number of data files, of a BundleHeaderProto."""
    numbers, messages = _message(value)
    num_shards = numbers.get(1, 0)
    if not 1 <= num_shards <= 99999:
        raise ValueError(f"num_shards={num_shards} must be in [1, 99999]")
    if endianness := numbers.get(2, 0):
        raise ValueError(f"endianness={endianness} is not 0, little-endian")
    version, _ = _message(messages.get(3, [b""])[-1])
    if (oldest := version.get(2, 0)) > 1:
        raise ValueError(f"it asks for a reader of version {oldest}, this one is 1")
    return num_shards


def _parse_entry(value: bytes, name: str, num_shards: int) -> _Entry:
    """A BundleEntryProto, checked but for the length of the data file."""
    numbers, messages = _message(value)
    if 7 in messages:
        raise ValueError(f"it is partitioned, slices={len(messages[7])} must be 0")
    dtype = DTYPES.get(numbers.get(1, 0))
    if dtype is None:
        known = ", ".join(
            f"{number} ({dtype.name})" for number, dtype in DTYPES.items()
        )
        raise ValueError(f"dtype={numbers.get(1, 0)} is not one of {known}")
    shard, offset, size = (numbers.get(number, 0) for number in (3, 4, 5))
    if not 0 <= shard < num_shards:
        raise ValueError(f"shard_id={shard} must be in [0, {num_shards})")
    if offset < 0:
        raise ValueError(f"{offset=} must be >= 0")
    _, shape_messages = _message(messages.get(2, [b""])[-1])
    dims = shape_messages.get(2, [])
    if len(dims) > 3:
        raise ValueError(f"it has {len(dims)} axes, GPT-2's have at most 3")
    shape = tuple(_message(dim)[0].get(1, 0) for dim in dims)
    if min(shape, default=1) < 1:
        raise ValueError(f"{shape=} must be positive")
    if name.endswith("/w") and (len(shape) != 3 or shape[0] != 1):
        raise ValueError(f"{shape=} must be [1, in, out]")
    if size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{size=} is not that of {dtype.name} of {shape=}")
    return _Entry(shard, offset, shape, dtype)


# Protocol buffers: https://protobuf.dev/programming-guides/encoding


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The unsigned number of up to 64 bits at `at`, and where the next byte is."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("a varint is cut")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, at
    raise ValueError("a varint has more than 64 bits")


def _message(data: bytes) -> tuple[dict[int, int], dict[int, list[bytes]]]:
    """A message's integers (int32, int64, enum) and its messages, by field number.

    Fixed-width fields are passed over. Of an integer that is repeated the last holds.
    """
    numbers: dict[int, int] = {}
    messages: dict[int, list[bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(data, at)
            numbers[field] = value - 2**64 if value >> 63 else value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field {field} has wire type {kind}, none of 0, 1, 2, 5")
        if length > len(data) - at:
            raise ValueError(f"field {field} is cut: {length} bytes, {len(data) - at}")
        if kind == 2:
            messages.setdefault(field, []).append(data[at : at + length])
        at += length
    return numbers, messages


# The sorted string table


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Its keys, in strictly ascending order, with their values."""
    if len(data) < FOOTER_BYTES or data[-8:] != MAGIC:
        raise ValueError("it is cut or no table: its last 8 bytes are not the magic")
    footer = data[-FOOTER_BYTES:-8]
    _, at = _handle(footer, 0)  # of the block of meta-blocks, which there are none of
    index_block, _ = _handle(footer, at)
    end, last = 0, None
    for _, value in _block_entries(_block(data, *index_block)):
        (offset, size), _ = _handle(value, 0)
        if offset < end:
            raise ValueError(f"a block at {offset} begins before {end}, the last's end")
        end = offset + size + TRAILER_BYTES
        for key, entry in _block_entries(_block(data, offset, size)):
            if last is not None and key <= last:
                raise ValueError(
                    f"keys are out of order: {shown(key)} after {shown(last)}"
                )
            last = key
            yield key, entry


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """A block's offset and size, and where the next byte is."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _block(data: bytes, offset: int, size: int) -> bytes:
    end = offset + size
    room = len(data) - FOOTER_BYTES
    if end + TRAILER_BYTES > room:
        raise ValueError(f"a block at {offset} of {size} bytes ends after byte {room}")
    stored = int.from_bytes(data[end + 1 : end + TRAILER_BYTES], "little")
    found = _masked_crc32c(data[offset : end + 1])
    if found != stored:
        raise ValueError(
            f"the block at {offset} is damaged: crc32c {found:08x}, not {stored:08x}"
        )
    if compression := data[end]:
        name = {1: "snappy"}.get(compression, "unknown")
        raise ValueError(
            f"the block at {offset} has compression {compression} ({name})"
        )
    return data[offset:end]


def _block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values. A key is given as what differs from the one before it; at its
    end a block has the places where a search may begin, and their number.
    """
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * restarts
    if end < 0:
        raise ValueError(f"a block of {len(block)} bytes has no room for {restarts=}")
    block = block[:end]
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        new, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key):
            raise ValueError(f"a key shares {shared} bytes with one of {len(key)}")
        if shared + new > MAX_KEY_BYTES:
            raise ValueError(f"a key has {shared + new} bytes, over {MAX_KEY_BYTES}")
        if new + length > end - at:
            raise ValueError(f"an entry is cut: {new + length} bytes, {end - at}")
        key = key[:shared] + block[at : at + new]
        yield key, block[at + new : at + new + length]
        at += new + length


def _crc32c_table() -> list[int]:
    """The remainders of single bytes, by RFC 3720's polynomial, bits reversed."""
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
    return table


CRC32C = _crc32c_table()


def _masked_crc32c(data: bytes) -> int:
    """crc32c, rotated right by 15 bits and added to, as LevelDB stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
