"""Splits to the byte, folders that are whole or not there, and every refusal."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.data import make_tokenizer, sources
from gpt2_jax.data.make_tokenizer import build_tokenizer
from gpt2_jax.data.prepare import fingerprint, load_index, prepare
from gpt2_jax.data.run_data import prepared_folder
from gpt2_jax.tokenizers.files import load_tokenizer, save_tokenizer, tokenizer_hash
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer

EOT = 256  # of ByteTokenizer


class WideTokenizer(ByteTokenizer):
    """Bytes, numbered from 100,000 on: ids that need uint32."""

    def encode(self, text: str) -> list[int]:
        return [100_000 + b for b in super().encode(text)]

    @property
    def vocab_size(self) -> int:
        return 100_256


def read(folder: Path, split: str) -> list[int]:
    index = load_index(folder)
    shards = index.splits[split].shards
    parts = [np.fromfile(folder / shard.name, index.dtype) for shard in shards]
    return np.concatenate(parts).tolist()


def text_of(ids: Sequence[int]) -> str:
    return ByteTokenizer().decode([i for i in ids if i != EOT])


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A file of 1003 ASCII characters."""
    path = tmp_path / "book.txt"
    path.write_text(("A line of text.\n" * 63)[:1003])
    return path


def folder_of_files(folder: Path, count: int = 20) -> list[str]:
    folder.mkdir()
    texts = [f"Document {n}: " + "é" * (7 * n) + ".\n" for n in range(count)]
    for n, text in enumerate(texts):
        (folder / f"{n:02}.txt").write_text(text, encoding="utf-8")
    return texts


def test_a_single_file_is_cut_at_the_character(book: Path, tmp_path: Path):
    """As nanoGPT splits a character data set: train is text[: int(n * 0.9)]."""
    index = prepare(book, tmp_path / "out", ByteTokenizer(), splits=(0.9, 0.1, 0.0))
    text = book.read_text()
    assert list(index.splits) == ["train", "validation"]
    assert read(tmp_path / "out", "train") == list(text[:902].encode())
    assert read(tmp_path / "out", "validation") == [*text[902:].encode(), EOT]
    assert index.splits["train"].tokens == index.splits["train"].bytes == 902
    assert index.splits["validation"].tokens == 102
    assert not (tmp_path / "out" / "test-00000.bin").exists()
    assert load_index(tmp_path / "out") == index


@pytest.mark.parametrize("splits", [(0.9, 0.05, 0.05), (0.5, 0.2, 0.3), (1, 0, 0)])
def test_splits_partition_the_documents(tmp_path: Path, splits: tuple[float, ...]):
    """Each document is in one split, or cut; end of text follows its end."""
    texts = folder_of_files(tmp_path / "in")
    total = sum(len(text.encode()) for text in texts)
    index = prepare(tmp_path / "in", tmp_path / "out", ByteTokenizer(), splits=splits)
    streams = [read(tmp_path / "out", name) for name in index.splits]
    joined = [i for stream in streams for i in stream]
    assert joined.count(EOT) == len(texts)
    found = text_of(joined)
    assert sorted(found.splitlines(keepends=True)) == sorted(texts)
    assert found != "".join(texts)  # shuffled
    assert joined[-1] == EOT
    ends = np.cumsum([part.bytes for part in index.splits.values()])
    wanted = np.cumsum([s for s in splits if s]) * total
    assert (np.abs(ends - wanted) < 2.01).all()  # a cut moves back inside an é
    assert ends[-1] == total
    for stream in streams:
        assert "\ufffd" not in text_of(stream)


def test_the_order_is_the_seeds(tmp_path: Path):
    folder_of_files(tmp_path / "in")
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        prepare(tmp_path / "in", tmp_path / name, ByteTokenizer(), seed=seed)
    a, b, c = (read(tmp_path / name, "train") for name in "abc")
    assert a == b
    assert a != c


def test_shards_roll_over(book: Path, tmp_path: Path):
    index = prepare(
        book, tmp_path / "out", ByteTokenizer(), splits=(1, 0, 0), shard_tokens=300
    )
    shards = index.splits["train"].shards
    assert [(s.name, s.tokens) for s in shards] == [
        ("train-00000.bin", 300),
        ("train-00001.bin", 300),
        ("train-00002.bin", 300),
        ("train-00003.bin", 104),
    ]
    assert text_of(read(tmp_path / "out", "train")) == book.read_text()


def test_threads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder_of_files(tmp_path / "in")
    monkeypatch.setattr(sources.Document.read, "__defaults__", (0, None, 16))
    for threads in (1, 4):
        prepare(
            tmp_path / "in",
            tmp_path / f"{threads}",
            ByteTokenizer(),
            threads=threads,
            shard_tokens=100,
        )
    one, four = (
        {path.name: path.read_bytes() for path in (tmp_path / n).glob("*.*")}
        for n in "14"
    )
    assert len(one) > 10
    assert one == four


def test_large_vocabularies_use_uint32(book: Path, tmp_path: Path):
    index = prepare(book, tmp_path / "out", WideTokenizer(), splits=(1, 0, 0))
    assert index.dtype == "uint32"
    assert index.vocab_size == 100_256
    assert read(tmp_path / "out", "train")[:2] == [100_065, 100_032]
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 1004 * 4
    small = prepare(book, tmp_path / "small", ByteTokenizer())
    assert small.dtype == "uint16"
    first = (tmp_path / "small" / "train-00000.bin").read_bytes()[:4]
    assert first == b"A\0 \0"  # little-endian


def test_the_tokenizer_is_carried(book: Path, tmp_path: Path):
    tokenizer = build_tokenizer("sentencepiece", book, 275)
    index = prepare(book, tmp_path / "out", tokenizer)
    assert (index.vocab_size, index.eot_id) == (275, 1)
    loaded = load_tokenizer(tmp_path / "out" / "tokenizer")
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer) == index.tokenizer_hash
    ids = [i for name in index.splits for i in read(tmp_path / "out", name)]
    assert loaded.decode(ids) == book.read_text() + "<|endoftext|>"


def test_the_default_corpus(tmp_path: Path):
    seen: list[tuple[int, int | None, int]] = []
    index = prepare(
        None,
        tmp_path / "out",
        ByteTokenizer(),
        progress=lambda *state: seen.append(state),
    )
    total = sum(part.bytes for part in index.splits.values())
    tokens = sum(part.tokens for part in index.splits.values())
    assert seen == sorted(seen)
    assert seen[-1] == (total, total, tokens)
    assert total > 1_400_000
    assert abs(index.splits["train"].bytes / total - 0.9) < 1e-5


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    """39 MB of text in 32 MB: two blocks, their lists of ids and the arrays."""
    file = tmp_path / "big.txt"
    with file.open("w") as out:
        for n in range(40):
            out.write(f"line {n}\n" * 125_000 if n % 2 else "no line end " * 83_000)
    assert file.stat().st_size > 39_000_000
    tracemalloc.start()
    index = prepare(file, tmp_path / "out", ByteTokenizer(), threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32_000_000
    tokens = sum(part.tokens for part in index.splits.values())
    assert tokens == file.stat().st_size + 1


# --- Whole or not there


def test_a_failure_leaves_nothing(book: Path, tmp_path: Path):
    book.write_bytes(book.read_bytes() + b"\xff")
    with pytest.raises(ValueError, match=r"book\.txt is not UTF-8: .* at byte 1003"):
        prepare(book, tmp_path / "out", ByteTokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_a_killed_preparation_is_not_taken_for_a_finished_one(tmp_path: Path):
    program = """
import sys, time
from gpt2_jax.data.prepare import prepare
from gpt2_jax.tokenizers.plain import ByteTokenizer
def progress(*_):
    print("going", flush=True)
    time.sleep(60)
prepare(sys.argv[1], sys.argv[2], ByteTokenizer(), progress=progress)
"""
    (tmp_path / "in.txt").write_text("some text\n" * 1000)
    out = tmp_path / "out"
    args = [sys.executable, "-c", program, str(tmp_path / "in.txt"), str(out)]
    with subprocess.Popen(args, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"going\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    left = tmp_path / "out.partial"
    assert left.is_dir()
    for folder in (out, left):
        with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
            load_index(folder)
    index = prepare(tmp_path / "in.txt", out, ByteTokenizer())
    assert load_index(out) == index


def test_prepared_data_are_replaced_and_nothing_else(book: Path, tmp_path: Path):
    out = tmp_path / "out"
    first = prepare(book, out, ByteTokenizer(), seed=1)
    book.write_text("Another text, a shorter one.\n")
    second = prepare(book, out, ByteTokenizer())
    assert load_index(out) == second != first
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="out exists and is not a folder of prep"):
        prepare(book, out, ByteTokenizer())
    assert (out / "thesis.txt").read_text() == "precious"
    with pytest.raises(FileExistsError, match=r"book\.txt exists and is not a folder"):
        prepare(book, book, ByteTokenizer())
    (tmp_path / "empty").mkdir()
    prepare(book, tmp_path / "empty", ByteTokenizer())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "book.txt",
        "empty",
        "out",
    ]


def test_damaged_folders_are_refused(book: Path, tmp_path: Path):
    out = tmp_path / "out"
    prepare(book, out, ByteTokenizer())
    good = json.loads((out / "index.json").read_text())

    def refuse(message: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=message):
            load_index(out)

    def write(data: object) -> None:
        (out / "index.json").write_text(json.dumps(data))

    (out / "index.json").write_text(json.dumps(good)[:-9])
    refuse(r"index\.json: not JSON")
    for data in ([], {**good, "splits": 3}, {**good, "extra": 1}, {"version": 1}):
        write(data)
        refuse(r"index\.json is damaged")
    write({**good, "dtype": "float99"})
    refuse(r"index\.json is damaged")
    write({**good, "version": 7})
    refuse("version 7, this program reads 1")
    write({**good, "tokenizer_hash": "0" * 64})
    refuse("not the tokenizer that the data were made by")
    write(good)
    (out / "tokenizer" / "bytes.json").write_text("{ }")
    refuse("not the tokenizer that the data were made by")
    (out / "tokenizer" / "bytes.json").unlink()
    (out / "tokenizer").rmdir()
    refuse("tokenizer is missing", FileNotFoundError)
    with (out / "test-00000.bin").open("ab") as file:
        file.write(b"x")
    refuse(r"test-00000\.bin has 105 bytes, its 52 tokens of uint16 need 104")
    (out / "test-00000.bin").unlink()
    refuse(r"test-00000\.bin is missing", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match=r"no prepared data in .*nowhere"):
        load_index(tmp_path / "nowhere")


# --- Requests


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": (0.9, 0.1)}, "three fractions, of train, validation, test"),
        ({"splits": (0.9, 0.2, 0.0)}, "add up to 1.1, not to 1"),
        ({"splits": (1.1, -0.1, 0.0)}, "not in 0 .. 1"),
        ({"splits": (float("nan"), 0, 1)}, "fraction=nan must be a number"),
        ({"splits": (0.0005, 0.9995, 0)}, "train split, 0.0005 of 1003 bytes .* empty"),
        ({"shard_tokens": 0}, "shard_tokens=0 must be >= 1"),
        ({"threads": 0}, "threads=0 must be >= 1"),
        ({"seed": -1}, "seed=-1 must be in"),
    ],
)
def test_bad_requests_are_refused(book: Path, tmp_path: Path, changes, message: str):
    with pytest.raises(ValueError, match=message):
        prepare(book, tmp_path / "out", ByteTokenizer(), **changes)
    assert not (tmp_path / "out").exists()


def test_sources_without_text_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        prepare(tmp_path / "nowhere", tmp_path / "out", ByteTokenizer())
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="no text in"):
        prepare(tmp_path / "empty.txt", tmp_path / "out", ByteTokenizer())


def test_the_fingerprint_tells_requests_apart(book: Path, tmp_path: Path):
    base = {"tokenizer": "bytes", "vocab_size": None}
    first = fingerprint(book, **base)
    index = prepare(book, tmp_path / "out", ByteTokenizer(), source=first)
    assert load_index(tmp_path / "out").source == index.source
    [name] = index.source.keys() - first.keys()
    assert name == "content"  # which takes reading the text
    assert index.source == {**fingerprint(book, **base), name: index.source[name]}
    folder_of_files(tmp_path / "in", 3)
    save_tokenizer(CharTokenizer("ab"), tmp_path / "given")
    given = {"tokenizer": str(tmp_path / "given"), "vocab_size": None}
    others = [
        fingerprint(None, **base),
        fingerprint(tmp_path / "in", **base),
        fingerprint(book, tokenizer="char", vocab_size=None),
        fingerprint(book, tokenizer="bytes", vocab_size=257),
        fingerprint(book, **base, splits=(0.9, 0.1, 0)),
        fingerprint(book, **base, seed=1),
        fingerprint(book, **given),
    ]
    save_tokenizer(CharTokenizer("abc"), tmp_path / "given")
    others.append(fingerprint(book, **given))
    os.utime(book, ns=(time.time_ns(), 1))
    others.append(fingerprint(book, **base))
    unique = {json.dumps(each, sort_keys=True) for each in [first, *others]}
    assert len(unique) == 1 + len(others)


def test_the_default_corpus_is_collected_once(tmp_path: Path, monkeypatch):
    asked = {"tokenizer": "bytes", "vocab_size": None, "splits": (0.9, 0.05, 0.05)}
    folder = prepared_folder(None, tmp_path / "data", **asked)
    monkeypatch.setattr(sources, "documents", None)
    assert prepared_folder(None, tmp_path / "data", **asked) == folder
    for change in ({"tokenizer": "char"}, {"splits": (0.8, 0.1, 0.1)}):
        with pytest.raises(ValueError, match=f"prepared with {next(iter(change))}="):
            prepared_folder(None, tmp_path / "data", **{**asked, **change})


def test_tokenizers_are_built(book: Path, tmp_path: Path):
    assert build_tokenizer("bytes").vocab_size == 257
    assert build_tokenizer("char", book).vocab_size == len(set(book.read_text())) + 1
    assert build_tokenizer("sentencepiece", book, 270).vocab_size == 270
    save_tokenizer(CharTokenizer("ab"), tmp_path / "given")
    assert build_tokenizer(str(tmp_path / "given"), vocab_size=3).vocab_size == 3
    with pytest.raises(ValueError, match="vocab_size=9, but the tokenizer 'bytes' has"):
        build_tokenizer("bytes", vocab_size=9)
    with pytest.raises(ValueError, match="needs vocab_size"):
        build_tokenizer("sentencepiece", book)
    with pytest.raises(FileNotFoundError, match="no tokenizer: nowhere does not exist"):
        build_tokenizer("nowhere", book)


def test_sentencepiece_sees_only_the_first_text(tmp_path: Path, monkeypatch):
    folder_of_files(tmp_path / "in", 3)
    (tmp_path / "in" / "99.txt").write_bytes(b"\xff")  # would be refused
    monkeypatch.setattr(make_tokenizer, "TRAINING_BYTES", 40)
    tokenizer = build_tokenizer("sentencepiece", tmp_path / "in", 275)
    assert tokenizer.vocab_size == 275
