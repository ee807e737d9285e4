"""Files of many documents, wherever they lie: the same documents in every form."""

import gzip
import io
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from gpt2_jax.data import encode, sources, stored
from gpt2_jax.data import prepare as module
from gpt2_jax.data.prepare import load_index, prepare
from gpt2_jax.data.sources import documents, split_paths
from gpt2_jax.data.stored import Cursor
from gpt2_jax.tokenizers.files import save_tokenizer
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"Document {n}: " + "é🙂\n" * (n % 7) for n in range(300)]


def json_lines(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: t}) + "\n" for t in texts).encode()


def write_jsonl(path: Path) -> None:
    path.write_bytes(json_lines(TEXTS))


def write_gz(path: Path) -> None:
    path.write_bytes(gzip.compress(json_lines(TEXTS)))


def write_zst(path: Path) -> None:
    zstd = pytest.importorskip("backports.zstd")
    data = json_lines(TEXTS)  # in two frames, as parallel writers leave them
    path.write_bytes(zstd.compress(data[:999]) + zstd.compress(data[999:]))


def write_parquet(path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": TEXTS}), path, row_group_size=70)


FORMS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": write_jsonl,
    "a.jsonl.gz": write_gz,
    "a.jsonl.zst": write_zst,
    "a.parquet": write_parquet,
}


def read(folder: Path) -> dict[str, list[str]]:
    """The documents of each split."""
    index = load_index(folder)
    out = {}
    for name, part in index.splits.items():
        ids = [
            i
            for s in part.shards
            for i in np.fromfile(folder / s.name, index.dtype).tolist()
        ]
        text = ByteTokenizer().decode(ids)
        out[name] = text.split("<|endoftext|>")[:-1]
    return out


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_documents(tmp_path, name):
    FORMS[name](tmp_path / name)
    (source,) = documents(tmp_path / name)
    found = list(source.read())
    assert [text for text, _ in found] == TEXTS
    assert list(source.texts()) == TEXTS
    done = [place.offset for _, place in found]
    assert done == sorted(done)
    assert done[-1] == source.size
    for n in (0, 69, 70, 150, 299):  # from any place on
        assert [text for text, _ in source.read(found[n][1])] == TEXTS[n + 1 :]
    index = prepare(
        tmp_path / name, tmp_path / "out", ByteTokenizer(), shard_tokens=999
    )
    parts = read(tmp_path / "out")
    assert sorted(text for part in parts.values() for text in part) == sorted(TEXTS)
    assert len({name for name in parts if parts[name]}) == 3
    assert sum(s.documents for s in index.splits.values()) == 300
    assert sum(s.bytes for s in index.splits.values()) == len("".join(TEXTS).encode())
    assert parts["train"] == [text for text in TEXTS if text in set(parts["train"])]


def test_splits_are_by_hash_of_the_text(tmp_path):
    """Fractions within four deviations; a text that comes twice is in one split."""
    texts = [f"text {n % 3000}" for n in range(4000)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    seen = []
    for seed in (0, 1):
        splits = (0.8, 0.2, 0.0)
        out = tmp_path / f"out{seed}"
        prepare(tmp_path / "a.jsonl", out, ByteTokenizer(), splits=splits, seed=seed)
        parts = read(out)
        seen.append(parts["validation"])
        assert list(parts) == ["train", "validation"]
        assert set(parts["train"]).isdisjoint(parts["validation"])
        share = len(set(parts["validation"])) / 3000
        assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 3000) ** 0.5
    assert seen[0] != seen[1]


def test_long_documents_are_cut_in_blocks_and_stay_in_one_split(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 50)
    monkeypatch.setattr(sources.Document.read, "__defaults__", (0, None, 50))
    monkeypatch.setattr(encode, "BATCH_BYTES", 20)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    texts = [f"{n} " * 100 for n in range(50)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    splits = (0.7, 0.3, 0)
    prepare(tmp_path / "a.jsonl", tmp_path / "out", ByteTokenizer(), splits=splits)
    parts = read(tmp_path / "out")
    assert sorted(parts["train"] + parts["validation"]) == sorted(texts)


def test_several_sources_and_patterns(tmp_path):
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.jsonl").write_bytes(json_lines(["one", "", "two"]))
    (tmp_path / "in/sub/b.txt").write_text("three")
    (tmp_path / "in/c.bin").write_text("no text")
    names = [source.name for source in documents(tmp_path / "in")]
    assert names == [f"{tmp_path}/in/a.jsonl", f"{tmp_path}/in/sub/b.txt"]
    assert [s.name for s in documents(f"{tmp_path}/in/**/*.*")][1:] == [
        f"{tmp_path}/in/c.bin",
        f"{tmp_path}/in/sub/b.txt",
    ]
    flags = [f"{tmp_path}/in/a.jsonl,{tmp_path}/in/sub"]
    assert [s.name for s in documents(split_paths(flags))] == names
    (tmp_path / "a,b.txt").touch()
    assert split_paths([f"{tmp_path}/a,b.txt"]) == [f"{tmp_path}/a,b.txt"]
    prepare(split_paths(flags), tmp_path / "out", ByteTokenizer(), splits=(1, 0, 0))
    assert read(tmp_path / "out") == {"train": ["one", "two", "three"]}
    assert load_index(tmp_path / "out").splits["train"].documents == 3


def test_urls(tmp_path):
    memory = fsspec.filesystem("memory")
    for name, content in {
        "/c/a.jsonl": json_lines(["one", "two"]),
        "/c/sub/b.txt": "drei é".encode(),
        "/c/.hidden.txt": b"no",
    }.items():
        memory.pipe(name, content)
    names = [source.name for source in documents("memory://c")]
    assert names == ["memory:///c/a.jsonl", "memory:///c/sub/b.txt"]
    assert len(documents("memory://c/**/*.txt")) == 1
    (text,) = documents("memory://c/sub/b.txt")
    assert list(text.texts()) == ["drei é"]
    prepare("memory://c", tmp_path / "out", ByteTokenizer(), splits=(1, 0, 0))
    assert read(tmp_path / "out") == {"train": ["one", "two", "drei é"]}
    local = documents(f"file://{tmp_path}/out/index.json")
    assert b"".join(t.encode() for t in local[0].texts()).startswith(b"{")


def test_standard_input(tmp_path, monkeypatch):
    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    give("a line é\n".encode() * 100)
    prepare("-", tmp_path / "text", ByteTokenizer(), splits=(0.9, 0.1, 0))
    assert read(tmp_path / "text")["validation"] == ["a line é\n" * 10]
    give(json_lines(["one", "two"]))
    prepare("-", tmp_path / "l", "char", splits=(1, 0, 0), form="jsonl")
    assert load_index(tmp_path / "l").splits["train"].documents == 2
    # what was killed goes on when the same text comes again, and not with another
    work = tmp_path / "again.partial"
    for content, kept in (("x" * 99, False), ("x" * 99, True), ("y" * 99, False)):
        give(content.encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module.PartialFolder, "publish", lambda *_: 1 / 0)
            made = work / "tokenizer/bytes.json"
            before = made.exists() and made.stat().st_mtime_ns
            with pytest.raises(ZeroDivisionError):
                prepare("-", tmp_path / "again", ByteTokenizer(), splits=(1, 0, 0))
            assert kept == (before == made.stat().st_mtime_ns)


def test_hugging_face_data_sets_are_streamed(tmp_path):
    """From a folder; the hub itself is not reached here."""
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_bytes(json_lines(TEXTS, "body"))
    (source,) = documents(f"hf:{tmp_path}/set", field="body")
    found = list(source.read())
    assert [text for text, _ in found] == TEXTS
    assert [t for t, _ in source.read(Cursor(0, 200))] == TEXTS[200:]
    prepare(f"hf:{tmp_path}/set", tmp_path / "out", ByteTokenizer(), field="body")
    assert sum(map(len, read(tmp_path / "out").values())) == 300


class Streamed(list):
    def skip(self, n: int) -> list:
        return self[n:]


def stub_datasets(monkeypatch, tmp_path) -> list:
    calls = []

    def load_dataset(path, config, **options):
        calls.append((path, config, options))
        return Streamed({"text": text} for text in TEXTS)

    stub = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return calls


def test_names_of_data_sets(tmp_path, monkeypatch):
    import huggingface_hub

    calls = stub_datasets(monkeypatch, tmp_path)

    class Api:
        def dataset_info(self, name):
            return types.SimpleNamespace(sha=f"sha of {name}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    (source,) = documents("hf:org/name:en:validation")
    assert source.stamp == "sha of org/name"
    assert list(source.texts()) == TEXTS
    options = {"split": "validation", "streaming": True, "revision": "sha of org/name"}
    assert calls == 2 * [("org/name", "en", options)]
    documents("hf:org/name")
    assert calls[-1][:2] == ("org/name", None)
    assert calls[-1][2]["split"] == "train"


def test_unknown_tokens_are_counted(tmp_path):
    from gpt2_jax.tokenizers.train import train_sentencepiece

    tokenizer = train_sentencepiece(
        ["abc abc\n"] * 50, 6, model_type="char", byte_fallback=False
    )
    (tmp_path / "a.txt").write_text("abcxxabc")
    index = prepare(tmp_path / "a.txt", tmp_path / "out", tokenizer, splits=(1, 0, 0))
    assert index.splits["train"].unknown == 1  # a run of what it doesn't know
    assert index.splits["train"].tokens == 8


# --- Bad input


def bad_jsonl(*lines: bytes | str) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        content = b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines)
        (folder / "a.jsonl").write_bytes(content)
        return [f"{folder}/a.jsonl"]

    return write


def file(name: str, content: bytes) -> Callable[[Path], list[str]]:
    def write(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return [f"{folder}/{name}"]

    return write


def given(*paths: str) -> Callable[[Path], list[str]]:
    return lambda folder: [path.format(folder) for path in paths]


GOOD = '{"text": "good"}'
GZIP = gzip.compress(json_lines(TEXTS))


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (bad_jsonl(GOOD, "{"), {}, r"a\.jsonl: line 2: not JSON"),
        (bad_jsonl("", "[1]"), {}, r"line 2: \[1\] is no JSON object"),
        (bad_jsonl('{"body": "x", "id": 1}'), {}, "no field 'text', only body, id"),
        (bad_jsonl("{}"), {}, "line 1: no field 'text', only nothing"),
        (bad_jsonl('{"text": 3}'), {}, "line 1: 'text' is 3"),
        (bad_jsonl('{"text": ["x"]}'), {}, r"line 1: 'text' is \['x'\]"),
        (bad_jsonl('{"text": "\\ud800"}'), {}, r"line 1: '\\ud800' is no character"),
        (bad_jsonl(GOOD, b'{"text": "\xff"}'), {}, "line 2: not UTF-8"),
        (bad_jsonl("[" * 100_000), {}, "line 1: not JSON"),
        (bad_jsonl('{"text": "' + "x" * 99 + '"}'), {}, "line 1: longer than 50 bytes"),
        (bad_jsonl('{"text": ""}', '{"text": null}'), {}, "train split, .* is empty"),
        (bad_jsonl(GOOD), {"field": ""}, "field='' names no field"),
        (bad_jsonl(GOOD), {"splits": (0, 1, 0)}, None),
        (
            bad_jsonl(GOOD),
            {"splits": (0.5, 0.5, 0)},
            "split, 0.5 of the text, is empty",
        ),
        (bad_jsonl(GOOD), {"form": "csv"}, "format='csv' is not one of auto, text"),
        (
            file("a.jsonl.gz", GZIP[:300]),
            {},
            r"a\.jsonl\.gz: line \d+: can't be read: C",
        ),
        (file("a.jsonl.gz", b"plain"), {}, "line 1: can't be read: Not a gzipped"),
        (file("a.txt", b"abc\n" * 50 + b"\xff"), {}, "a.txt is not UTF-8: .* byte 200"),
        (file("a.txt", b""), {}, "every file is empty"),
        (
            file("a.txt", "é".encode() * 99),
            {"tokenizer": "char_table"},
            "a.txt: character 'é'",
        ),
        (given("{0}/none.txt"), {}, "no such file or folder: .*none.txt"),
        (given("{0}/*.txt"), {}, r"no file matches .*\*\.txt"),
        (given("{0}"), {}, "no text file in the folder"),
        (given("/dev/null"), {}, "is a character device, not a regular file"),
        (given(""), {}, "a path is empty"),
        (given("hf:"), {}, "'hf:' names no data set"),
        (given("nope://x/y"), {}, "nope://x/y can't be read: Protocol not known: nope"),
        (given("memory://none/x"), {}, "no such file or folder: memory://none/x"),
        (given("-", "-"), {}, "standard input, -, is given more than once"),
        (bad_jsonl(GOOD), {"tokenizer": "word"}, "no tokenizer: word does not exist"),
        (
            bad_jsonl(GOOD),
            {"seed": 1 << 32},
            r"seed=4294967296 must be in \[0, 429",
        ),
        (bad_jsonl(GOOD), {"out": "gs://b/x"}, "is a URL, not a path of this machine"),
        (bad_jsonl(GOOD), {"dtype": "uint16"}, "dtype='uint16' is of token shards"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    tmp_path, monkeypatch, write, options, message
):
    if "longer" in (message or ""):
        monkeypatch.setattr(stored, "LINE_BYTES", 50)
    (tmp_path / "in").mkdir()
    options = {"tokenizer": ByteTokenizer(), "out": tmp_path / "out", **options}
    if options["tokenizer"] == "char_table":
        options["tokenizer"] = CharTokenizer("abc")
    paths = write(tmp_path / "in")
    if message is None:
        prepare(paths, **options)
        return
    with pytest.raises((ValueError, OSError), match=message) as caught:
        prepare(paths, **options)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_file_that_is_given_twice(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt is given 2 times"):
        documents([str(tmp_path / "a.txt"), str(tmp_path)])


def test_bad_zstandard_and_parquet(tmp_path):
    zstd = pytest.importorskip("backports.zstd")
    packed = zstd.compress(json_lines(TEXTS))
    (tmp_path / "a.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(
        ValueError, match=r"a\.jsonl\.zst: line \d+: can't be read: Comp"
    ):
        list(documents(tmp_path / "a.jsonl.zst")[0].texts())
    (tmp_path / "b.jsonl.zst").write_bytes(b"no zstandard")
    with pytest.raises(ValueError, match="line 1: can't be read"):
        list(documents(tmp_path / "b.jsonl.zst")[0].texts())
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet: damaged"):
        list(documents(tmp_path / "a.parquet")[0].texts())
    parquet.write_table(
        pa.table({"id": [1, 2], "b": ["x", "y"]}), tmp_path / "b.parquet"
    )
    with pytest.raises(ValueError, match="row 1: no field 'text', only id, b"):
        list(documents(tmp_path / "b.parquet")[0].texts())
    with pytest.raises(ValueError, match="row 1: 'id' is 1"):
        list(documents(tmp_path / "b.parquet", field="id")[0].texts())


@pytest.mark.parametrize(
    ("package", "path", "message"),
    [
        ("pyarrow", "a.parquet", r"pyarrow: pip install 'gpt2-jax\[parquet\]'"),
        ("backports.zstd", "a.jsonl.zst", r"backports\.zstd: pip install .*\[zstd\]"),
        ("datasets", "hf:x", r"datasets: pip install 'gpt2-jax\[datasets\]'"),
    ],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, package, path, message):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "compression", None)
    (tmp_path / path).write_bytes(b"x")
    paths = path if path.startswith("hf:") else tmp_path / path
    with pytest.raises(ValueError, match=message):
        list(documents(paths)[0].texts())


def test_another_request_does_not_destroy_unfinished_work(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.PartialFolder, "publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(tmp_path / "a.jsonl", tmp_path / "out", ByteTokenizer())
    kept = sorted(path.name for path in (tmp_path / "out.partial").iterdir())
    with pytest.raises(FileExistsError, match=r"unfinished .* seed=0, this one has 1"):
        prepare(tmp_path / "a.jsonl", tmp_path / "out", ByteTokenizer(), seed=1)
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == kept
    with (tmp_path / "out.partial/.lock").open("wb") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr("gpt2_jax.runtime.lock.PATIENCE", 0)
        with pytest.raises(BlockingIOError, match="another process is preparing"):
            prepare(tmp_path / "a.jsonl", tmp_path / "out", ByteTokenizer())
    # nobody can finish what was made of a text that has changed
    (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS[:200]))
    prepare(tmp_path / "a.jsonl", tmp_path / "out", ByteTokenizer())
    assert sum(map(len, read(tmp_path / "out").values())) == 200


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("prepare_data.py", ["--splits=a,b,c"], "--splits=['a', 'b', 'c'] are not num"),
        ("prepare_data.py", ["--format=csv"], "--format=csv"),
        ("prepare_data.py", ["--shard_tokens=0"], "shard_tokens=0 must be >= 1"),
        ("prepare_data.py", ["--path={0}/none"], "no such file or folder"),
        ("train_tokenizer.py", ["--vocab_size=9"], "vocab_size=9 is too small"),
        ("train_tokenizer.py", ["--vocab_size=300", "--model=word"], "--model=word"),
    ],
)
def test_scripts_say_so_in_one_line(tmp_path, script, flags, message):
    save_tokenizer(ByteTokenizer(), tmp_path / "t")
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    flags = [flag.format(tmp_path) for flag in flags]
    args = [f"--path={tmp_path}/a.txt", f"--out={tmp_path}/out", *flags]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "t"]
