"""Text as users have it: marks, links, odd names, compressed files, pipes."""

import gzip
import json
import os
import sys
import threading
from pathlib import Path

import pytest

from gpt2_jax.data import stored
from gpt2_jax.data.make_tokenizer import build_tokenizer
from gpt2_jax.data.prepare import prepare
from gpt2_jax.data.sft import read_examples
from gpt2_jax.data.sources import Document, documents, streams_stored, text_files
from gpt2_jax.tokenizers.plain import ByteTokenizer

ROW = '{"text": "caf\u00e9\u2028x"}\n'


def texts(path: object, **options: str) -> list[str]:
    return [text for source in documents(path, **options) for text in source.texts()]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_text(tmp_path, end):
    text = write(tmp_path / "a.txt", f"\ufeffone{end}two\ufeff{end}")
    assert texts(text) == [f"one{end}two\ufeff{end}"]
    (source,) = documents(text)
    assert isinstance(source, Document)
    assert [line for _, line in source.lines()] == ["one", "two\ufeff"]
    write(text, "\ufeffab")
    assert build_tokenizer("char", text).vocab_size == len("ab") + 1
    index = prepare(text, tmp_path / "out", ByteTokenizer(), splits=(1, 0, 0))
    assert (index.splits["train"].bytes, index.splits["train"].tokens) == (2, 3)
    # In JSON Lines at each line's beginning: files are laid end to end.
    rows = write(tmp_path / "a.jsonl", ("\ufeff" + ROW.replace("\n", end)) * 2)
    assert texts(rows) == ["caf\u00e9\u2028x"] * 2
    row = '\ufeff{"prompt": "a", "completion": "b"}\n'
    examples, _ = read_examples(
        write(tmp_path / "s", row), ByteTokenizer(), block_size=9
    )
    assert examples[0].tokens.tolist() == [97, 98, 256]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("ab".encode("utf-16"), "is not UTF-8: the mark of UTF-16"),
        (b"\xfe\xff\0a", "is not UTF-8: the mark of UTF-16"),
        ("ab".encode("utf-32"), "is not UTF-8: the mark of UTF-16"),
        (b"\0\0\xfe\xff\0\0\0a", "is not UTF-8: the mark of UTF-32"),
        (("a" * 20).encode("utf-16-le"), "20 of its first 40 bytes are 0, as in UTF"),
        (b"\0" * 4096, "1024 of its first 1024 bytes are 0"),
        (gzip.compress(b"abc", mtime=0), "is not UTF-8: the mark of gzip"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "is a pointer of Git LFS",
        ),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_is_no_text_is_named(tmp_path, name, content, why):
    with pytest.raises(ValueError, match=rf"{name} {why}|{name} has.*|{name}.*{why}"):
        texts(write(tmp_path / name, content))


def test_nul_bytes_are_characters(tmp_path):
    assert texts(write(tmp_path / "a.txt", "a\0b" * 20)) == ["a\0b" * 20]


def test_folders_behind_links_are_read_once(tmp_path):
    write(tmp_path / "big/large.txt", "large")
    write(tmp_path / "texts/small.txt", "small")
    os.symlink("../big", tmp_path / "texts/more")
    assert texts(tmp_path / "texts") == ["large", "small"]
    assert texts(tmp_path / "texts/**/*.txt") == ["large", "small"]
    os.symlink("../big", tmp_path / "texts/again")  # the same files once more
    os.symlink("small.txt", tmp_path / "texts/alias.txt")
    for up in ("up", "up2", "up3"):  # 3**40 paths for who goes in circles
        os.symlink("..", tmp_path / "texts" / up)
    assert sorted(texts(tmp_path / "texts")) == ["large", "small"]
    assert sorted(texts(tmp_path / "texts/**/*.txt")) == ["large", "small"]
    assert sorted(texts(tmp_path / "**/*l.txt")) == ["small"]
    with pytest.raises(ValueError, match=r"small\.txt is given 2 times"):
        documents([tmp_path / "texts", tmp_path / "texts/alias.txt"])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**", ["a.txt", "d/b.txt", "d/e/c.txt"]),
        ("**/*.txt", ["a.txt", "d/b.txt", "d/e/c.txt"]),
        ("*/**/*.txt", ["d/b.txt", "d/e/c.txt"]),
        ("d/**/e/*", ["d/e/c.txt"]),
        ("**/.h/*", [".h/x.txt"]),
        ("**/[bc].txt", ["d/b.txt", "d/e/c.txt"]),
        ("*.txt", ["a.txt"]),
    ],
)
def test_patterns_match_as_globs_do(tmp_path, monkeypatch, pattern, expected):
    for name in ("a.txt", "d/b.txt", "d/e/c.txt", ".h/x.txt", "d/.y.txt"):
        write(tmp_path / name, "x")
    monkeypatch.chdir(tmp_path)
    assert [path.as_posix() for path in text_files(pattern)] == expected
    found = [str(path.relative_to(tmp_path)) for path in text_files(tmp_path / pattern)]
    assert found == expected


def test_endings_in_capitals(tmp_path):
    for name in ("a.jsonl.gz", "A.JSONL.GZ", "b.jsonl.GZ"):
        path = write(tmp_path / name, gzip.compress(ROW.encode()))
        assert texts(path) == ["caf\u00e9\u2028x"]
    assert texts(write(tmp_path / "A.JSONL", ROW)) == ["caf\u00e9\u2028x"]
    assert texts(write(tmp_path / "d/A.TXT", "x").parent) == ["x"]


def test_names_that_are_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/latin"
    os.mkdir(folder)
    with open(folder + b"/caf\xe9.txt", "w") as file:
        file.write("text " * 9)
    index = prepare(tmp_path / "latin", tmp_path / "out", ByteTokenizer())
    assert sum(part.bytes for part in index.splits.values()) == 45
    assert len(texts(folder.decode(errors="surrogateescape") + "/*.txt")) == 1


def test_compressed_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "UNPACKED", (1000, 10))
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b"\n" * 100_000))
    with pytest.raises(ValueError, match=r"line \d+: \d+ bytes unpack to more than"):
        texts(path)
    monkeypatch.setattr(stored, "LINE_BYTES", 99)
    path = write(tmp_path / "b.jsonl.gz", gzip.compress(b" " * 100_000))
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: line 1: longer than 99"):
        texts(path)
    path = write(tmp_path / "c.jsonl.gz", gzip.compress(ROW.encode()) + b"garbage")
    with pytest.raises(ValueError, match=r"line 2: can't be read: Not a gzipped file"):
        texts(path)


@pytest.mark.parametrize("name", ["fifo", "fifo.jsonl"])
def test_pipes_are_stored_where_text_is_read_once(tmp_path, name):
    """As a shell's <(...) is; elsewhere they are refused, by name."""
    fifo = tmp_path / name
    os.mkfifo(fifo)
    content = ROW if name.endswith("jsonl") else "caf\u00e9\u2028x"
    with pytest.raises(ValueError, match=f"{name} is a FIFO, not a regular file"):
        documents(fifo)
    with pytest.raises(ValueError, match="is a FIFO"):
        read_examples(fifo, ByteTokenizer(), block_size=9)
    for _ in range(2):
        writer = threading.Thread(target=fifo.write_text, args=(content,))
        writer.start()
        with streams_stored(str(fifo)) as path:
            writer.join()
            assert texts(path) == ["caf\u00e9\u2028x"]
    writer = threading.Thread(target=fifo.write_text, args=(content * 2,))
    writer.start()
    index = prepare(fifo, tmp_path / "out", ByteTokenizer(), splits=(1, 0, 0))
    writer.join()
    assert index.splits["train"].bytes == 18
    assert not list((tmp_path / "out").glob("stdin*"))


def test_what_holds_no_file_of_text_is_refused(tmp_path):
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match=f"{path} is a character device"):
            documents(path)
    write(tmp_path / "a.txt", "x")
    os.mkfifo(tmp_path / "b.txt")
    os.symlink("nowhere", tmp_path / "c.txt")
    assert texts(tmp_path) == ["x"]


def test_deep_rows_and_lone_surrogates(tmp_path):
    deep = json.loads('"' + "[" * 9 + '"') * 20_000
    path = write(tmp_path / "a.jsonl", f'{{"prompt": {deep}\n')
    for read in (texts, lambda p: read_examples(p, ByteTokenizer(), block_size=9)):
        with pytest.raises(ValueError, match=r"a\.jsonl: line 1: not JSON .*too deep"):
            read(path)
    path = write(path, '{"prompt": "a", "completion": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"line 1: '\\ud800' is no character"):
        read_examples(path, ByteTokenizer(), block_size=9)


def test_a_closed_standard_input_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # python program <&-
    with pytest.raises(ValueError, match="standard input, -, is closed"):
        prepare("-", tmp_path / "out", ByteTokenizer())
    assert not list(tmp_path.iterdir())
