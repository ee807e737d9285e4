"""TensorFlow's checkpoints, written here by hand from what their formats say."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

V, P, D, F, N = 17, 8, 8, 32, 2
HPARAMS = {"n_vocab": V, "n_ctx": P, "n_embd": D, "n_head": 2, "n_layer": N}
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
DTYPES = {
    "float32": (1, np.float32),
    "bfloat16": (14, jnp.bfloat16),
    "float16": (19, np.float16),
}

# TensorFlow's name and shape, and ours.
NAMES = {
    "model/wte": ((V, D), "wte/embedding", (V, D)),
    "model/wpe": ((P, D), "wpe/embedding", (P, D)),
    "model/ln_f/g": ((D,), "ln_f/scale", (D,)),
    "model/ln_f/b": ((D,), "ln_f/bias", (D,)),
}
for i in range(N):
    theirs, ours = f"model/h{i}", f"h_{i}"
    for norm in ("ln_1", "ln_2"):
        NAMES[f"{theirs}/{norm}/g"] = ((D,), f"{ours}/{norm}/scale", (D,))
        NAMES[f"{theirs}/{norm}/b"] = ((D,), f"{ours}/{norm}/bias", (D,))
    for module, inner, outer in [
        ("attn/c_attn", D, 3 * D),
        ("attn/c_proj", D, D),
        ("mlp/c_fc", D, F),
        ("mlp/c_proj", F, D),
    ]:
        shape = (inner, outer)
        NAMES[f"{theirs}/{module}/w"] = ((1, *shape), f"{ours}/{module}/kernel", shape)
        NAMES[f"{theirs}/{module}/b"] = ((outer,), f"{ours}/{module}/bias", (outer,))


def crc32c(data: bytes) -> int:
    """By definition, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc ^ 0xFFFFFFFF


def trailer(block: bytes, compression: int = 0) -> bytes:
    crc = crc32c(block + bytes([compression]))
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
    return bytes([compression]) + masked.to_bytes(4, "little")


def varint(value: int) -> bytes:
    value %= 2**64
    out = b""
    while value >= 128:
        out += bytes([value % 128 + 128])
        value //= 128
    return out + bytes([value])


def message(*fields: tuple[int, int | bytes]) -> bytes:
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def header(num_shards: int = 1, endianness: int = 0, min_consumer: int = 0) -> bytes:
    version = message((1, 1), (2, min_consumer))
    return message((1, num_shards), (2, endianness), (3, version))


def entry(
    array: np.ndarray,
    offset: int,
    *,
    shape: tuple[int, ...] | None = None,
    shard: int = 0,
    size: int | None = None,
    dtype: int = 1,
    slices: bytes = b"",
) -> bytes:
    dims = [(2, message((1, n))) for n in (array.shape if shape is None else shape)]
    return (
        message(
            (1, dtype),
            (2, message(*dims)),
            (3, shard),
            (4, offset),
            (5, array.nbytes if size is None else size),
        )
        + varint(6 << 3 | 5)
        + crc32c(array.tobytes()[:4]).to_bytes(4, "little")
        + slices
    )


def block_of(pairs: list[tuple[bytes, bytes]], interval: int = 16) -> bytes:
    """Keys share their prefixes, but for each `interval`-th, a restart."""
    out, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % interval == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(last), len(key)) and last[shared] == key[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value))
        out += key[shared:] + value
        last = key
    for at in [*restarts, len(restarts)]:
        out += at.to_bytes(4, "little")
    return out


def table(
    blocks: list[bytes], compression: int = 0, handles: list[bytes] | None = None
) -> bytes:
    """A file of the given blocks; `handles` in place of the right ones."""
    out, right = b"", []
    for i, block in enumerate(blocks):
        right.append((b"%d" % i, varint(len(out)) + varint(len(block))))
        out += block + trailer(block, compression)
    meta = block_of([])
    meta_handle = varint(len(out)) + varint(len(meta))
    out += meta + trailer(meta)
    if handles is not None:
        right = [(b"%d" % i, handle) for i, handle in enumerate(handles)]
    index = block_of(right, 1)
    footer = meta_handle + varint(len(out)) + varint(len(index))
    out += index + trailer(index)
    return out + footer.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")


def data_blocks(entries: dict[str, bytes], keys_in_a_block: int = 7) -> list[bytes]:
    pairs = sorted((key.encode(), value) for key, value in entries.items())
    return [
        block_of(pairs[i : i + keys_in_a_block], 3)
        for i in range(0, len(pairs), keys_in_a_block)
    ]


def weights(dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(DTYPES[dtype][1])
        for name, (shape, _, _) in NAMES.items()
    }


def entries_of(
    arrays: dict[str, np.ndarray], dtype: str = "float32"
) -> tuple[dict[str, bytes], bytes]:
    """The header and an entry a tensor, and the bytes of the data file."""
    entries, data = {"": header()}, b""
    for name, array in arrays.items():
        entries[name] = entry(array, len(data), dtype=DTYPES[dtype][0])
        data += array.tobytes()
    return entries, data


def write_tf(folder: Path) -> Path:
    """A whole checkpoint of `weights()`."""
    folder.mkdir(exist_ok=True)
    entries, data = entries_of(weights())
    (folder / "hparams.json").write_text(json.dumps(HPARAMS))
    (folder / INDEX).write_bytes(table(data_blocks(entries)))
    (folder / DATA).write_bytes(data)
    return folder
