"""Changed files, a thousand for each reader: a line that says why, or a sound model.

Small files that are whole are changed in bytes, cut, repeated or, where they hold JSON,
given another value somewhere. Opening one and reading its numbers raises nothing but a
ValueError or an OSError of one line.
"""

import copy
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from foreign import (
    MODEL_ARGS,
    hf_state,
    nanogpt_state,
    pickled_tree,
    write_bin,
    write_hf,
    write_llmc,
    write_nanogpt,
    write_sharded,
)
from gpt2_jax.formats import hf, nanogpt, open_model
from gpt2_jax.formats.params import check_tensors
from gpt2_jax.tokenizers.gpt2_files import BYTE_OF_CHARACTER
from gpt2_jax.tokenizers.plain import ByteTokenizer
from gpt2_jax.tokenizers.train import train_sentencepiece
from tensorflow_files import write_tf

CASES = 1000


def write_legacy(path: Path) -> Path:
    """A nanoGPT checkpoint in the form before torch 1.6."""
    storages: list[bytes] = []
    tree = {"model": nanogpt_state(), "model_args": MODEL_ARGS}
    pickled = pickled_tree(tree, storages).replace(b"tQ", b"NtQ")  # no view of another
    machine = {"protocol_version": 1001, "little_endian": True}
    head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, machine)]
    keys = pickle.dumps([str(i) for i in range(len(storages))], 2)
    numbers = [struct.pack("<q", len(x) // 4) + x for x in storages]
    path.write_bytes(b"".join([*head, b"\x80\x02" + pickled + b".", keys, *numbers]))
    return path


def write_characters(folder: Path, name: str) -> Path:
    folder.mkdir()
    meta = {"vocab_size": 3, "itos": dict(enumerate("abc")), "stoi": {"a": 0}}
    content = pickle.dumps(meta) if name == "meta.pkl" else json.dumps(meta).encode()
    (folder / name).write_bytes(content)
    return folder


def write_with(folder: Path, files: dict[str, bytes]) -> Path:
    """A model of Hugging Face's with 300 rows and these files of a tokenizer."""
    state = hf_state()
    state["wte.weight"] = np.zeros((300, 8), np.float32)
    write_hf(folder, state, vocab_size=300, eos_token_id=256)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def two_files() -> dict[str, bytes]:
    """vocab.json, merges.txt, and what may be beside them."""
    vocab = {**BYTE_OF_CHARACTER, "th": 256, "the": 257, "<|endoftext|>": 258}
    end = {"content": "<|endoftext|>", "special": True, "lstrip": False}
    return {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": b"#version: 0.2\nt h\nth e\n",
        "added_tokens.json": b'{"<pad>": 259}',
        "special_tokens_map.json": b'{"eos_token": "<|endoftext|>"}',
        "generation_config.json": b'{"eos_token_id": [258, 259]}',
        "tokenizer_config.json": json.dumps(
            {"added_tokens_decoder": {"258": end}, "pad_token": "<pad>"}
        ).encode(),
    }


def one_file() -> dict[str, bytes]:
    files = hf.tokenizer_files(ByteTokenizer(), 8)
    return {name: files[name] for name in ("tokenizer.json", "tokenizer_config.json")}


def sentences() -> dict[str, bytes]:
    model = train_sentencepiece(["the quick brown fox " * 20], 290)
    return {"tokenizer.model": model.files()["tokenizer.model"]}


# How a whole model is written, and the files of it that are changed.
READERS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "safetensors": (write_hf, ("config.json", "model.safetensors")),
    "shards": (write_sharded, ("*.json", "*.safetensors")),
    "pytorch_model.bin": (write_bin, ("*.bin",)),
    "ckpt.pt": (lambda path: write_nanogpt(path.with_suffix(".pt")), ()),
    "legacy": (lambda path: write_legacy(path.with_suffix(".pt")), ()),
    "llm.c": (lambda path: write_llmc(path.with_suffix(".bin")), ()),
    "TensorFlow": (write_tf, ("*",)),
    "meta.pkl": (lambda path: write_characters(path, "meta.pkl"), ("meta.pkl",)),
    "meta.json": (lambda path: write_characters(path, "meta.json"), ("meta.json",)),
    "vocab.json": (lambda path: write_with(path, two_files()), tuple(two_files())),
    "tokenizer.json": (lambda path: write_with(path, one_file()), tuple(one_file())),
    "SentencePiece": (lambda path: write_with(path, sentences()), ("*.model",)),
}


def structure_of(file: Path) -> np.ndarray:
    """Offsets of the bytes that are no numbers of a tensor."""
    data = file.read_bytes()
    is_number = np.zeros(len(data), bool)
    if data.startswith(b"PK"):
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if "/data/" in info.filename:
                    end = info.header_offset + 30 + len(info.filename) + info.file_size
                    is_number[end - info.file_size : end] = True
    elif file.suffix == ".safetensors":
        is_number[8 + int.from_bytes(data[:8], "little") :] = True
    elif file.suffix == ".bin":
        is_number[8 * 4 :] = True  # and the part of llm.c's header that is not used
    return np.flatnonzero(~is_number)


# --- Changes --------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1.5, 1e308, float("nan"), 2**31, 2**63, -(10**30)),
    *("", "x", "\x1b[2J\u202e", "\ud800", "../../etc/passwd", "/etc/passwd", "8" * 500),
    *([], [[]], [1, 2], [None], {}, {"": {}}, {"a": 1}, ["BF16"], [True]),
)


def with_another_value(value: Any, at: int, new: Any) -> Any:
    """A copy in which one of the values, or one of the keys, is another."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        x = stack.pop()
        if isinstance(x, dict | list) and x:
            keys = [*x] if isinstance(x, dict) else [*range(len(x))]
            # of long tables a few entries, or else hardly anything else is changed
            places += [(x, key) for key in (*keys[:5], *keys[-5:])]
            stack += [x[key] for key in (*keys[:5], *keys[-5:])]
    if not places:
        return new
    x, key = places[at % len(places)]
    if isinstance(x, dict) and at % 7 == 0:
        x[str(new)] = x.pop(key)
    else:
        x[key] = new
    return value


def changed(name: str, data: bytes, places: np.ndarray, edits: list[Any]) -> bytes:
    for at, kind, byte in edits:
        new = VALUES[byte % len(VALUES)]
        if kind < 4 and name.endswith(".json"):
            try:
                data = json.dumps(
                    with_another_value(json.loads(data), at, new)
                ).encode()
            except (ValueError, RecursionError):
                data = data[: at % (len(data) + 1)]
            continue
        if kind < 2 and name.endswith(".safetensors") and len(data) > 8:
            end = 8 + int.from_bytes(data[:8], "little")
            try:
                header = json.loads(data[8:end])
            except ValueError:
                continue
            text = json.dumps(with_another_value(header, at, new)).encode()
            data = struct.pack("<Q", len(text)) + text + data[end:]
            continue
        at = int(places[at % len(places)]) if len(places) else 0
        if kind in (0, 1, 2):
            data = data[:at] + bytes([byte]) + data[at + 1 :]
        elif kind in (3, 4):
            data = data[:at] + bytes(
                [data[at] ^ 1 << byte % 8 if at < len(data) else 0]
            )
            data += data[at + 1 :] if kind == 4 else b""
        elif kind == 5:
            data = data[:at] + data[at + byte :]
        else:
            data = data[:at] + data[at : at + byte % 32] * 2 + data[at:]
    return data


def read_all(cfg: Any, tensors: Any, where: object) -> None:
    """In the place of `check_tensors`: the numbers too are what was promised."""
    check_tensors(cfg, tensors, where)
    for tensor in tensors.values():
        array = tensor.read()
        assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype)


def text_of(path: Path) -> str | None:
    """Opens a model, or a table of characters alone; why it takes no text."""
    if any(path.glob("meta.*")):
        nanogpt.tokenizer_beside(path / "ckpt.pt")
        return None
    return getattr(open_model.open_model(path).tokenizer, "why", None)


def is_one_line(message: str, folder: Path) -> bool:
    message = message.replace(str(folder), "")
    return message.isprintable() and 0 < len(message) <= 300


@pytest.mark.parametrize("reader", READERS)
def test_changed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    monkeypatch.setattr(open_model, "check_tensors", read_all)
    write, patterns = READERS[reader]
    path = write(tmp_path / "model")
    of_text = text_of(path) is None
    files = sorted({f for p in patterns for f in path.glob(p)}) or [path]
    whole = [file.read_bytes() for file in files]
    places = [structure_of(file) for file in files]
    refused = 0

    @settings(
        max_examples=CASES,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(st.integers(0, 2**64 - 1))
    def check(seed: int) -> None:
        nonlocal refused
        draw = random.Random(seed)
        i = draw.randrange(len(files))
        edits = [
            (draw.getrandbits(30), draw.randrange(7), draw.getrandbits(8))
            for _ in range(draw.randint(1, 3))
        ]
        files[i].write_bytes(changed(files[i].name, whole[i], places[i], edits))
        try:
            why = text_of(path)
            message = why if of_text else None
        except (ValueError, OSError) as error:
            message = str(error)
        if message is not None:
            assert is_one_line(message, tmp_path), message
            refused += 1
        files[i].write_bytes(whole[i])

    check()
    assert refused >= CASES // 100
