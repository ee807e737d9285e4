"""Hugging Face folders: config.json with safetensors or pytorch_model.bin."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.tensors import Tensor
from gpt2_jax.interop.torch_file import read_torch_file

# GPT2Config's fields that transformers knows by the same name.
FIELDS = (
    *("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"),
    *("activation_function", "layer_norm_epsilon", "initializer_range"),
    *("embd_pdrop", "attn_pdrop", "resid_pdrop"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
)
ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# What would make another function of the weights, and the value at which it doesn't.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "add_cross_attention": (False, None),
    "tie_word_embeddings": (True, None),
    "is_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
}
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
EMBEDDING = re.compile(r"(wte|wpe)\.weight")
PARAMETER = re.compile(
    r"(ln_f|h\.\d+\.(?:ln_[12]|attn\.c_(?:attn|proj)|mlp\.c_(?:fc|proj)))"
    r"\.(weight|bias)"
)
WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def is_hf_folder(folder: Path) -> bool:
    """Whether there is a config.json with weights beside it."""
    return (folder / "config.json").is_file() and any(
        (folder / name).is_file() for name in WEIGHTS
    )


def is_hub_name(name: str) -> bool:
    """Whether it has the form of `gpt2` or `openai-community/gpt2-xl`."""
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None


def download(name: str, revision: str | None = None) -> Path:
    """The folder of a model in the hub's cache, fetched when it is not there yet.

    The environment of huggingface_hub holds: HF_HOME, HF_HUB_OFFLINE, HF_TOKEN.

    Raises:
      FileNotFoundError: when it is neither in the cache nor to be had from the hub.
    """
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*patterns],
                ignore_patterns=["*/*"],
            )
        )

    try:
        folder = fetch("*.json", "merges.txt", "*.model", "model*.safetensors")
        if not is_hf_folder(folder):
            folder = fetch("pytorch_model*.bin*")
    except Exception as error:  # of the hub, of requests, of the cache
        reason = " ".join(str(error).split())[:160]
        raise FileNotFoundError(
            f"{name!r} is no file or folder, nor a model in the hub's cache, and could "
            f"not be fetched: {type(error).__name__}: {reason}"
        ) from error
    return folder


def eot_id_of(folder: Path) -> int:
    """The end-of-text id that config.json names; -1 where there is none."""
    path = folder / "config.json"
    value = _json(path).get("eos_token_id", 50256) if path.is_file() else -1
    return value if isinstance(value, int) else -1


def read(folder: Path) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The config, and the tensors by our paths in matrix form.

    Raises:
      ValueError: on damaged files, on a config that isn't a GPT-2's, and on a tensor
        that a GPT-2 doesn't have, naming it.
    """
    cfg = config_of(folder / "config.json")
    weights = next((folder / n for n in WEIGHTS if (folder / n).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} has none of {', '.join(WEIGHTS)}")
    tensors: dict[str, Tensor] = {}
    for name, tensor in _tensors(weights).items():
        name = name.removeprefix("transformer.")
        if name in tensors:
            raise ValueError(f"{weights} has {name} twice, with a prefix and without")
        tensors[name] = tensor
    head = tensors.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in tensors:
        _check_tied(weights, head, tensors["wte.weight"])
    ours = {}
    for name, tensor in tensors.items():
        if BUFFER.fullmatch(name):
            continue  # the causal mask of older versions
        ours[our_path(name, weights)] = tensor
    return cfg, ours


def our_path(name: str, where: object) -> str:
    """Our path of the tensor `h.0.attn.c_attn.weight`, say.

    Raises:
      ValueError: when no GPT-2 has such a tensor.
    """
    if embedding := EMBEDDING.fullmatch(name):
        return f"{embedding[1]}/embedding"
    found = PARAMETER.fullmatch(name)
    if not found:
        raise ValueError(f"{where} has a tensor {name!r}, which no GPT-2 has")
    module, leaf = found.groups()
    module = re.sub(r"^h\.", "h_", module).replace(".", "/")
    if leaf == "weight":
        leaf = "scale" if "ln_" in module else "kernel"
    return f"{module}/{leaf}"


def their_name(path: str) -> str:
    """The inverse of `our_path`, without the prefix."""
    module, leaf = path.replace("h_", "h/", 1).rsplit("/", 1)
    return f"{module.replace('/', '.')}.{'bias' if leaf == 'bias' else 'weight'}"


def config_of(path: Path) -> GPT2Config:
    """The GPT2Config of a config.json.

    Keys that transformers' GPT-2 itself doesn't look at are passed over.

    Raises:
      ValueError: on JSON that is damaged, on a value that makes another model than
        GPT-2, and as GPT2Config.
    """
    values = _json(path)
    for name, allowed in NEUTRAL.items():
        if name in values and values[name] not in allowed:
            raise ValueError(f"{path}: {name}={values[name]!r} is not supported")
    if "model_type" not in values and "n_embd" not in values:
        raise ValueError(f"{path} is not a GPT-2's: neither model_type nor n_embd")
    known = {ALIASES.get(name, name): value for name, value in values.items()}
    try:
        return GPT2Config.from_dict({k: known[k] for k in FIELDS if k in known})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def _check_tied(where: Path, head: Tensor, wte: Tensor) -> None:
    if head.shape != wte.shape or not np.array_equal(head.read(), wte.read()):
        raise ValueError(
            f"{where}: lm_head.weight is not wte.weight, and an untied head is not "
            "supported"
        )


def _tensors(weights: Path) -> dict[str, Tensor]:
    if weights.suffix != ".json":
        return _tensors_of_file(weights)
    index = _json(weights).get("weight_map")
    if not isinstance(index, Mapping) or not index:
        raise ValueError(f"{weights} has no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted({*map(str, index.values())}):
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise ValueError(f"{weights} names {name!r}, which is no file beside it")
        for key, tensor in _tensors_of_file(weights.with_name(name)).items():
            if key in tensors:
                raise ValueError(f"{weights}: {key} is in two files")
            tensors[key] = tensor
    for key in index:
        if key not in tensors:
            raise ValueError(f"{weights}: {key} is not in {index[key]}")
    return tensors


def _tensors_of_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    state = read_torch_file(path)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds no table of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: {name!r} is not a tensor")
    return dict(state)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that the model may have; dtypes other than f32, f16 and
    bf16 are refused by name (but for masks, which may be bool or uint8)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118 (it isn't iterable)
                part = file.get_slice(name)
                shape, kind = tuple(part.get_shape()), part.get_dtype()
                if kind not in DTYPES and not BUFFER.search(name):
                    raise ValueError(
                        f"{path}: {name} has dtype {kind}, not {', '.join(DTYPES)}"
                    )
                dtype = DTYPES.get(kind, np.dtype(np.uint8))
                tensors[name] = Tensor(shape, dtype, partial(_read_one, path, name))
            return tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _read_one(path: Path, name: str) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return file.get_tensor(name)
