"""TensorFlow checkpoints of a writer of this file: read to the bit, or refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.formats.openai_tf import is_tf_folder, read
from gpt2_jax.formats.tensors import Tensor
from tensorflow_files import (
    DATA,
    HPARAMS,
    INDEX,
    NAMES,
    D,
    V,
    block_of,
    crc32c,
    data_blocks,
    entries_of,
    entry,
    header,
    message,
    table,
    varint,
    weights,
    write_tf,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tf(tmp_path)


def assert_equal(tensors: dict[str, Tensor], arrays: dict[str, np.ndarray]) -> None:
    assert set(tensors) == {NAMES[name][1] for name in arrays}
    for name, array in arrays.items():
        _, path, shape = NAMES[name]
        got = tensors[path].read()
        assert got.shape == tensors[path].shape == shape
        assert got.dtype == tensors[path].dtype == array.dtype
        assert got.tobytes() == array.tobytes()


def test_crc32c_of_the_writer():
    # RFC 3720, B.4: 32 bytes of zeros; and the usual check value.
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"123456789") == 0xE3069283


def test_read(folder: Path):
    config, tensors = read(folder)
    assert config == GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=2, n_head=2
    )
    assert len(tensors) == 28
    assert tensors["h_1/attn/c_attn/kernel"].shape == (8, 24)
    assert_equal(tensors, weights())


def test_the_index_is_of_several_blocks_with_shared_prefixes(folder: Path):
    blocks = data_blocks(entries_of(weights())[0])
    assert len(blocks) == 5
    assert (folder / INDEX).read_bytes().count(b"model/") == 13  # of 28 tensors


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_read_half(folder: Path, dtype: str):
    entries, data = entries_of(weights(dtype), dtype)
    (folder / INDEX).write_bytes(table(data_blocks(entries)))
    (folder / DATA).write_bytes(data)
    assert_equal(read(folder)[1], weights(dtype))


def test_read_shards(folder: Path):
    arrays = weights()
    entries, shards = {"": header(num_shards=3)}, [b"", b"", b""]
    for i, (name, array) in enumerate(arrays.items()):
        entries[name] = entry(array, len(shards[i % 3]), shard=i % 3)
        shards[i % 3] += array.tobytes()
    (folder / INDEX).write_bytes(table(data_blocks(entries)))
    for i, data in enumerate(shards):
        (folder / f"model.ckpt.data-0000{i}-of-00003").write_bytes(data)
    assert_equal(read(folder)[1], arrays)
    (folder / "model.ckpt.data-00001-of-00003").unlink()
    with pytest.raises(FileNotFoundError, match="data-00001-of-00003 is missing"):
        read(folder)


def test_what_is_not_the_models_is_left_out(folder: Path):
    entries, _ = entries_of(weights())
    entries["global_step"] = entry(np.zeros(3), 10**9, dtype=9)
    entries["beta1_power"] = b"\xff"  # not even looked at
    (folder / INDEX).write_bytes(table(data_blocks(entries)))
    assert_equal(read(folder)[1], weights())


def test_another_name_of_the_checkpoint(folder: Path):
    (folder / INDEX).rename(folder / "model-500.index")
    (folder / DATA).rename(folder / "model-500.data-00000-of-00001")
    assert is_tf_folder(folder)
    assert_equal(read(folder)[1], weights())


def test_several_checkpoints(folder: Path):
    """The one that `checkpoint` names, the highest number, or step=."""
    for step in (9, 10, 500):
        shutil.copy(folder / DATA, folder / f"model-{step}.data-00000-of-00001")
        shutil.copy(folder / INDEX, folder / f"model-{step}.index")
    with pytest.raises(ValueError, match="4 checkpoints and nothing says which is"):
        read(folder)
    (folder / INDEX).unlink()  # the others have numbers
    damaged = (folder / "model-500.index").read_bytes()[:-1]
    (folder / "model-500.index").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"model-500\.index: it is cut"):
        read(folder)
    for step in (10, "10", folder / "model-9.index"):
        assert_equal(read(folder, step)[1], weights())
    with pytest.raises(
        FileNotFoundError, match=r"0 checkpoints of step 7, only \[9, 10"
    ):
        read(folder, 7)
    state = (
        'model_checkpoint_path: "/old/place/model-10"\nall_model_checkpoint_paths: "x"'
    )
    (folder / "checkpoint").write_text(state)
    assert_equal(read(folder)[1], weights())
    (folder / "checkpoint").write_text(state.replace("-10", "-11"))
    with pytest.raises(ValueError, match=r"names '.*model-11', which is not beside it"):
        read(folder)


@pytest.mark.parametrize("name", ["hparams.json", INDEX, DATA])
def test_missing_files(folder: Path, name: str):
    assert is_tf_folder(folder)
    (folder / name).unlink()
    assert is_tf_folder(folder) == (name == DATA)
    missing = r"no \*\.index" if name == INDEX else f"{re.escape(name)} is missing"
    with pytest.raises(FileNotFoundError, match=missing):
        read(folder)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "not JSON"),
        ("\xff", "not UTF-8"),
        ("[" * 10**5, "not JSON"),
        ("[]", "holds a list, not an object"),
        (json.dumps({**HPARAMS, "n_ctx": 8.0}), "n_positions=8.0 must be an integer"),
        (json.dumps({**HPARAMS, "n_layer": 0}), "n_layer=0 must be >= 1"),
        (json.dumps({**HPARAMS, "n_head": 3}), "n_embd=8 is not divisible by n_head=3"),
        (json.dumps({**HPARAMS, "n_inner": 3}), "'n_inner' is not one of n_vocab, n_"),
        ('{"n_vocab": 17}', "lacks 'n_ctx'"),
        (" " * (2**20 + 1), "has 1,048,577 bytes, more than 1,048,576"),
    ],
)
def test_bad_hparams(folder: Path, text: str, error: str):
    (folder / "hparams.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"hparams\.json:? .*{re.escape(error)}"):
        read(folder)


WTE = np.zeros((V, D), np.float32)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"model/wte/Adam": entry(WTE, 0)}, "'model/wte/Adam' is none of GPT-2's"),
        ({"model/h01/ln_1/g": b""}, "'model/h01/ln_1/g' is none of GPT-2's"),
        ({"model/h10000/ln_1/g": b""}, "'model/h10000/ln_1/g' is none of GPT-2's"),
        ({"model/wte\n": b""}, r"'model/wte\n' is none of GPT-2's"),
        ({"model/ln_f/w": b""}, "'model/ln_f/w' is none of GPT-2's"),
        (
            {"model/wte": entry(WTE, 0, slices=message((7, b"")))},
            "tensor model/wte: it is partitioned, slices=1 must be 0",
        ),
        (
            {"model/wte": entry(WTE, 0, dtype=2)},
            "tensor model/wte: dtype=2 is not one of "
            "1 (float32), 14 (bfloat16), 19 (float16)",
        ),
        ({"model/wte": b""}, "tensor model/wte: dtype=0 is not one of 1 (float32)"),
        ({"model/wte": entry(WTE, 0, shard=1)}, "shard_id=1 must be in [0, 1)"),
        ({"model/wte": entry(WTE, 0, shard=-1)}, "shard_id=-1 must be in [0, 1)"),
        ({"model/wte": entry(WTE, -1)}, "offset=-1 must be >= 0"),
        ({"model/wte": entry(WTE, 0, size=-1)}, "size=-1 is not that of float32 of"),
        (
            {"model/wte": entry(WTE, 0, size=543)},
            "size=543 is not that of float32 of shape=(17, 8)",
        ),
        ({"model/wte": entry(WTE, 0, shape=(0, 8))}, "shape=(0, 8) must be positive"),
        ({"model/wte": entry(WTE, 0, shape=(-17, -8))}, "shape=(-17, -8) must be"),
        ({"model/wte": entry(WTE, 0, shape=(1,) * 4)}, "it has 4 axes, GPT-2's have"),
        (
            {"model/h0/mlp/c_fc/w": entry(WTE, 0)},
            "tensor model/h0/mlp/c_fc/w: shape=(17, 8) must be [1, in, out]",
        ),
        (
            {"model/h0/mlp/c_fc/w": entry(WTE, 0, shape=(2, 2, 34))},
            "shape=(2, 2, 34) must be [1, in, out]",
        ),
        ({"model/wte": b"\x08"}, "tensor model/wte: a varint is cut"),
        ({"model/wte": b"\x08" + b"\xff" * 10}, "a varint has more than 64 bits"),
        ({"model/wte": b"\x08" + b"\xff" * 9 + b"\x02"}, "more than 64 bits"),
        ({"model/wte": b"\x12\x05abcd"}, "field 2 is cut: 5 bytes, 4"),
        ({"model/wte": b"\x35abc"}, "field 6 is cut: 4 bytes, 3"),
        ({"model/wte": b"\x0b"}, "field 1 has wire type 3, none of 0, 1, 2, 5"),
        ({"": header(num_shards=0)}, "num_shards=0 must be in [1, 99999]"),
        ({"": header(num_shards=10**5)}, "num_shards=100000 must be in [1, 99999]"),
        ({"": header(endianness=1)}, "endianness=1 is not 0, little-endian"),
        ({"": header(min_consumer=2)}, "it asks for a reader of version 2, this"),
        ({"": b"\x80"}, "a varint is cut"),
    ],
)
def test_bad_entries(folder: Path, changes: dict[str, bytes], error: str):
    entries, _ = entries_of(weights())
    (folder / INDEX).write_bytes(table(data_blocks({**entries, **changes})))
    with pytest.raises(
        ValueError, match=rf"model\.ckpt\.index: .*{re.escape(error)}"
    ) as raised:
        read(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("changes", [{"offset": 10**6}, {"offset": 2**63 - 1}])
def test_entries_beyond_the_data(folder: Path, changes: dict[str, Any]):
    entries, data = entries_of(weights())
    entries["model/wte"] = entry(WTE, **changes)
    (folder / INDEX).write_bytes(table(data_blocks(entries)))
    needs = changes["offset"] + V * D * 4
    error = rf"{DATA} is cut: {len(data)} bytes, its header needs {needs}"
    with pytest.raises(ValueError, match=error):
        read(folder)


def test_cut_data(folder: Path):
    data = (folder / DATA).read_bytes()
    for length in range(0, len(data), 50):
        (folder / DATA).write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"{DATA} is cut: {length} bytes"):
            read(folder)


def bad_table(kind: str) -> bytes:
    head = block_of([(b"", header())])
    room = varint(len(head))
    return {
        "empty": lambda: table([]),
        "no header": lambda: table([block_of([(b"a", b"")])]),
        "snappy": lambda: table([head], compression=1),
        "zstd": lambda: table([head], compression=2),
        "outside": lambda: table([head], handles=[varint(2**40) + room]),
        "huge": lambda: table([head], handles=[varint(0) + varint(2**63)]),
        "handle": lambda: table([head], handles=[b"\x00"]),
        "twice": lambda: table([head], handles=[b"\x00" + room] * 2),
        "order": lambda: table([block_of([(b"", header()), (b"b", b""), (b"a", b"")])]),
        "again": lambda: table([head, head]),
        "tiny": lambda: table([b"\0\0\0"]),
        "restarts": lambda: table([b"\0\0\0\0\xff\xff\xff\xff"]),
        "shared": lambda: table([b"\x01\x00\x00" + bytes(4)]),
        "key": lambda: table([block_of([(b"", header()), (b"a" * 4097, b"")])]),
        "value": lambda: table([b"\x00\x01\x05abcde" + bytes(4)]),
        "length": lambda: table([b"\x00\x01" + varint(2**63) + bytes(4)]),
        "varint": lambda: table([b"\x00\xff" + bytes(4)]),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("empty", "it has no header: its first key is not empty"),
        ("no header", "it has no header: its first key is not empty"),
        ("snappy", "the block at 0 has compression 1 (snappy)"),
        ("zstd", "the block at 0 has compression 2 (unknown)"),
        ("outside", "a block at 1099511627776 of 21 bytes ends after byte 59"),
        ("huge", "a block at 0 of 9223372036854775808 bytes ends after byte 63"),
        ("handle", "a varint is cut"),
        ("twice", "a block at 0 begins before 26, the last's end"),
        ("order", "keys are out of order: b'a' after b'b'"),
        ("again", "keys are out of order: b'' after b''"),
        ("tiny", "a block of 3 bytes has no room for restarts=0"),
        ("restarts", "a block of 8 bytes has no room for restarts=4294967295"),
        ("shared", "a key shares 1 bytes with one of 0"),
        ("key", "a key has 4097 bytes, over 4096"),
        ("value", "an entry is cut: 6 bytes, 5"),
        ("length", "an entry is cut: 9223372036854775809 bytes, 0"),
        ("varint", "a varint is cut"),
    ],
)
def test_bad_tables(folder: Path, kind: str, error: str):
    (folder / INDEX).write_bytes(bad_table(kind))
    with pytest.raises(ValueError, match=rf"model\.ckpt\.index: {re.escape(error)}"):
        read(folder)


def test_a_huge_index_is_not_read(folder: Path):
    with (folder / INDEX).open("wb") as file:
        file.truncate(2**20 + 1)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match="has 1,048,577 bytes, more than 1,048,576"):
        read(folder)


def test_cut_index(folder: Path):
    index = (folder / INDEX).read_bytes()
    for length in range(0, len(index), 49):
        (folder / INDEX).write_bytes(index[:length])
        with pytest.raises(ValueError, match=r"\.index: it is cut or no table"):
            read(folder)


def flips(data: bytes, count: int) -> list[bytes]:
    """Copies of the data with one bit flipped each."""
    found = []
    for bit in np.random.default_rng(0).integers(8 * len(data), size=count):
        copy = bytearray(data)
        copy[bit // 8] ^= 1 << bit % 8
        found.append(bytes(copy))
    return found


def outcome(folder: Path, check: Callable[[dict[str, Tensor]], None]) -> str:
    try:
        _, tensors = read(folder)
    except (ValueError, FileNotFoundError) as error:
        return type(error).__name__
    check(tensors)
    return "read"


def test_a_flipped_bit_is_found(folder: Path):
    """Or it is one of those that are not read: padding, and the meta block."""
    outcomes = []
    for copy in flips((folder / INDEX).read_bytes(), 100):
        (folder / INDEX).write_bytes(copy)
        outcomes.append(outcome(folder, lambda got: assert_equal(got, weights())))
    assert outcomes.count("ValueError") == 98
    assert outcomes.count("read") == 2


def test_flipped_bits_under_right_checksums_raise_nothing_else(folder: Path):
    def check(tensors: dict[str, Tensor]) -> None:
        for tensor in tensors.values():
            assert tensor.read().shape == tensor.shape

    outcomes = set()
    blocks = data_blocks(entries_of(weights())[0])
    for i, block in enumerate(blocks):
        for copy in flips(block, 60):
            changed = table([*blocks[:i], copy, *blocks[i + 1 :]])
            (folder / INDEX).write_bytes(changed)
            outcomes.add(outcome(folder, check))
    # A file is missing when the number of shards was flipped.
    assert outcomes == {"read", "ValueError", "FileNotFoundError"}
