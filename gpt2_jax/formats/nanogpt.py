"""nanoGPT's checkpoints: ckpt.pt, and the character table of its meta.pkl."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.checks import shown
from gpt2_jax.config import GPT2Config
from gpt2_jax.formats.hf import table_of
from gpt2_jax.formats.names import by_our_paths
from gpt2_jax.formats.pickles import read_plain_pickle
from gpt2_jax.formats.tensors import Tensor
from gpt2_jax.formats.torch_file import read_torch_file
from gpt2_jax.runtime.files import is_there, read_json
from gpt2_jax.tokenizers.plain import CharTokenizer


def read(path: Path) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The config, and the tensors by our paths in matrix form.

    Linears are [out, in] there, and the GELU is the one by erf.

    Raises:
      ValueError: on a file that is damaged or no nanoGPT checkpoint, and on a tensor
        that a GPT-2 doesn't have, naming it.
    """
    return from_tree(read_torch_file(path), path)


def is_nanogpt(tree: Any) -> bool:
    return isinstance(tree, Mapping) and {"model", "model_args"} <= set(tree)


def from_tree(tree: Any, path: Path) -> tuple[GPT2Config, dict[str, Tensor]]:
    """As `read`, of what `read_torch_file` gave for `path`."""
    if not is_nanogpt(tree):
        raise ValueError(f"{path} is no nanoGPT checkpoint: no model and model_args")
    cfg = _config(path, tree["model_args"])
    tensors = by_our_paths(table_of(tree["model"], f"{path}: model"), path)
    for name, tensor in tensors.items():
        if name.endswith("/kernel"):
            if len(tensor.shape) != 2:
                raise ValueError(f"{path}: {name} has shape {shown([*tensor.shape])}")
            tensors[name] = tensor.transposed()
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
        first = min(map(shown, unknown))
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
        if is_there(file):
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
