"""Hugging Face folders: config.json with safetensors or pytorch_model.bin."""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checks import one_line, shown
from gpt2_jax.config import GPT2Config
from gpt2_jax.formats.names import by_our_paths, their_name
from gpt2_jax.formats.params import matrices
from gpt2_jax.formats.safetensors_file import SUFFIX, is_safetensors, read_safetensors
from gpt2_jax.formats.tensors import Tensor
from gpt2_jax.formats.torch_file import read_torch_file
from gpt2_jax.layout import Params
from gpt2_jax.runtime.files import check_regular, is_there, read_json
from gpt2_jax.tokenizers.gpt2 import GPT2Tokenizer
from gpt2_jax.tokenizers.gpt2_files import BYTE_OF_CHARACTER
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer
from gpt2_jax.tokenizers.sentencepiece import SPACE_MARK, SentencePieceTokenizer
from gpt2_jax.tokenizers.token_roles import (
    CONFIG,
    END_OF_TEXT,
    GENERATION,
    ROLES,
    TOKENIZER_CONFIG,
    ids_of_model,
)

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
INDEX = ".index.json"
WEIGHTS = (
    *("model.safetensors", f"model.safetensors{INDEX}"),
    *("pytorch_model.bin", f"pytorch_model.bin{INDEX}"),
)


def is_hf_folder(folder: Path) -> bool:
    """Whether there is a config.json with weights beside it."""
    return is_there(folder / "config.json") and any(
        is_there(folder / name) for name in WEIGHTS
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
        reason = one_line(error, 160)
        raise FileNotFoundError(
            f"{name!r} is no file or folder, nor a model in the hub's cache, and could "
            f"not be fetched: {type(error).__name__}: {reason}"
        ) from error
    return folder


def settings_in(folder: Path) -> dict[str, dict[str, Any]]:
    """What a folder says of tokens and generation, for `write` to keep."""
    found = {}
    for name in (CONFIG, TOKENIZER_CONFIG, GENERATION):
        with contextlib.suppress(ValueError, OSError):
            found[name] = _json_object(folder / name)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = found.pop(CONFIG, {})
    return {**found, CONFIG: {key: config[key] for key in names if key in config}}


def end_ids_of(folder: Path) -> tuple[int, ...]:
    """What ends a text, as far as the folder of a model without a tokenizer says it."""
    said: dict[str, dict[str, Any]] = {}
    for name in (CONFIG, GENERATION):
        with contextlib.suppress(ValueError, OSError):
            said[name] = _json_object(folder / name)
    with contextlib.suppress(ValueError):
        return ids_of_model(said.get(CONFIG), said.get(GENERATION))[0]
    return ()


def read(
    folder: Path, weights: Path | None = None
) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The config, and the tensors by our paths in matrix form.

    Args:
      weights: a file of them, or an index; None: the first of WEIGHTS in the folder.

    Raises:
      ValueError: on damaged files, on a config that isn't a GPT-2's, and on a tensor
        that a GPT-2 doesn't have, naming it.
    """
    cfg = config_of(folder / "config.json")
    if weights is None:
        weights = next((folder / n for n in WEIGHTS if is_there(folder / n)), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} has none of {', '.join(WEIGHTS)}")
    return cfg, by_our_paths(_tensors(weights), weights)


def config_of(path: Path) -> GPT2Config:
    """The GPT2Config of a config.json.

    Keys that transformers' GPT-2 itself doesn't look at are passed over.

    Raises:
      ValueError: on JSON that is damaged, on a value that makes another model than
        GPT-2, and as GPT2Config.
    """
    values = _json_object(path)
    for name, allowed in NEUTRAL.items():
        if name in values and values[name] not in allowed:
            raise ValueError(f"{path}: {name}={shown(values[name])} is not supported")
    if "model_type" not in values and "n_embd" not in values:
        raise ValueError(f"{path} is not a GPT-2's: neither model_type nor n_embd")
    known = {ALIASES.get(name, name): value for name, value in values.items()}
    try:
        return GPT2Config.from_dict({k: known[k] for k in FIELDS if k in known})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _json_object(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def _tensors(weights: Path) -> dict[str, Tensor]:
    if not weights.name.endswith(INDEX):
        return _tensors_of_file(weights)
    index = _json_object(weights).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{weights} has no weight_map")
    for name in index.values():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,200}", name):
            raise ValueError(
                f"{weights} names {shown(name)}, which is no file beside it"
            )
    tensors: dict[str, Tensor] = {}
    for name in sorted({*index.values()}):
        for key, tensor in _tensors_of_file(weights.with_name(name)).items():
            if key in tensors:
                raise ValueError(f"{weights}: {shown(key)} is in two files")
            tensors[key] = tensor
    for key in index:
        if key not in tensors:
            raise ValueError(f"{weights}: {shown(key)} is not in {index[key]}")
    return tensors


def _tensors_of_file(path: Path) -> dict[str, Tensor]:
    check_regular(path)
    if is_safetensors(path) or path.suffix == SUFFIX:
        return read_safetensors(path)
    return table_of(read_torch_file(path), path)


def table_of(state: Any, where: object) -> dict[str, Tensor]:
    """A state_dict that was in a pickle: name -> tensor.

    Raises:
      ValueError: when it is none.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{where} holds no table of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{where}: {shown(name)} is not a tensor")
    return dict(state)


def write(
    folder: Path,
    cfg: GPT2Config,
    params: Params,
    tokenizer: Tokenizer,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
    summary: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes a folder that transformers loads as it is.

    Biases that a model doesn't have are written as zeros, the same function.

    Args:
      folder: an empty one.
      cfg: of the embedding, its vocab_size first rows are written.
      tokenizer: a NoTokenizer writes none.
      dtype: float32 or bfloat16, of the file.
      max_shard_bytes: more than this is split into several files.
      summary: what the model card shall say of the training.
      settings: as of `settings_in`; what is known here of tokens goes before.

    Raises:
      ValueError: on a tokenizer that the format can't hold, naming it.
    """
    said = settings or {}
    files: dict[str, bytes] = {}
    if not isinstance(tokenizer, NoTokenizer):
        kept = said.get(TOKENIZER_CONFIG, {})
        files = tokenizer_files(tokenizer, cfg.n_positions, kept)
    if said.get(GENERATION):
        files[GENERATION] = _json(said[GENERATION])
    for name, content in files.items():
        (folder / name).write_bytes(content)
    values = {**config_values(cfg, tokenizer, dtype), **said.get(CONFIG, {})}
    (folder / CONFIG).write_bytes(_json(values))
    (folder / "README.md").write_text(model_card(cfg, summary or {}), encoding="utf-8")
    write_safetensors(folder, state_dict(cfg, params, np.dtype(dtype)), max_shard_bytes)


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, indent=2).encode() + b"\n"


def config_values(cfg: GPT2Config, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The content of a config.json."""
    ends = tokenizer.end_ids
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{name: getattr(cfg, name) for name in FIELDS},
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else [*ends] or None,
        "dtype": dtype,
    }


def state_dict(
    cfg: GPT2Config, params: Params, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of each tensor as transformers has it, one at a time."""
    for path, x in matrices(params):
        x = x[: cfg.vocab_size] if path == "wte/embedding" else x
        yield f"transformer.{their_name(path)}", np.ascontiguousarray(x, dtype)
        if not cfg.bias and path.endswith(("/scale", "/kernel")):
            name = their_name(path.rsplit("/", 1)[0] + "/bias")
            yield f"transformer.{name}", np.zeros(x.shape[-1], dtype)


def write_safetensors(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes model.safetensors, or shards of it with an index.

    No more than a shard is held in memory.
    """
    from safetensors.numpy import save_file

    shards: list[dict[str, int]] = []  # name -> bytes
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        file = folder / f"part-{len(shards)}.safetensors"
        save_file(held, file, metadata={"format": "pt"})
        file.chmod(0o644)
        shards.append({name: x.nbytes for name, x in held.items()})
        held.clear()

    for name, x in tensors:
        if held and sum(y.nbytes for y in held.values()) + x.nbytes > max_shard_bytes:
            flush()
        held[name] = x
    flush()
    if len(shards) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(size for shard in shards for size in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(index, indent=2), encoding="utf-8"
    )


def tokenizer_files(
    tokenizer: Tokenizer, n_positions: int, settings: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """The files by which transformers knows a tokenizer, and our own where they differ.

    Args:
      settings: a tokenizer_config.json to begin with.

    Raises:
      ValueError: on one that its formats can't hold.
    """
    values: dict[str, Any] = {
        "model_max_length": n_positions,
        "clean_up_tokenization_spaces": False,
        **(settings or {}),
    }
    values.pop("auto_map", None)  # code of the folder that it came from
    if isinstance(tokenizer, GPT2Tokenizer):
        files = tokenizer.files()
        files.pop(ROLES, None)  # tokenizer_config.json says it
        for old, new in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
            if old in files:
                files[new] = files.pop(old)
        values = {**_names(tokenizer), **values, **_role_settings(tokenizer)}
    else:
        content = json.dumps(_tokenizer_json(tokenizer), ensure_ascii=False)
        files = {**tokenizer.files(), "tokenizer.json": content.encode()}
        if tokenizer.eot_id is not None:
            values |= dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
    one_file = "tokenizer.json" in files
    values.setdefault(
        "tokenizer_class", "PreTrainedTokenizerFast" if one_file else "GPT2Tokenizer"
    )
    return {**files, TOKENIZER_CONFIG: _json(values)}


def _role_settings(tokenizer: GPT2Tokenizer) -> dict[str, Any]:
    """The roles of a tokenizer's tokens, as tokenizer_config.json has them."""
    roles = tokenizer.roles
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    values: dict[str, Any] = {
        "add_prefix_space": roles.add_prefix_space,
        "added_tokens_decoder": {
            str(t.id): {flag: getattr(t, flag) for flag in flags} for t in roles.added
        },
    }
    if roles.begin_ids in ((), (roles.bos_id,)):
        values["add_bos_token"] = bool(roles.begin_ids)
    return values


def _names(tokenizer: GPT2Tokenizer) -> dict[str, str]:
    """How the tokens that begin and end a text are written."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eot_id}
    return {k: tokenizer.decode([i]) for k, i in ids.items() if i is not None}


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer of ours as a BPE of the tokenizers library.

    The one difference: in text, its SentencePiece reads U+2581 as a space.
    """
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    byte_level["trim_offsets"] = True
    model: dict[str, Any] = {"type": "BPE", "merges": []}
    normalizer = pre_tokenizer = None
    decoder: dict[str, Any] = {"type": "Fuse"}
    if isinstance(tokenizer, ByteTokenizer):
        model["vocab"] = dict(BYTE_OF_CHARACTER)
        pre_tokenizer = decoder = byte_level
    elif isinstance(tokenizer, CharTokenizer):
        model["vocab"] = {c: i for i, c in enumerate(tokenizer.characters)}
    elif isinstance(tokenizer, SentencePieceTokenizer):
        vocab, merges = tokenizer.bpe()
        model |= {"vocab": vocab, "merges": merges, "byte_fallback": True}
        normalizer = _replace(" ", SPACE_MARK)
        parts = [_replace(SPACE_MARK, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
        decoder = {"type": "Sequence", "decoders": parts}
    else:
        raise ValueError(f"transformers has no tokenizer of kind {tokenizer.kind!r}")
    added = []
    if tokenizer.eot_id is not None:
        model["vocab"][END_OF_TEXT] = tokenizer.eot_id
        added = [{"id": tokenizer.eot_id, "content": END_OF_TEXT, "special": True}]
        for flag in ("single_word", "lstrip", "rstrip", "normalized"):
            added[0][flag] = False
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def model_card(cfg: GPT2Config, summary: Mapping[str, Any]) -> str:
    """A README.md in the hub's form, for its author to go on with."""
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation"),
        *("tags:", "- gpt2", "- gpt2_jax", "---", "", "# GPT-2", ""),
        "A GPT-2, converted by gpt2_jax.",
        *("", "## Architecture", ""),
        *(f"- {field}: {getattr(cfg, field)}" for field in FIELDS),
    ]
    if summary:
        lines += ["", "## Training", "", *(f"- {k}: {v}" for k, v in summary.items())]
    return "\n".join(lines) + "\n"
