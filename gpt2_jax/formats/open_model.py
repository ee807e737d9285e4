"""Tells the formats of models apart: a path or a name becomes one `Source`."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gpt2_jax.checkpoints import checkpoint
from gpt2_jax.checkpoints.checkpoint import Contract
from gpt2_jax.checkpoints.integrity import params_hash
from gpt2_jax.checks import check_text, integer, one_line
from gpt2_jax.config import GPT2Config
from gpt2_jax.formats import hf, llmc, nanogpt, openai_tf
from gpt2_jax.formats.params import check_tensors, load_params
from gpt2_jax.formats.safetensors_file import SUFFIX, is_safetensors
from gpt2_jax.formats.tensors import Tensor
from gpt2_jax.formats.torch_file import is_torch_file, read_torch_file
from gpt2_jax.layout import Params
from gpt2_jax.lora import LoraConfig, init_adapters, merged
from gpt2_jax.model import abstract_params
from gpt2_jax.runtime.files import check_regular, is_there, user_path
from gpt2_jax.tokenizers.boundaries import as_trained
from gpt2_jax.tokenizers.files import load_tokenizer
from gpt2_jax.tokenizers.gpt2 import GPT2Tokenizer
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer

EXPECTED = (
    "a run's folder, a Hugging Face folder or hub name, an OpenAI checkpoint folder, a "
    "nanoGPT ckpt.pt, an llm.c .bin, or a file of weights with config.json beside it"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that has been opened, with none of its numbers read yet.

    Attributes:
      load: (dtype, tree of shardings) -> parameters, one tensor at a time.
      step: of a run's checkpoint; None for others.
      summary: of its training, where that is known.
      n_rows: of the embedding, those that had a part in the training; further ones are
        padding, which another program would draw.
      settings: name -> content, of a Hugging Face folder's files that say more of
        tokens and generation than is used here.
    """

    config: GPT2Config
    tokenizer: Tokenizer
    load: Callable[[Any, Any], Params]
    step: int | None = None
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    n_rows: int | None = None
    settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def open_model(
    model: str | Path, *, step: int | str | None = None, revision: str | None = None
) -> Source:
    """Finds out what `model` is; arguments and errors as of `lm.load`.

    What stands in a folder decides, so that a folder of another program may lie beside
    a model's files. A folder with two models in it is refused.
    """
    if revision is not None:
        check_text("revision", revision)
    if not isinstance(step, str | None):
        step = integer("step", step)
    path = user_path(model)
    if not path.exists() and openai_tf.index_of(path):
        return _openai(path.parent, openai_tf.index_of(path))
    if not os.path.lexists(path) and step is None and hf.is_hub_name(str(model)):
        path = hf.download(str(model), revision)
    if not path.is_dir():
        return _file(path, step)
    kinds = {name: opens for name, (holds, opens) in _FOLDERS.items() if holds(path)}
    if step is not None:  # which the other formats don't have
        kinds = {name: kinds[name] for name in (_RUN, _TF) if name in kinds}
    if len(kinds) > 1:
        raise ValueError(
            f"{path} holds {' and '.join(kinds)}: name a file in it, or a step's folder"
        )
    for opens in kinds.values():
        return opens(path, step)
    if step is not None or any((path / part).exists() for part in _PARTS_OF_A_RUN):
        return _run(path, step)  # whose error says what is missing
    raise FileNotFoundError(f"{path} holds no model: expected {EXPECTED}")


_RUN, _TF = "a run's checkpoints", "an OpenAI checkpoint"
_PARTS_OF_A_RUN = ("checkpoints", "metrics.jsonl", "meta")


def _is_run(folder: Path) -> bool:
    """Whether there are steps in it, or it is one."""
    steps = folder / "checkpoints"
    if steps.is_dir() and any(p.name.isdecimal() for p in steps.iterdir()):
        return True
    return all((folder / part).is_dir() for part in ("meta", "tokenizer"))


def _openai(folder: Path, step: int | str | Path | None) -> Source:
    return _foreign(folder, *openai_tf.read(folder, step), _tokenizer_beside(folder))


# What a folder may hold, how that is known, and what opens it.
_FOLDERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, Any], Source]]] = {
    _RUN: (_is_run, lambda path, step: _run(path, step)),
    "a Hugging Face model": (
        hf.is_hf_folder,
        lambda path, _: _foreign(path, *hf.read(path), _tokenizer_beside(path)),
    ),
    _TF: (openai_tf.is_tf_folder, _openai),
    "a nanoGPT checkpoint": (
        lambda path: is_there(path / "ckpt.pt"),
        lambda path, _: _file(path / "ckpt.pt", None),
    ),
}


def _file(path: Path, step: int | str | None) -> Source:
    """A model whose file of weights was named."""
    if step is not None:
        raise FileNotFoundError(f"no checkpoint in {path}: no folder")
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no such file or folder: {path}")
    check_regular(path)
    if path.is_symlink() and not is_there(path.with_name("config.json")):
        path = path.resolve()  # what belongs to it lies there
    folder = path.parent
    if path.name.endswith(openai_tf.INDEX) and is_there(folder / openai_tf.HPARAMS):
        return _openai(folder, path)
    if llmc.is_llmc_file(path):
        return _foreign(path, *llmc.read(path), _tokenizer_beside(folder))
    suffix = path.suffix.lower()
    if path.name.endswith(hf.INDEX) or suffix == SUFFIX or is_safetensors(path):
        return _weights(path)
    if not is_torch_file(path) and suffix not in (".pt", ".pth"):
        raise ValueError(f"{path} is no model: expected {EXPECTED}")
    tree = read_torch_file(path)
    if not nanogpt.is_nanogpt(tree) and is_there(folder / "config.json"):
        return _weights(path)
    opened = nanogpt.from_tree(tree, path)
    tokenizer = _tokenizer_beside(folder, of_nanogpt=True)
    return _foreign(path, *opened, tokenizer)


def _weights(path: Path) -> Source:
    """A file of Hugging Face's, whose config is beside it."""
    folder = path.parent
    if not is_there(folder / "config.json"):
        raise FileNotFoundError(f"{path} has no config.json beside it")
    return _foreign(folder, *hf.read(folder, path), _tokenizer_beside(folder))


def _run(path: Path, step: int | str | None) -> Source:
    folder = checkpoint.find_step(path, step)
    contract = checkpoint.read_contract(folder)

    def load(dtype: Any, shardings: Any) -> Params:
        if contract.base is None:
            shapes = abstract_params(contract.model)
            params = _restore(folder, contract, shapes, shardings)
        else:
            params = _load_adapted(folder, contract, shardings)
        return jax.tree.map(lambda x: x.astype(dtype), params)

    summary = {"step": contract.step, **contract.metrics}
    for name in ("steps", "batch_size", "block_size", "dtype", "optim"):
        if name in contract.run:
            summary[name] = contract.run[name]
    was_trained = bool(contract.run)  # and not converted from another format
    tokenizer = contract.tokenizer
    return Source(
        contract.model,
        as_trained(tokenizer) if was_trained else tokenizer,
        load,
        contract.step,
        summary=summary,
        n_rows=tokenizer.vocab_size if was_trained else None,
    )


def _restore(folder: Path, contract: Contract, shapes: Any, shardings: Any) -> Params:
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )
    return checkpoint.restore_params(folder, contract, abstract)


def _load_adapted(folder: Path, contract: Contract, shardings: Any) -> Params:
    """Of a checkpoint that holds adapters: those of its base, with them merged in."""
    assert contract.base is not None
    lora = LoraConfig.from_dict(contract.run["lora"])
    shapes = jax.eval_shape(
        lambda: init_adapters(lora, contract.model, jax.random.key(0))
    )
    place = jax.tree.leaves(shardings)[0]
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec())
    places = jax.tree.map(lambda _: place, shapes)
    adapters = _restore(folder, contract, shapes, places)
    what = f"checkpoint {folder} holds adapters of"
    base = load_base(contract.base, shardings, what, folder.parent.parent)
    return merged(base, adapters, lora)


def load_base(
    said: Mapping[str, Any],
    shardings: Any,
    what: str,
    workdir: Path,
    init_from: str = "",
) -> Params:
    """The parameters that adapters belong to, float32.

    Args:
      said: as of `checkpoint.Contract.base`.
      what: begins an error's text.
      workdir: of the adapters; where both were moved, the base is found from there.
      init_from: another place where the base may be.

    Raises:
      ValueError: when they are not there, or no longer what they were.
    """
    beside = str(workdir / said["beside"]) if said.get("beside") else ""
    why = ""
    for place in filter(None, dict.fromkeys([said["model"], beside, init_from])):
        try:
            source = open_model(place, step=said["step"])
        except (ValueError, OSError) as error:
            why = why or f": {error}"
            continue
        params = source.load(jnp.float32, shardings)
        if params_hash(params) == said["sha256"]:
            return params
        why = why or ", whose parameters are others now"
    raise ValueError(f"{what} {said['model']}{why}")


def _foreign(
    path: Path, cfg: GPT2Config, tensors: Mapping[str, Tensor], tokenizer: Tokenizer
) -> Source:
    tokenizer = _fitted(tokenizer, cfg, path)
    check_tensors(cfg, tensors, path)

    def load(dtype: Any, shardings: Any) -> Params:
        return load_params(cfg, tensors, dtype=dtype, shardings=shardings, where=path)

    folder = path if path.is_dir() else path.parent
    return Source(cfg, tokenizer, load, settings=hf.settings_in(folder))


def _tokenizer_beside(folder: Path, *, of_nanogpt: bool = False) -> Tokenizer:
    """The tokenizer in a folder; one that can't be read forbids text, not the model."""
    try:
        table = nanogpt.tokenizer_beside(folder / "ckpt.pt") if of_nanogpt else None
        return table or load_tokenizer(folder)
    except (ValueError, OSError, ImportError) as error:
        return NoTokenizer(0, None, one_line(error))


def _fitted(tokenizer: Tokenizer, cfg: GPT2Config, path: Path) -> Tokenizer:
    """The tokenizer as far as the model has rows for its ids."""
    rows = cfg.vocab_size
    if tokenizer.vocab_size > rows:
        n = tokenizer.vocab_size
        why = f"{path}: the tokenizer has {n} ids, the model only {rows}"
        try:
            if isinstance(tokenizer, GPT2Tokenizer):
                return tokenizer.within(rows)
        except ValueError as error:
            why = one_line(f"{path}: {error}")
        tokenizer = NoTokenizer(rows, None, why)
    if isinstance(tokenizer, NoTokenizer):
        ends = hf.end_ids_of(path if path.is_dir() else path.parent)
        ends = tuple(i for i in ends if i < rows)
        return NoTokenizer(rows, next(iter(ends), None), tokenizer.why, ends)
    return tokenizer
