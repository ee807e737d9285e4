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

EXPECTED_MODELS = (
    "a run's folder, a Hugging Face folder or hub name, an OpenAI checkpoint folder, a "
    "nanoGPT ckpt.pt, an llm.c .bin, or a file of weights with config.json beside it"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that has been opened, with none of its numbers read yet.

    Attributes:
      load: (dtype, tree of shardings) -> parameters, read one tensor at a time.
      step: the step of a run's checkpoint; None for other formats.
      summary: facts of the training, as far as they are known.
      n_rows: the number of rows of the embedding that took part in the training; the
        others are padding, which another program could sample.
      settings: name -> content of the files in a Hugging Face folder that hold more
        about tokens and generation than is used here.
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
    """Opens the model at a path or on the hub; arguments and errors as in `lm.load`.

    The contents of a folder decide its format, so folders of other programs may lie
    beside a model's files. A folder that holds two models is refused.
    """
    if revision is not None:
        check_text("revision", revision)
    if not isinstance(step, str | None):
        step = integer("step", step)
    path = user_path(model)
    if not path.exists() and openai_tf.index_of(path):
        return _open_tf_checkpoint(path.parent, openai_tf.index_of(path))
    if not os.path.lexists(path) and step is None and hf.is_hub_name(str(model)):
        path = hf.download(str(model), revision)
    if not path.is_dir():
        return _open_file(path, step)
    kinds = {name: opens for name, (holds, opens) in _FOLDERS.items() if holds(path)}
    if step is not None:  # the other formats have no steps
        kinds = {name: kinds[name] for name in (_RUN, _TF) if name in kinds}
    if len(kinds) > 1:
        raise ValueError(
            f"{path} holds {' and '.join(kinds)}: name a file in it, or a step's folder"
        )
    for opens in kinds.values():
        return opens(path, step)
    if step is not None or any((path / part).exists() for part in _PARTS_OF_A_RUN):
        return _open_run(path, step)  # raises an error that names what is missing
    raise FileNotFoundError(f"{path} holds no model: expected {EXPECTED_MODELS}")


_RUN, _TF = "a run's checkpoints", "an OpenAI checkpoint"
_PARTS_OF_A_RUN = ("checkpoints", "metrics.jsonl", "meta")


def _is_run(folder: Path) -> bool:
    """Whether the folder holds steps of a run, or is one."""
    steps = folder / "checkpoints"
    if steps.is_dir() and any(p.name.isdecimal() for p in steps.iterdir()):
        return True
    return all((folder / part).is_dir() for part in ("meta", "tokenizer"))


def _open_tf_checkpoint(folder: Path, step: int | str | Path | None) -> Source:
    return _build_source(
        folder, *openai_tf.read(folder, step), _tokenizer_beside(folder)
    )


# The models that a folder may hold: name -> (whether it does, how to open it).
_FOLDERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, Any], Source]]] = {
    _RUN: (_is_run, lambda path, step: _open_run(path, step)),
    "a Hugging Face model": (
        hf.is_hf_folder,
        lambda path, _: _build_source(path, *hf.read(path), _tokenizer_beside(path)),
    ),
    _TF: (openai_tf.is_tf_folder, _open_tf_checkpoint),
    "a nanoGPT checkpoint": (
        lambda path: is_there(path / "ckpt.pt"),
        lambda path, _: _open_file(path / "ckpt.pt", None),
    ),
}


def _open_file(path: Path, step: int | str | None) -> Source:
    """Opens a model by the path of its file of weights."""
    if step is not None:
        raise FileNotFoundError(f"no checkpoint in {path}: no folder")
    if not os.path.lexists(path):
        raise FileNotFoundError(f"no such file or folder: {path}")
    check_regular(path)
    if path.is_symlink() and not is_there(path.with_name("config.json")):
        path = path.resolve()  # config and tokenizer lie beside the target
    folder = path.parent
    if path.name.endswith(openai_tf.INDEX) and is_there(folder / openai_tf.HPARAMS):
        return _open_tf_checkpoint(folder, path)
    if llmc.is_llmc_file(path):
        return _build_source(path, *llmc.read(path), _tokenizer_beside(folder))
    suffix = path.suffix.lower()
    if path.name.endswith(hf.INDEX) or suffix == SUFFIX or is_safetensors(path):
        return _open_hf_weights(path)
    if not is_torch_file(path) and suffix not in (".pt", ".pth"):
        raise ValueError(f"{path} is no model: expected {EXPECTED_MODELS}")
    tree = read_torch_file(path)
    if not nanogpt.is_nanogpt(tree) and is_there(folder / "config.json"):
        return _open_hf_weights(path)
    opened = nanogpt.from_tree(tree, path)
    tokenizer = _tokenizer_beside(folder, of_nanogpt=True)
    return _build_source(path, *opened, tokenizer)


def _open_hf_weights(path: Path) -> Source:
    """Opens a file of weights by Hugging Face, with config.json beside it."""
    folder = path.parent
    if not is_there(folder / "config.json"):
        raise FileNotFoundError(f"{path} has no config.json beside it")
    return _build_source(folder, *hf.read(folder, path), _tokenizer_beside(folder))


def _open_run(path: Path, step: int | str | None) -> Source:
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
    """The parameters of a checkpoint of adapters: its base, with them merged in."""
    assert contract.base is not None
    lora = LoraConfig.from_dict(contract.run["lora"])
    shapes = jax.eval_shape(
        lambda: init_adapters(lora, contract.model, jax.random.key(0))
    )
    sharding = jax.tree.leaves(shardings)[0]
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    replicated = jax.tree.map(lambda _: sharding, shapes)
    adapters = _restore(folder, contract, shapes, replicated)
    what = f"checkpoint {folder} holds adapters of"
    base = load_base(contract.base, shardings, what, folder.parent.parent)
    return merged(base, adapters, lora)


def load_base(
    base: Mapping[str, Any],
    shardings: Any,
    what: str,
    workdir: Path,
    init_from: str = "",
) -> Params:
    """Loads the parameters that adapters were trained on, in float32.

    Args:
      base: the base in the adapters' contract, `checkpoint.Contract.base`.
      shardings: tree of the parameters' shardings.
      what: the beginning of an error message.
      workdir: the folder of the adapters' run; when it was moved together with the
        base, the base is found relative to it.
      init_from: another place where the base may be.

    Raises:
      ValueError: when the base is missing, or its parameters have changed.
    """
    beside = str(workdir / base["beside"]) if base.get("beside") else ""
    why = ""
    for place in filter(None, dict.fromkeys([base["model"], beside, init_from])):
        try:
            source = open_model(place, step=base["step"])
        except (ValueError, OSError) as error:
            why = why or f": {error}"
            continue
        params = source.load(jnp.float32, shardings)
        if params_hash(params) == base["sha256"]:
            return params
        why = why or ", whose parameters are others now"
    raise ValueError(f"{what} {base['model']}{why}")


def _build_source(
    path: Path, cfg: GPT2Config, tensors: Mapping[str, Tensor], tokenizer: Tokenizer
) -> Source:
    """Returns the source of another program's model, with its tensors checked."""
    tokenizer = _fit_tokenizer(tokenizer, cfg, path)
    check_tensors(cfg, tensors, path)

    def load(dtype: Any, shardings: Any) -> Params:
        return load_params(cfg, tensors, dtype=dtype, shardings=shardings, where=path)

    folder = path if path.is_dir() else path.parent
    return Source(cfg, tokenizer, load, settings=hf.settings_in(folder))


def _tokenizer_beside(folder: Path, *, of_nanogpt: bool = False) -> Tokenizer:
    """Loads the tokenizer in a folder; without one, the model takes token ids only."""
    try:
        table = nanogpt.tokenizer_beside(folder / "ckpt.pt") if of_nanogpt else None
        return table or load_tokenizer(folder)
    except (ValueError, OSError, ImportError) as error:
        return NoTokenizer(0, None, one_line(error))


def _fit_tokenizer(tokenizer: Tokenizer, cfg: GPT2Config, path: Path) -> Tokenizer:
    """Returns the tokenizer without the ids for which the model has no rows."""
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
