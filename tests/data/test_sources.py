"""Which text is read, in which order and in which blocks."""

import hashlib
import random
import sysconfig
from pathlib import Path

import pytest

from gpt2_jax.data import corpus
from gpt2_jax.data.corpus import default_corpus
from gpt2_jax.data.sources import Document, documents, text_files


def test_default_corpus_is_text_of_the_right_size_and_always_the_same():
    texts = list(default_corpus())
    size = sum(len(text.encode()) for text in texts)
    assert 1_400_000 < size < 2_000_000
    assert len(texts) > 150
    assert all(texts)
    assert max(len(text) for text in texts) < 0.2 * size
    corpus.default_documents.cache_clear()
    again = hashlib.sha256("\0".join(default_corpus()).encode()).hexdigest()
    assert again == hashlib.sha256("\0".join(texts).encode()).hexdigest()
    assert sum(text.count("The ") for text in texts) > 500
    assert "".join(d.text.decode() for d in documents()) == "".join(texts)


def test_default_corpus_without_sources_is_the_topics(tmp_path, monkeypatch):
    from pydoc_data.topics import topics

    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    uncached = corpus.default_documents.__wrapped__
    assert [text.decode() for _, text in uncached()] == [
        topics[name] for name in sorted(topics)
    ]


def test_docstrings_come_from_source_files_unrun(tmp_path: Path, monkeypatch):
    def write(name: str, text: str | bytes) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        content = text.encode() if isinstance(text, str) else text
        (tmp_path / name).write_bytes(content)

    write("b.py", '"""Module b."""\nraise SystemExit\n')
    write("pkg/z.py", "def f():\n    '''Function f.\n\n    More.'''\n\n'no'\n")
    write(
        "a.py", 'class C:\n    """Class C."""\n    async def g(self):\n        "g \\d."'
    )
    write("latin.py", "# -*- coding: latin-1 -*-\n'''caf\xe9'''\n".encode("latin-1"))
    write("surrogate.py", '"""\\ud800"""')
    write("broken.py", "def (\n")
    write("silent.py", "x = 1\n")
    write("test/t.py", '"""Left out."""')
    write("site-packages/s.py", '"""Left out."""')
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    found = dict(corpus.default_documents.__wrapped__())
    modules = {k: v.decode() for k, v in found.items() if k.startswith("module ")}
    assert modules == {
        "module a": "Class C.\n\ng \\d.\n",
        "module b": "Module b.\n",
        "module latin": "café\n",
        "module surrogate": "?\n",
        "module z": "Function f.\n\nMore.\n",
    }
    assert list(modules)[-1] == "module z"  # packages follow the modules at the top


def test_text_files_of_a_folder(tmp_path: Path):
    names = [
        "b.txt",
        "a.MD",
        "sub/c.rst",
        "sub.txt/d.text",
        "x.py",
        ".h.txt",
        ".d/e.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in text_files(tmp_path)]
    assert found == ["a.MD", "b.txt", "sub.txt/d.text", "sub/c.rst"]
    assert text_files(str(tmp_path / "x.py")) == [tmp_path / "x.py"]  # given directly


def test_missing_and_empty_sources_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*nowhere"):
        documents(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"no text file in .* \*\.txt, \*\.text"
    ):
        documents(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"no text in .*: every file is empty"):
        documents(tmp_path)
    with pytest.raises(ValueError, match="/dev/null is a character device"):
        documents("/dev/null")
    (tmp_path / "full.txt").write_text("é")
    assert [(d.name, d.size) for d in documents(tmp_path)] == [
        (str(tmp_path / "full.txt"), 2)
    ]


def document(text: str | bytes) -> Document:
    content = text.encode() if isinstance(text, str) else text
    return Document("d", len(content), text=content)


def test_blocks_end_at_lines_where_there_are_lines():
    text = "one\ntwo\nthree four five\n\nsix"
    blocks = [block for block, _ in document(text).read(block_bytes=9)]
    assert blocks == ["one\ntwo\n", "three fou", "r five\n\n", "six"]


@pytest.mark.parametrize("block_bytes", [4, 5, 6, 7, 13, 64, 10_000])
def test_blocks_never_cut_a_character(block_bytes: int, tmp_path: Path):
    rng = random.Random(block_bytes)
    text = "".join(rng.choices("aé中\U0001f600 \r\n\u0301", k=700))
    whole = document(text)
    file = tmp_path / "f.txt"
    file.write_bytes(whole.text)
    for source in (whole, documents(file)[0]):
        blocks = [block for block, _ in source.read(block_bytes=block_bytes)]
        assert "".join(blocks) == text
        assert max(len(block.encode()) for block in blocks) <= block_bytes
    starts = {len(text[:n].encode()) for n in range(len(text) + 1)}
    for cut in range(whole.size + 1):
        at = whole.character_start(cut)
        assert at in starts
        assert cut - 3 <= at <= cut
        if cut % 50 == 0:
            left = "".join(t for t, _ in whole.read(0, at, block_bytes))
            right = "".join(t for t, _ in whole.read(at, None, block_bytes))
            assert left + right == text


@pytest.mark.parametrize(
    ("content", "at"),
    [
        (b"abc\xff def", 3),
        (b"ab\n" * 5 + b"\x80", 15),
        ("é".encode() * 8 + b"\xc3", 16),
        (b"a\xed\xa0\x80", 1),
        (b"\xff\xfea\0b\0", 0),
        (b"\x80" * 20, 0),
    ],
)
@pytest.mark.parametrize("block_bytes", [6, 1000])
def test_other_encodings_are_refused(content: bytes, at: int, block_bytes: int):
    with pytest.raises(ValueError, match=rf"^d is not UTF-8: .* at byte {at}$"):
        list(document(content).read(block_bytes=block_bytes))


def test_a_file_that_shrinks_is_refused(tmp_path: Path):
    file = tmp_path / "f.txt"
    file.write_text("abcdef")
    (source,) = documents(file)
    file.write_text("abc")
    with pytest.raises(
        ValueError, match=r"became shorter .* 6 bytes expected, 3 found"
    ):
        list(source.texts())
