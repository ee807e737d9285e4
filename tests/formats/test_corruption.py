"""Damaged and hostile files: one line that names the file, or a whole model.

Of any change to a file `gpt2_jax.load` either makes a ValueError or an OSError, or,
where the change does no harm, a model of finite numbers.
"""

import json
import shutil
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import gpt2_jax
from foreign import (
    HF_CONFIG,
    flat,
    hf_state,
    nanogpt_state,
    write_bin,
    write_hf,
    write_llmc,
    write_nanogpt,
    write_sharded,
    write_torch,
)
from gpt2_jax.model import abstract_params

WRITERS: dict[str, Callable[[Path], Path]] = {
    "safetensors": write_hf,
    "sharded": write_sharded,
    "bin": write_bin,
    "nanogpt": lambda path: write_nanogpt(path.with_suffix(".pt")),
    "llmc": lambda path: write_llmc(path.with_suffix(".bin")),
}
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("the file was read for half a minute")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    return {name: write(folder / name) for name, write in WRITERS.items()}


def outcome(path: Path) -> str:
    """The error's message; empty when a whole model was loaded."""
    try:
        lm = gpt2_jax.load(path)
    except (ValueError, OSError) as error:
        message = str(error)
        assert str(path) in message, message
        assert len(message.splitlines()) == 1, repr(message)
        return message
    params = flat(lm.params)
    wanted = flat(jax.tree.map(lambda x: np.zeros(x.shape), abstract_params(lm.config)))
    assert {k: x.shape for k, x in params.items()} == {
        k: x.shape for k, x in wanted.items()
    }
    assert all(np.isfinite(x).all() for x in params.values())
    return ""


def refused(path: Path, what: str) -> None:
    message = outcome(path)
    assert what in message, message or "loaded"


def copy(original: Path, to: Path) -> Path:
    if original.is_dir():
        return Path(shutil.copytree(original, to / original.name))
    return Path(shutil.copy(original, to))


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


# --- Whole files ----------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_the_originals_are_whole(originals: dict[str, Path], name: str):
    assert outcome(originals[name]) == ""


@pytest.mark.parametrize("name", WRITERS)
def test_flipped_numbers(originals: dict[str, Path], tmp_path: Path, name: str):
    """The highest bits of exponents: large numbers, some infinite or NaN."""
    path = copy(originals[name], tmp_path)
    file = max(files_of(path), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    at = data.index(hf_state()["h.1.ln_1.weight"].tobytes())
    data[at + 3] = 0x7F
    data[at + 2] = 0x10
    file.write_bytes(data)
    assert outcome(path) == ""
    data[at + 2] = 0x90
    file.write_bytes(data)
    refused(path, "h_1/ln_1/scale holds NaN or infinity")


# --- Sizes that lie -------------------------------------------------------------------

ABSURD = (
    *(10**9, 10**12, 10**15, 10**30, 0, -1, -(2**63)),
    *(2.0, 1e308, "8", None, True, [], [8], {}, "\n" * 9),
)
FIELDS = {
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
}


def in_little_memory(path: Path, what: tuple[str, ...]) -> None:
    tracemalloc.start()
    message = outcome(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert any(part in message for part in what), message or "loaded"
    assert peak < 20e6  # of bytes; a file has 20,000


def words_for(field: str) -> tuple[str, ...]:
    lacks = {"n_layer": ("no tensor for h_2/",), "n_embd": ("wte/embedding has",)}
    shape = {"vocab_size": ("wte/embedding",), "n_positions": ("wpe/embedding",)}
    return (f"{field}=", *lacks.get(field, ()), *shape.get(field, ()))


@pytest.mark.parametrize("field", FIELDS.values())
def test_absurd_config(tmp_path: Path, field: str):
    folder = write_hf(tmp_path / "model")
    for value in ABSURD:
        (folder / "config.json").write_text(json.dumps({**HF_CONFIG, field: value}))
        in_little_memory(folder, words_for(field))


@pytest.mark.parametrize("field", FIELDS)
def test_absurd_model_args(tmp_path: Path, field: str):
    for value in ABSURD:
        path = write_nanogpt(tmp_path / "ckpt.pt", **{field: value})
        in_little_memory(path, words_for(FIELDS[field]))


@pytest.mark.parametrize("at", range(1, 8))
def test_absurd_llmc_header(tmp_path: Path, at: int):
    path = write_llmc(tmp_path / "model.bin")
    for value in (-(2**31), -1, 0, 10**9, 2**31 - 1):
        header = np.fromfile(path, "<i4", 256)
        header[at] = value
        damaged = tmp_path / "damaged.bin"
        damaged.write_bytes(header.tobytes() + path.read_bytes()[1024:])
        in_little_memory(damaged, ("version", "=", "needs", "padded", "divisible"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer_norm_epsilon", 10**400),
        ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", "1e-5"),
        ("resid_pdrop", -(10**400)),
        ("n_inner", 2**31 - 1),
        ("n_inner", 0),
        ("n_inner", "x"),
        ("activation_function", ["gelu"]),
        ("activation_function", "x" * 10**5),
        ("scale_attn_weights", 1),
        ("model_type", {"gpt2": 1}),
        ("add_cross_attention", True),
    ],
)
def test_other_absurd_config(tmp_path: Path, name: str, value: Any):
    folder = write_hf(tmp_path / "model", **{name: value})
    refused(folder, "mlp/c_fc" if value == 2**31 - 1 else name)


@pytest.mark.parametrize("value", [10**30, -2, 17, True, None, "x", [17]])
def test_an_end_of_text_that_is_no_id(tmp_path: Path, value: Any):
    lm = gpt2_jax.load(write_hf(tmp_path / "model", eos_token_id=value))
    assert lm.tokenizer.eot_id is None
    assert len(lm.generate([1], max_new_tokens=3, seed=0)) == 3


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[" * 10**5, "not JSON"),
        ('{"a":' * 10**5, "not JSON"),
        ('{"n_layer": 1' + "0" * 10**4 + "}", "not JSON"),
        ("[]", "is not a JSON object"),
        ("\ufffe\x00", "not JSON"),
        ("{}", ""),
        ('{"n_embd": 8}', ""),
    ],
)
def test_json_that_is_none(tmp_path: Path, file: str, text: str, what: str):
    folder = write_sharded(tmp_path / "model")
    (folder / file).write_text(text)
    refused(folder, what or file.split(".")[0])


# --- Tensors that are missing, too many, or others ------------------------------------


def write_safetensors(path: Path, header: Any, numbers: bytes = bytes(64)) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


def header_of(shape: list[Any], begin: Any = 0, end: Any = 64, dtype: Any = "F32"):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return {"wte.weight": entry}


@pytest.mark.parametrize(
    "header",
    [
        header_of([17, 8]),
        header_of([2**62, 2**62]),
        header_of([10**30]),
        header_of([-16]),
        header_of([16], 0, 2**63),
        header_of([16], 64, 0),
        header_of([16], -1, 63),
        header_of([16], dtype="F31"),
        header_of([16], dtype="F\n32"),
        header_of([16], dtype="I32"),
        header_of([8], dtype="F64"),
        header_of([16], dtype=None),
        header_of([None]),
        header_of([1] * 100),
        {"wte.weight": None},
        {"wte.weight\n": header_of([16])["wte.weight"]},
        {"a" * 10**4: header_of([16])["wte.weight"]},
        {},
        [],
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b"\xff\xff",
    ],
)
def test_headers_of_safetensors(tmp_path: Path, header: Any):
    folder = write_hf(tmp_path / "model")
    write_safetensors(folder / "model.safetensors", header)
    assert outcome(folder)


@pytest.mark.parametrize("size", [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_headers_size(tmp_path: Path, size: int):
    folder = write_hf(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])
    in_little_memory(folder, ("model.safetensors",))


CHANGES: dict[str, tuple[Callable[[dict], None], str]] = {
    "missing": (lambda s: s.pop("h.1.ln_1.bias"), "no tensor for h_1/ln_1/bias"),
    "no wte": (lambda s: s.pop("wte.weight"), "no tensor for wte/embedding"),
    "layer": (lambda s: s.update({"h.2.ln_1.bias": s["ln_f.bias"]}), "has h_2/ln_1"),
    "extra": (lambda s: s.update({"extra": s["ln_f.bias"]}), "a tensor 'extra', which"),
    "shape": (lambda s: s.update({"ln_f.bias": np.ones(9, "f4")}), "ln_f/bias has sha"),
    "axes": (lambda s: s.update({"ln_f.bias": np.ones((), "f4")}), "ln_f/bias has sha"),
    "empty": (lambda s: s.update({"ln_f.bias": np.ones(0, "f4")}), "ln_f/bias has sha"),
    "nan": (lambda s: s["ln_f.bias"].fill(np.nan), "ln_f/bias holds NaN"),
    "infinity": (lambda s: s["wte.weight"].fill(-np.inf), "wte/embedding holds NaN"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["safetensors", "bin", "nanogpt"])
def test_other_tensors(tmp_path: Path, name: str, change: str):
    function, what = CHANGES[change]
    if name == "nanogpt":
        state = {k.removeprefix("transformer."): x for k, x in nanogpt_state().items()}
        del state["lm_head.weight"]  # wte under its other name
        function(state)
        path = write_nanogpt(tmp_path / "ckpt.pt", state)
    else:
        state = hf_state()
        function(state)
        path = write_hf(tmp_path / "model")
        if name == "safetensors":
            save_file(state, path / "model.safetensors")
        else:
            (path / "model.safetensors").unlink()
            write_torch(path / "pytorch_model.bin", state)
    refused(path, what)


@pytest.mark.parametrize("tree", [1, None, [], {"model": {}}, {"x": 1}, {1: "x"}, {}])
def test_other_trees(tmp_path: Path, tree: Any):
    folder = write_bin(tmp_path / "model")
    write_torch(folder / "pytorch_model.bin", tree)
    refused(folder, "pytorch_model.bin" if tree != {} else "no tensor for wte/embed")


# --- Paths in an index ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.safetensors", "/etc/passwd", "", ".", "..", "a/b.safetensors"),
        *("..\\secret.safetensors", "\0", "a\nb.safetensors", ".hidden.safetensors"),
        *("C:model.safetensors", "file:///etc/passwd", "model.safetensors/", "~"),
        *("nowhere.safetensors", INDEX, "config.json", "x" * 5000, None, 3, [], {}),
    ],
)
def test_paths_in_an_index(tmp_path: Path, name: Any):
    folder = write_sharded(tmp_path / "model")
    save_file(hf_state(), tmp_path / "secret.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["wte.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    assert outcome(folder)


def test_an_absolute_path_in_an_index(tmp_path: Path):
    folder = write_sharded(tmp_path / "model")
    secret = tmp_path / "secret.safetensors"
    save_file(hf_state(), secret)
    weight_map = dict.fromkeys(hf_state(), str(secret))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "which is no file beside it")


@pytest.mark.parametrize(
    ("weight_map", "what"),
    [
        (None, "has no weight_map"),
        ([], "has no weight_map"),
        ({}, "has no weight_map"),
        ("x", "has no weight_map"),
        ({"a\nb": SHARDS[0]}, f"is not in {SHARDS[0]}"),
        (dict.fromkeys(hf_state(), SHARDS[0]), f"is not in {SHARDS[0]}"),
        ({"wte.weight": SHARDS[1]}, "no tensor for wpe/embedding"),
    ],
)
def test_weight_maps(tmp_path: Path, weight_map: Any, what: str):
    folder = write_sharded(tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    if what.startswith("no tensor"):
        assert outcome(folder)
    else:
        refused(folder, what)


def test_a_tensor_in_two_files(tmp_path: Path):
    folder = write_sharded(tmp_path / "model")
    save_file(hf_state(), folder / SHARDS[0])
    refused(folder, "is in two files")


def test_links_that_lead_nowhere_or_round(tmp_path: Path):
    folder = write_sharded(tmp_path / "model")
    for target in ("nowhere", SHARDS[0], "."):
        (folder / SHARDS[0]).unlink()
        (folder / SHARDS[0]).symlink_to(target)
        refused(folder, SHARDS[0])


@pytest.mark.parametrize("name", [".", "ckpt.pt", "model.bin", "x.safetensors"])
def test_nothing_there(tmp_path: Path, name: str):
    refused(tmp_path / name, "no model" if name == "." else "no such file or folder")
