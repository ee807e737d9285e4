"""Foreign files of a small model, written by hand from what their formats say."""

import json
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gpt2_jax.config import GPT2Config
from gpt2_jax.layout import Params

SMALL = GPT2Config(
    vocab_size=17,
    n_positions=8,
    n_embd=8,
    n_layer=2,
    n_head=2,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)
HF_CONFIG = {
    "model_type": "gpt2",
    "vocab_size": 17,
    "n_positions": 8,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "activation_function": "gelu_new",
}
MODEL_ARGS = {
    "block_size": 8,
    "vocab_size": 17,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 8,
    "dropout": 0.0,
    "bias": True,
}

State = dict[str, np.ndarray]


def hf_state() -> State:
    """Random float32 numbers by Hugging Face's names, linears [in, out]."""
    d, f = 8, 32
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (17, d), "wpe.weight": (8, d)}
    for i in range(2):
        for norm in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{norm}.weight"] = shapes[f"h.{i}.{norm}.bias"] = (d,)
        for linear, into, out in (
            ("attn.c_attn", d, 3 * d),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, f),
            ("mlp.c_proj", f, d),
        ):
            shapes[f"h.{i}.{linear}.weight"] = (into, out)
            shapes[f"h.{i}.{linear}.bias"] = (out,)
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (d,)
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def nanogpt_state(*, bias: bool = True) -> State:
    """The same numbers by nanoGPT's names, linears [out, in], with the tied head."""
    state = {
        f"transformer.{name}": x.T.copy() if ".c_" in name and x.ndim == 2 else x
        for name, x in hf_state().items()
        if bias or not name.endswith(".bias")
    }
    return {**state, "lm_head.weight": state["transformer.wte.weight"]}


def expected(state: State) -> State:
    """Our parameters of a `hf_state`, by path."""
    shapes = {"attn/c_attn/kernel": (8, 3, 2, 4), "attn/c_proj/kernel": (2, 4, 8)}
    params = {}
    for name, x in state.items():
        path = name.replace("h.", "h_", 1) if name.startswith("h.") else name
        path = path.replace(".", "/")
        if path.endswith("weight"):
            leaf = "scale" if "ln_" in path else "kernel" if "c_" in path else ""
            path = path.removesuffix("weight") + (leaf or "embedding")
        params[path] = x.reshape(shapes.get(path[4:], x.shape))
    return params


def flat(params: Params) -> State:
    """Parameters by path, on the host."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
        for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
    }


def assert_same(params: Params, wanted: State) -> None:
    """Bit for bit, dtypes too."""
    found = flat(params)
    assert found.keys() == wanted.keys()
    for path, x in wanted.items():
        assert found[path].shape == x.shape, path
        assert found[path].dtype == x.dtype, path
        assert found[path].tobytes() == x.tobytes(), path


def write_hf(folder: Path, state: State | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**HF_CONFIG, **config}))
    save_file(hf_state() if state is None else state, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, state: State | None = None) -> Path:
    """As `write_hf`, in two files and an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    items = sorted((hf_state() if state is None else state).items())
    weight_map: dict[str, str] = {}
    for i, part in enumerate((items[:10], items[10:])):
        name = f"model-{i + 1:05}-of-00002.safetensors"
        save_file(dict(part), folder / name)
        weight_map |= {key: name for key, _ in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_bin(folder: Path) -> Path:
    """As `write_hf`, with a pytorch_model.bin."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    write_torch(folder / "pytorch_model.bin", OrderedDict(hf_state()))
    return folder


def write_nanogpt(path: Path, state: State | None = None, **args: Any) -> Path:
    model = nanogpt_state() if state is None else state
    write_torch(path, {"model": model, "model_args": {**MODEL_ARGS, **args}})
    return path


def write_llmc(path: Path, *, version: int = 3, padded: int = 128) -> Path:
    state = hf_state()
    wte = np.zeros((padded, 8), np.float32)
    wte[:17] = state["wte.weight"]
    rows = [wte, state["wpe.weight"]]
    for module in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc"):
        rows += _layers(state, module)
    rows += [*_layers(state, "mlp.c_proj"), state["ln_f.weight"], state["ln_f.bias"]]
    header = np.zeros(256, "<i4")
    header[:8] = (20240326, version, 8, 17, 2, 2, 8, padded)
    dtype = {3: np.float32, 5: ml_dtypes.bfloat16}[version]
    numbers = np.concatenate([x.ravel() for x in rows]).astype(dtype)
    path.write_bytes(header.tobytes() + numbers.tobytes())
    return path


def _layers(state: State, module: str) -> list[np.ndarray]:
    """[out, in] of all layers, then the biases of all layers."""
    weights = [state[f"h.{i}.{module}.weight"].T for i in range(2)]
    return weights + [state[f"h.{i}.{module}.bias"] for i in range(2)]


def write_torch(path: Path, tree: Any) -> None:
    """What torch.save writes, of a tree of plain values and float32 arrays."""
    storages: list[bytes] = []
    pickled = b"\x80\x02" + pickled_tree(tree, storages) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, numbers in enumerate(storages):
            archive.writestr(f"archive/data/{key}", numbers)
        archive.writestr("archive/version", "3\n")


def pickled_tree(x: Any, storages: list[bytes]) -> bytes:
    """Pickle protocol 2; the bytes of the arrays go to `storages`."""

    def of(*values: Any) -> bytes:
        return b"".join(pickled_tree(value, storages) for value in values)

    if x is None or isinstance(x, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[x]
    if isinstance(x, int):
        size = x.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + x.to_bytes(size, "little", signed=True)
    if isinstance(x, float):
        return b"G" + struct.pack(">d", x)
    if isinstance(x, str):
        return b"X" + struct.pack("<I", len(x.encode())) + x.encode()
    if isinstance(x, tuple):
        return b"(" + of(*x) + b"t"
    if isinstance(x, list):
        return b"](" + of(*x) + b"e"
    if isinstance(x, dict):
        new = b"ccollections\nOrderedDict\n)R" if isinstance(x, OrderedDict) else b"}"
        return new + b"(" + of(*(y for item in x.items() for y in item)) + b"u"
    assert isinstance(x, np.ndarray)
    assert x.dtype == np.float32
    storages.append(x.tobytes())
    storage = b"(" + of("storage") + b"ctorch\nFloatStorage\n"
    storage += of(str(len(storages) - 1), "cpu", x.size) + b"tQ"
    strides = tuple(np.empty(x.shape, np.uint8).strides)
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + of(0, x.shape, strides, False, OrderedDict())
        + b"tR"
    )
