"""Preparations that are killed end in the same bytes."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2_jax.data import encode, sources
from gpt2_jax.data.prepare import load_index, prepare
from gpt2_jax.tokenizers.plain import ByteTokenizer

# Commits after each shard, and a slow tokenizer: there is time to be killed in.
PROGRAM = """
import sys, time
from gpt2_jax.data import encode, prepare as module
from gpt2_jax.tokenizers.plain import ByteTokenizer

class Slow(ByteTokenizer):
    def encode(self, text):
        time.sleep(0.02)
        return super().encode(text)

encode.BATCH_BYTES = 4000
module.sources.Document.read.__defaults__ = (0, None, 4000)
paths, out, seconds = sys.argv[1].split(","), sys.argv[2], float(sys.argv[3])
module.COMMIT_SECONDS = seconds
print("going", flush=True)
module.prepare(paths, out, Slow(), splits=(0.8, 0.1, 0.1), seed=3, shard_tokens=20_000,
               threads=2)
print("done", flush=True)
"""


def write_corpus(folder: Path) -> list[Path]:
    """A text and two files of records, one of them packed: 0.6 MB in all."""
    import gzip

    folder.mkdir()
    rng = random.Random(0)
    words = ["eins", "zwei", "drei", "四", "пять", "\n", "seis", "🙂"]

    def text(n: int) -> str:
        return " ".join(rng.choices(words, k=n))

    (folder / "a.txt").write_text(text(50_000))
    lines = "".join(json.dumps({"text": text(60)}) + "\n" for _ in range(600))
    (folder / "b.jsonl").write_text(lines)
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": text(90)}) + "\n" for _ in range(400)))
    return [folder / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz")]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def start(paths: list[Path], out: Path, seconds: float) -> subprocess.Popen[bytes]:
    args = [",".join(map(str, paths)), str(out), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *args], stdout=subprocess.PIPE
    )


def kill_until_done(
    paths: list[Path], out: Path, kills: int, seed: int, seconds: float = 0.05
) -> int:
    """How many of the kills hit work that was under way."""
    rng = random.Random(seed)
    hits = 0
    for n in range(kills + 1):
        with start(paths, out, seconds) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"going\n"
            if n < kills:
                time.sleep(rng.uniform(0, 0.25))
                process.send_signal(signal.SIGKILL)
                hits += process.wait() == -signal.SIGKILL
                assert not out.exists() or (out / "index.json").exists()
            else:
                assert process.stdout.read() == b"done\n"
    return hits


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sources.Document.read, "__defaults__", (0, None, 4000))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[Path]:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "in")


def expected(paths: list[Path], folder: Path, threads: int = 1) -> dict[str, bytes]:
    prepare(
        [str(path) for path in paths],
        folder,
        ByteTokenizer(),
        splits=(0.8, 0.1, 0.1),
        seed=3,
        shard_tokens=20_000,
        threads=threads,
    )
    return contents(folder)


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_twice(corpus, tmp_path, count):
    """One text is cut; several files, of many documents, are spread by hash."""
    paths = corpus[:count]
    whole = expected(paths, tmp_path / "whole")
    hits = kill_until_done(paths, tmp_path / "out", 2, seed=count)
    assert hits >= 1  # a machine that sleeps may let one finish
    assert contents(tmp_path / "out") == whole
    assert expected(paths, tmp_path / "threads", threads=4) == whole
    assert len(load_index(tmp_path / "out").splits["train"].shards) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "threads", "whole"]


@pytest.mark.slow
def test_killed_at_twenty_moments(corpus, tmp_path):
    whole = expected(corpus, tmp_path / "whole")
    hits = 0
    for n in range(20):
        out = tmp_path / f"out{n}"
        hits += kill_until_done(corpus, out, 1 + n % 3, seed=n)
        assert contents(out) == whole
    assert hits >= 20


def test_finished_work_is_not_done_again(corpus, tmp_path):
    """After a failure at a third of the way the rest alone is encoded."""

    class Counting(ByteTokenizer):
        encoded = 0
        limit = 10**9

        def encode(self, text: str) -> list[int]:
            type(self).encoded += len(text.encode())
            if self.encoded > self.limit:
                raise InterruptedError("stopped")
            return super().encode(text)

    total = sum(
        part.bytes
        for part in prepare(corpus, tmp_path / "whole", Counting()).splits.values()
    )
    assert Counting.encoded == total
    Counting.encoded, Counting.limit = 0, total // 3
    options = {"threads": 1, "shard_tokens": 10_000}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "BATCH_BYTES", 4000)
        with pytest.raises(InterruptedError):
            prepare(corpus, tmp_path / "out", Counting(), **options)
        state = json.loads((tmp_path / "out.partial/state.json").read_text())
        kept = sum(counts["bytes"] for counts in state["counts"].values())
        assert kept > total // 4
        Counting.encoded, Counting.limit = 0, 10**9
        prepare(corpus, tmp_path / "out", Counting(), **options)
    assert Counting.encoded == total - kept
