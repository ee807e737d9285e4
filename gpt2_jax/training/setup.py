"""What a run begins with: fresh, resumed, from another model, or with adapters."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from gpt2_jax.checkpoints.checkpoint import Contract
from gpt2_jax.config import GPT2Config
from gpt2_jax.data.loader import Examples, TextExamples, check_length
from gpt2_jax.data.prepare import load_index
from gpt2_jax.data.run_data import (
    examples_tokenizer,
    prepared_folder,
    run_examples,
    run_folders,
)
from gpt2_jax.data.sft import sft_splits
from gpt2_jax.formats.open_model import Source, load_base
from gpt2_jax.layout import dtype_named, stack_layers
from gpt2_jax.model import GPT2, abstract_params
from gpt2_jax.runtime import distributed, sharding
from gpt2_jax.runtime.notes import note_once
from gpt2_jax.runtime.platform import on_cpu, on_gpu
from gpt2_jax.tokenizers.files import load_tokenizer, save_tokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer
from gpt2_jax.training import finetune
from gpt2_jax.training.config import BEGINNING, Position, TrainConfig, changes
from gpt2_jax.training.early_stopping import Best
from gpt2_jax.training.finetune import AdapterBase
from gpt2_jax.training.optim import Optimizer, make_optimizer
from gpt2_jax.training.resume import best_before, position, resume
from gpt2_jax.training.samples import check_sample
from gpt2_jax.training.step import TrainState, attention_of, init_state, state_of


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a call of `train` begins with."""

    cfg: TrainConfig
    workdir: Path
    mesh: Mesh
    tokenizer: Tokenizer
    examples: Examples  # to train on
    validation: Examples | None
    model: GPT2
    optimizer: Optimizer
    state: TrainState  # the first step donates it
    base: AdapterBase | None  # None where all parameters are trained
    position: Position  # of the state, in updates and examples
    best: Best | None  # of the evaluations up to there
    due: bool  # whether the evaluation of that step is still to come


def set_up(
    cfg: TrainConfig,
    workdir: Path,
    mesh: Mesh,
    source: Source | None,
    begun: Contract | None,
) -> Setup:
    """Opens the data, builds the model, and restores or initializes the state.

    Args:
      source: the model whose weights a run begins with that has no checkpoint yet.
      begun: the contract of the latest checkpoint of a run that began with another
        model.
    """
    tokenizer, data = distributed.first_process_first(
        lambda: open_data(cfg, workdir, source)
    )
    check_splits(cfg, data)
    if source is not None:
        finetune.check_tokenizer(tokenizer, source.tokenizer)
    config = source.config if source else begun.model if begun else None
    model = make_model(cfg, tokenizer, mesh, base=config)
    check_sample(cfg.eval, tokenizer, model.cfg)
    optimizer = make_optimizer(cfg.optim, cfg.steps)
    resumed = resume(cfg, model, optimizer, mesh, tokenizer, workdir / "checkpoints")
    if resumed is not None:
        contract, state = resumed
        at = position(cfg, contract)
        base = _restore_base(cfg, workdir, mesh, model, contract)
        best, due = best_before(workdir, contract), contract.due
    else:
        state, base = _begin(cfg, workdir, mesh, source, tokenizer, model, optimizer)
        at, best, due = BEGINNING, None, True
    if base is not None and model.scan_layers:
        base = _stacked(base, mesh)
    return Setup(
        cfg=cfg,
        workdir=workdir,
        mesh=mesh,
        tokenizer=tokenizer,
        examples=data["train"],
        validation=data.get("validation"),
        model=model,
        optimizer=optimizer,
        state=state,
        base=base,
        position=at,
        best=best,
        due=due,
    )


def _restore_base(
    cfg: TrainConfig, workdir: Path, mesh: Mesh, model: GPT2, contract: Contract
) -> AdapterBase | None:
    """Loads the model that the adapters of a checkpoint belong to."""
    if contract.base is None:
        return None
    shardings = sharding.tree_shardings(abstract_params(model.cfg), mesh)
    params = load_base(
        contract.base, shardings, f"{workdir} adapts", workdir, cfg.init_from
    )
    return AdapterBase(params, contract.base)


def _begin(
    cfg: TrainConfig,
    workdir: Path,
    mesh: Mesh,
    source: Source | None,
    tokenizer: Tokenizer,
    model: GPT2,
    optimizer: Optimizer,
) -> tuple[TrainState, AdapterBase | None]:
    """The state of a run before its first step, and what its adapters belong to."""
    if source is None:
        return init_state(model, optimizer, mesh, cfg.seed, cfg.adapters), None
    _note_changes(cfg.init_from, source.config, model.cfg)
    if cfg.adapters:
        base = finetune.adapter_base(
            cfg.init_from, source, model, tokenizer, mesh, workdir
        )
        return init_state(model, optimizer, mesh, cfg.seed, cfg.adapters), base
    params = finetune.load_params(source, model.cfg, tokenizer, mesh, cfg.seed)
    return state_of(params, model, optimizer, mesh), None


def _note_changes(init_from: str, old: GPT2Config, new: GPT2Config) -> None:
    differ = changes(dataclasses.asdict(old), dataclasses.asdict(new))
    for name, (before, now) in differ.items():
        note_once(f"{name} of {init_from} was {before} and is now {now}")


def _stacked(base: AdapterBase, mesh: Mesh) -> AdapterBase:
    """The same base for a model that scans its layers."""
    abstract = jax.eval_shape(stack_layers, base.params)
    stack = jax.jit(stack_layers, out_shardings=sharding.tree_shardings(abstract, mesh))
    return dataclasses.replace(base, params=stack(base.params))


def open_data(
    cfg: TrainConfig, workdir: Path, source: Source | None = None
) -> tuple[Tokenizer, dict[str, Examples]]:
    """The tokenizer of a run, and the splits that it is trained and evaluated on.

    Text is prepared in the workdir. The only other thing that is written there is the
    tokenizer of `source`, which is used unless the config names another.
    """
    kind, vocab_size = cfg.data.tokenizer, cfg.data.vocab_size or None
    if not kind and cfg.init_from:
        kind, vocab_size = str(workdir / "tokenizer"), None
        if source is not None:
            save_tokenizer(source.tokenizer, workdir / "tokenizer")
    kind = kind or "sentencepiece"
    if cfg.data.kind == "sft":
        return _open_sft(cfg, workdir, kind, vocab_size)
    return _open_text(cfg, workdir, kind, vocab_size)


def _open_sft(
    cfg: TrainConfig, workdir: Path, kind: str, vocab_size: int | None
) -> tuple[Tokenizer, dict[str, Examples]]:
    if kind in ("sentencepiece", "char"):
        raise ValueError(
            f"data.tokenizer={kind} is not trained on examples: give bytes, a "
            "path, or init_from"
        )
    tokenizer = examples_tokenizer(kind, vocab_size, workdir)
    splits, n_cut = sft_splits(
        run_examples(cfg.data.path, workdir),
        tokenizer,
        template=cfg.data.template,
        fractions=cfg.data.splits,
        block_size=cfg.block_size,
        seed=cfg.seed,
    )
    if n_cut:
        note_once(f"{n_cut} examples of more than block_size + 1 tokens were cut")
    return tokenizer, dict(splits)


def _open_text(
    cfg: TrainConfig, workdir: Path, kind: str, vocab_size: int | None
) -> tuple[Tokenizer, dict[str, Examples]]:
    data = cfg.data
    folders = run_folders(dataclasses.asdict(data), workdir, keep=True) or [
        prepared_folder(
            data.path or None,
            workdir / "data",
            tokenizer=kind,
            vocab_size=vocab_size,
            splits=data.splits,
        )
    ]
    examples = partial(
        TextExamples,
        folders,
        block_size=cfg.block_size,
        seed=cfg.seed,
        weights=[weight for _, weight in data.mixture],
        packing=data.packing,
    )
    names = load_index(folders[0]).splits
    tokenizer = load_tokenizer(folders[0] / "tokenizer")
    splits = {name: examples(name) for name in names}
    for part in splits["train"].parts if "train" in splits else ():
        check_length(part, cfg.block_size)
    return tokenizer, dict(splits)


def check_splits(cfg: TrainConfig, data: Mapping[str, Examples]) -> None:
    """Raises ValueError where training or an evaluation would have no example."""
    if "train" not in data:
        raise ValueError(f"the data have no train split, only {', '.join(data)}")
    if "validation" in data:
        data["validation"].evaluation(cfg.eval.examples or None)
    elif cfg.eval.patience:
        raise ValueError(f"eval.patience={cfg.eval.patience} needs a validation split")


def make_model(
    cfg: TrainConfig,
    tokenizer: Tokenizer,
    mesh: Mesh | None = None,
    *,
    base: GPT2Config | None = None,
) -> GPT2:
    """Builds the model of a run.

    Args:
      base: the config of the model whose weights the run begins with, if there is one.

    Raises:
      ValueError: when the model's vocabulary is smaller than the tokenizer's, its
        context shorter than an example, or its attention backend can't run here.
    """
    config = model_config(cfg, tokenizer, base)
    if config.vocab_size < tokenizer.vocab_size:
        advice = "" if cfg.model["vocab_size"] else ": model.vocab_size adds rows"
        raise ValueError(
            f"model.vocab_size={config.vocab_size} is less than the tokenizer's "
            f"vocab_size={tokenizer.vocab_size}{advice}"
        )
    if config.n_positions < cfg.block_size:
        raise ValueError(
            f"block_size={cfg.block_size} exceeds n_positions={config.n_positions} of "
            f"{cfg.init_from}: model.n_positions extends them"
        )
    model = GPT2(
        config,
        dtype=dtype_named(cfg.dtype),
        scan_layers=scans_layers(config.n_layer, cfg.remat),
        remat=cfg.remat,
        attention=cfg.attention,
        mesh=mesh,
        lora_pdrop=cfg.lora.dropout if cfg.adapters else 0.0,
    )
    if cfg.adapters:
        cfg.adapters.check_fits(config)
    rows = cfg.batch_size
    if mesh is not None:
        rows //= cfg.microbatches(rows, mesh)
    attention_of(model, rows, cfg.block_size, deterministic=False)
    return model


def scans_layers(n_layer: int, remat: str) -> bool:
    """Whether training scans over the layers.

    Without a scan, compile time grows with the number of layers. On GPUs that avoids a
    copy of what is kept for the gradient: a step of 124M takes 0.83 times as long. But
    XLA:GPU then keeps the activations that `remat` would have it compute again.
    """
    if on_cpu():
        return False
    return n_layer > 24 or remat != "none" or not on_gpu()


def model_config(
    cfg: TrainConfig, tokenizer: Tokenizer, base: GPT2Config | None
) -> GPT2Config:
    """The config's model; or `base`, resized and with the dropout of the config."""
    values = dict(cfg.model)
    if base is not None:
        dropout = {k: v for k, v in values.items() if k.endswith("_pdrop")}
        sizes = {k: values[k] for k in ("vocab_size", "n_positions") if values[k]}
        return dataclasses.replace(base, **dropout, **sizes)
    values["vocab_size"] = values["vocab_size"] or tokenizer.vocab_size
    values["n_positions"] = values["n_positions"] or cfg.block_size
    return GPT2Config.from_dict(values)
