"""Whatever stands in a file: it is read, or refused in one line, in bounded time."""

import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import default
from gpt2_jax.data import foreign
from gpt2_jax.data.prepare import load_index, prepare
from gpt2_jax.data.sft import read_examples
from gpt2_jax.data.shards import read_index
from gpt2_jax.data.sources import documents
from gpt2_jax.evaluation.tasks import TASKS, Options, Reader
from gpt2_jax.tokenizers.plain import ByteTokenizer
from gpt2_jax.training.config import TrainConfig

BYTES = ByteTokenizer()
CASES = settings(max_examples=1000, derandomize=True, database=None, deadline=None)
# Files are made by a generator of Python's from one number that hypothesis draws: as
# many draws as a file takes would take ten times as long as to read it.
SEEDS = st.integers(0, 2**64 - 1).map(random.Random)
PLAIN = (
    *(None, True, 0, -1, 1.5, 2**70, float("nan"), "", "a b XXXXX", "\ud800", " \n"),
    *("x" * 5000, "/dev/zero", "../x", "a\0b", -(2**70)),
)
NAMES = (
    *("text", "prompt", "completion", "messages", "role", "content", "ctx", "endings"),
    *("label", "sentences", "question", "answer", "options", "other"),
)
GOOD = (
    {"text": "one two"},
    {"prompt": "a", "completion": "b"},
    {"messages": [{"role": "assistant", "content": "b"}]},
    {"ctx": "a b", "endings": ["c", "d"], "label": 1},
    {"sentences": ["a"], "question": "b XXXXX", "answer": "c", "options": ["c", "d"]},
)
MARKS = (
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"\0", b"\r", b"\n", b"[" * 9999),
    *(b"\xff", b"1" * 5000, b'{"text": NaN}', b"\xe2\x80\xa8", b"version https://git-"),
)


def any_value(rng: random.Random, depth: int = 3) -> Any:
    """What JSON can say, and what it can't."""
    kind = rng.randrange(6) if depth else 0
    if kind < 4:
        return rng.choice(PLAIN)
    values = [any_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return values if kind == 4 else {rng.choice(NAMES): value for value in values}


def any_line(rng: random.Random) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(MARKS)
    if kind == 1:
        return rng.randbytes(rng.randrange(20))
    row = {} if kind == 2 else dict(rng.choice(GOOD))
    for _ in range(rng.randrange(3)):
        row[rng.choice([*row, *NAMES])] = any_value(rng)
    return json.dumps(row).encode()


def any_file(rng: random.Random) -> bytes:
    lines = [any_line(rng) for _ in range(rng.randrange(4))]
    content = rng.choice([b"\n", b"\r\n", b""]).join(lines)
    return gzip.compress(content, 1) if rng.randrange(9) == 0 else content


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory) -> Iterator[Path]:
    """The current one, so that names are short and messages may be measured."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("fuzz")
    os.chdir(folder)
    yield folder
    os.chdir(before)


def read_or_refuse(read: Callable[..., Any], *args: Any, **options: Any) -> bool:
    """Whether `read` took it; anything but one short line of an error fails."""
    message = ""
    try:
        read(*args, **options)
    except (ValueError, OSError) as error:
        message = str(error) or "no message"
    assert "\n" not in message
    assert len(message) <= 300
    return not message


def read_all(name: str) -> list[list[Any]]:
    return [[*source.read()] for source in documents(name)]


@CASES
@given(SEEDS)
def test_rows_and_lines(rng):
    content = any_file(rng)
    for name in ("a.jsonl", "a.txt", "a.jsonl.gz"):
        Path(name).write_bytes(content)
        read_or_refuse(read_all, name)


@CASES
@given(SEEDS)
def test_examples(rng):
    content = any_file(rng)
    Path("sft.jsonl").write_bytes(content)
    for template in ("", "{role}: {content}\n"):
        read_or_refuse(
            read_examples, "sft.jsonl", BYTES, block_size=64, template=template
        )


def run_task(task: Callable[..., Any], name: str) -> None:
    task(documents(name), Reader(BYTES, 64, Options()))


@CASES
@given(SEEDS)
def test_tasks(rng):
    content = any_file(rng)
    for name in ("task.jsonl", "task.txt"):
        Path(name).write_bytes(content)
        for task in TASKS.values():
            read_or_refuse(run_task, task, name)


@pytest.mark.parametrize("task", TASKS)
def test_the_good_rows_are_taken(task):
    """Or the fuzz tests would see no more than the first check of each reader."""
    taken = 0
    for row in GOOD:
        Path("good.jsonl").write_text(json.dumps(row) + "\n")
        taken += read_or_refuse(run_task, TASKS[task], "good.jsonl")
    assert taken == 1


@pytest.fixture(scope="module")
def prepared(folder) -> dict[str, Any]:
    Path("text.txt").write_text("a text " * 20)
    prepare("text.txt", "prepared", BYTES, splits=(0.9, 0.1, 0))
    return json.loads(Path("prepared/index.json").read_text())


PATHS = (
    *((), ("version",), ("dtype",), ("vocab_size",), ("eot_id",), ("splits",)),
    *(("tokenizer_kind",), ("tokenizer_hash",), ("source",), ("splits", "train")),
    *(("splits", "train", x) for x in ("documents", "bytes", "tokens", "unknown")),
    *(("splits", "train", "shards"), ("splits", "train", "shards", 0)),
    *(("splits", "train", "shards", 0, x) for x in ("name", "tokens", "offset")),
    *(("splits", "other"), ("extra",)),
)


def replaced(tree: Any, path: tuple[Any, ...], value: object) -> Any:
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    old = copy[path[0]] if isinstance(copy, list) else copy.get(path[0], {})
    copy[path[0]] = replaced(old, path[1:], value)
    return copy


@CASES
@given(rng=SEEDS)
def test_index(prepared, rng):
    path, value = rng.choice(PATHS), any_value(rng)
    index = replaced(prepared, path, value)
    Path("prepared/index.json").write_text(json.dumps(index))
    if read_or_refuse(lambda: read_index(Path("prepared"))):
        # What may be anything: counts that nothing depends on, and what was asked for.
        assert index == prepared or path[0] in ("source", "eot_id", "splits")


@CASES
@given(SEEDS)
def test_shards_of_others(rng):
    magic, version = rng.choice([20240520, 20240801, 0, -1]), rng.choice([1, 7, 0, 9])
    tokens, room = rng.choice([0, 1, 5, -1, 2**31 - 1]), rng.choice([0, 3, 256, 256])
    ids = rng.choice([rng.randbytes(rng.randrange(12)), b"\1\0" * 5, b"\1\0\0\0" * 5])
    name = rng.choice(["train.bin", "fineweb_train_000001.bin", "val.bin"])
    folder = Path("others")
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    header = np.zeros(room, "<i4")
    header[:3] = np.array([magic, version, tokens], "<i4")[: len(header)]
    (folder / name).write_bytes(header.tobytes() + ids)
    read_or_refuse(lambda: foreign.read_index(folder, BYTES))
    read_or_refuse(lambda: load_index(folder))


DEFAULT = default.get_config().to_dict()
KEYS = [(name,) for name in DEFAULT] + [
    (name, key) for name in DEFAULT if isinstance(DEFAULT[name], dict)
    for key in DEFAULT[name]
]  # fmt: skip
VALUES = (
    *(2**31, 2**32, 2**63, 10**400, 1e30, 1e308, float("inf"), "~no-one", object()),
    *(((1, 2),), (("a", 1e308), ("b", 1e308)), (0.5, 0.5, float("nan")), ("a{99999}",)),
)


@CASES
@given(SEEDS)
def test_configs(rng):
    config: Any = DEFAULT
    for _ in range(rng.randrange(3)):
        path = rng.choice([*KEYS, ("new",), ()])
        value = rng.choice([any_value(rng), rng.choice(VALUES)])
        parent = config.get(path[0]) if path and isinstance(config, dict) else None
        if len(path) < 2 or isinstance(parent, dict):
            config = replaced(config if isinstance(config, dict) else {}, path, value)
    read_or_refuse(lambda: TrainConfig.from_dict(config))
