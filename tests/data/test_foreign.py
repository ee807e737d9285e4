"""Shards that others made: read as they are, or refused by name."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.data.foreign import is_foreign
from gpt2_jax.data.loader import TokenDataset
from gpt2_jax.data.prepare import load_index, prepare
from gpt2_jax.data.run_data import prepared_folder
from gpt2_jax.tokenizers.files import save_tokenizer
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer

IDS = np.arange(1000) % 257


def nanogpt(folder: Path, dtype: str = "<u2") -> Path:
    folder.mkdir()
    IDS.astype(dtype).tofile(folder / "train.bin")
    IDS[:100].astype(dtype).tofile(folder / "val.bin")
    (folder / "input.txt").write_text("what the ids were made of")
    return folder


def llmc_shard(file: Path, ids: np.ndarray, **header: int) -> None:
    values = {"magic": 20240520, "version": 1, "tokens": len(ids), **header}
    head = np.zeros(256, "<i4")
    head[:3] = values["magic"], values["version"], values["tokens"]
    dtype = "<u4" if values["magic"] == 20240801 else "<u2"
    file.write_bytes(head.tobytes() + ids.astype(dtype).tobytes())


def llmc(folder: Path, magic: int = 20240520, version: int = 1) -> Path:
    folder.mkdir()
    options = {"magic": magic, "version": version}
    llmc_shard(folder / "fineweb_train_000001.bin", IDS[:600], **options)
    llmc_shard(folder / "fineweb_train_000002.bin", IDS[600:], **options)
    llmc_shard(folder / "fineweb_val_000000.bin", IDS[:100], **options)
    return folder


def check(out: Path) -> None:
    dataset = TokenDataset(out, "train")
    assert dataset.windows(np.array([0]), 1000).tolist() == [IDS.tolist()]
    assert dataset.windows(np.array([590]), 20).tolist() == [IDS[590:610].tolist()]
    assert len(TokenDataset(out, "validation")) == 100
    assert load_index(out).vocab_size == 257


@pytest.mark.parametrize(
    ("write", "options", "dtype"),
    [
        (nanogpt, {}, "uint16"),
        (nanogpt, {"dtype": "<u4"}, "uint32"),
        (llmc, {}, "uint16"),
        (llmc, {"magic": 20240801, "version": 7}, "uint32"),
    ],
)
def test_shards_are_read_as_they_are(tmp_path, write, options, dtype):
    folder = write(tmp_path / "in", **options)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    index = prepare(folder, tmp_path / "out", ByteTokenizer())
    assert index.dtype == dtype
    check(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))  # nothing is copied
    # a run's folder refers to them too, and is used again
    asked = {"tokenizer": "bytes", "vocab_size": 4096, "splits": (0.9, 0.1, 0)}
    data = prepared_folder(folder, tmp_path / "data", **asked)
    check(data)
    stamp = (data / "index.json").stat().st_mtime_ns
    assert prepared_folder(folder, tmp_path / "data", **asked) == data
    assert (data / "index.json").stat().st_mtime_ns == stamp
    # with a tokenizer in it, the folder alone is a data set
    save_tokenizer(ByteTokenizer(), folder)
    check(folder)
    (folder / "bytes.json").unlink()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["meta.pkl", "meta.json"])
def test_nanogpts_characters_are_the_tokenizer(tmp_path, name):
    (tmp_path / "in").mkdir()
    text = "to be or not to be"
    table = CharTokenizer(text, end_of_text=False)
    for split in ("train", "val"):
        np.array(table.encode(text), "<u2").tofile(tmp_path / f"in/{split}.bin")
    itos = dict(enumerate(table.characters))
    meta = {"vocab_size": len(itos), "itos": itos}
    content = pickle.dumps(meta) if name == "meta.pkl" else json.dumps(meta).encode()
    (tmp_path / "in" / name).write_bytes(content)
    data = prepared_folder(
        tmp_path / "in",
        tmp_path / "data",
        tokenizer="sentencepiece",
        vocab_size=4096,
        splits=(0.9, 0.1, 0),
    )
    index = load_index(data)
    assert (index.tokenizer_kind, index.vocab_size, index.dtype) == (
        "char",
        7,
        "uint16",
    )
    ids = TokenDataset(data, "train").windows(np.array([0]), len(text))[0]
    assert table.decode(ids) == text


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def damage(folder: Path, what: str) -> None:
    shard = folder / "fineweb_train_000002.bin"
    if what == "magic":
        llmc_shard(shard, IDS, magic=20240326)
    elif what == "version":
        llmc_shard(shard, IDS, version=9)
    elif what == "count":
        llmc_shard(shard, IDS, tokens=999)
    elif what == "negative":
        llmc_shard(shard, IDS, tokens=-1)
    elif what == "ids":
        llmc_shard(shard, np.append(IDS, 257))
    elif what == "dtype":
        llmc_shard(shard, IDS, magic=20240801)
    elif what == "short":
        shard.write_bytes(b"12345")
    elif what == "empty":
        llmc_shard(shard, IDS[:0])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "magic",
            r"_000002\.bin has the magic number 20240326, not 20240520 or 2024080",
        ),
        ("version", "has version 9, not"),
        ("count", "has 3024 bytes, its header's 999 tokens of uint16 need 3022"),
        ("negative", "its header's -1 tokens"),
        ("ids", "token 1000 is 257, but vocab_size=257"),
        ("dtype", r"_000002\.bin holds uint32, but .*_000001\.bin uint16"),
        ("short", "has 5 bytes, its header 1024"),
        ("empty", "its header's 0 tokens"),
    ],
)
def test_damaged_headers_are_named(tmp_path, what, message):
    folder = llmc(tmp_path / "in")
    damage(folder, what)
    with pytest.raises(ValueError, match=message):
        prepare(folder, tmp_path / "out", ByteTokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_bare_shards_that_are_refused(tmp_path, capsys):
    folder = nanogpt(tmp_path / "in")

    def refuse(message: str, **options: object) -> None:
        options = {"tokenizer": ByteTokenizer(), **options}
        with pytest.raises(ValueError, match=message):
            prepare(folder, tmp_path / "out", **options)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]

    refuse("dtype='int8' is not one of uint16, uint32", dtype="int8")
    refuse(r"train\.bin: token 256 is 16777471, but vocab_size=257", dtype="uint32")
    refuse("holds token shards and no tokenizer", tokenizer="sentencepiece")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": Evil()}))
    refuse("meta.pkl", tokenizer="sentencepiece")
    assert capsys.readouterr().out == ""
    with (folder / "val.bin").open("ab") as file:
        file.write(b"x")
    refuse(r"val\.bin has 201 bytes: not a positive multiple of the 2 of uint16")
    (folder / "val.bin").write_bytes(b"")
    refuse(r"val\.bin has 0 bytes")
    (folder / "train.bin").rename(folder / "train-00000.bin")  # ours, unfinished
    assert not is_foreign(folder)
    refuse("dtype='uint16' is of token shards", dtype="uint16")
