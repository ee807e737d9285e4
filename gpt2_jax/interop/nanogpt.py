"""nanoGPT's checkpoints: ckpt.pt, and the character table of its meta.pkl."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.config import GPT2Config
from gpt2_jax.interop.hf import BUFFER, our_path, read_json
from gpt2_jax.interop.tensors import Tensor
from gpt2_jax.interop.torch_file import read_plain_pickle, read_torch_file
from gpt2_jax.tokenizer import CharTokenizer


def read(path: Path) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The config, and the tensors by our paths in matrix form.

    Linears are [out, in] there, the GELU is the one by erf, and names may carry the
    `_orig_mod.` of a compiled module.

    Raises:
      ValueError: on a file that is damaged or no nanoGPT checkpoint, and on a tensor
        that a GPT-2 doesn't have, naming it.
    """
    found = read_torch_file(path)
    if not isinstance(found, Mapping) or not {"model", "model_args"} <= set(found):
        raise ValueError(f"{path} is no nanoGPT checkpoint: no model and model_args")
    cfg = _config(path, found["model_args"])
    if not isinstance(found["model"], Mapping):
        raise ValueError(f"{path}: model holds no table of tensors")
    tensors: dict[str, Tensor] = {}
    for key, tensor in found["model"].items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {key!r} is not a tensor")
        name = key.removeprefix("_orig_mod.").removeprefix("transformer.")
        if BUFFER.fullmatch(name) or name == "lm_head.weight":
            continue  # the causal mask; the same parameter as wte there
        ours = our_path(name, path)
        if ours in tensors:
            raise ValueError(f"{path} has {name} twice")
        if ours.endswith("/kernel"):
            if len(tensor.shape) != 2:
                raise ValueError(f"{path}: {name} has shape {list(tensor.shape)}")
            tensor = tensor.transposed()
        tensors[ours] = tensor
    return cfg, tensors


def _config(path: Path, args: Any) -> GPT2Config:
    names = {"block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head"}
    names |= {"n_embd": "n_embd", "vocab_size": "vocab_size", "bias": "bias"}
    if not isinstance(args, Mapping):
        raise ValueError(f"{path}: model_args is no table")
    unknown = set(args) - {*names, "dropout"}
    missing = {*names} - {"bias"} - set(args)
    if missing:
        raise ValueError(f"{path}: model_args has no {sorted(missing)[0]}")
    if unknown:
        first = sorted(map(repr, unknown))[0]
        raise ValueError(f"{path}: model_args has {first}: not supported")
    rate = args.get("dropout", 0.0)
    try:
        return GPT2Config(
            **{ours: args[theirs] for theirs, ours in names.items() if theirs in args},
            activation_function="gelu",
            embd_pdrop=rate,
            attn_pdrop=rate,
            resid_pdrop=rate,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def tokenizer_beside(path: Path) -> CharTokenizer | None:
    """The table of characters in meta.json or meta.pkl beside a checkpoint, if any.

    Either holds nanoGPT's `itos`: id -> character (in JSON the ids are strings, or it
    is a list).

    Raises:
      ValueError: on a damaged file, and on characters that are not in code point
        order, in which nanoGPT's preparation puts them.
    """
    for name in ("meta.json", "meta.pkl"):
        file = path.with_name(name)
        if file.is_file():
            break
    else:
        return None
    meta = read_json(file) if file.suffix == ".json" else read_plain_pickle(file)
    itos = meta.get("itos") if isinstance(meta, Mapping) else None
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    no_table = ValueError(f"{file} has no itos, a table of id -> character")
    if not isinstance(itos, Mapping):
        raise no_table
    try:
        table = {int(i): c for i, c in itos.items()}
        characters = [table[i] for i in range(len(table))]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise no_table from None
    if not all(isinstance(c, str) and len(c) == 1 for c in characters):
        raise ValueError(f"{file}: itos holds more than single characters")
    if characters != sorted(set(characters)):
        raise ValueError(f"{file}: the characters are not in code point order")
    try:
        return CharTokenizer(characters, end_of_text=False)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
