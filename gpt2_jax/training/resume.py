"""Resuming a run: its latest checkpoint, checked against the config of today."""

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from gpt2_jax.checkpoints import checkpoint
from gpt2_jax.model import GPT2
from gpt2_jax.runtime.notes import note_once
from gpt2_jax.tokenizers.files import tokenizer_hash
from gpt2_jax.tokenizers.protocol import Tokenizer
from gpt2_jax.training import optim
from gpt2_jax.training.config import Position, TrainConfig, changes, plain
from gpt2_jax.training.early_stopping import Best
from gpt2_jax.training.optim import Optimizer
from gpt2_jax.training.step import TrainState, abstract_state, stack_state


def resume(
    cfg: TrainConfig,
    model: GPT2,
    optimizer: Optimizer,
    mesh: Mesh,
    tokenizer: Tokenizer,
    folder: Path,
) -> tuple[checkpoint.Contract, TrainState] | None:
    """Restores the latest sound checkpoint in `folder`, None where there is none.

    A damaged one is named on stderr and set aside, and the one before is taken.

    Raises:
      DamagedCheckpointError: when each of them is damaged.
      ValueError: when it is of another model or tokenizer, or has gone further.
    """

    def abstract() -> dict[str, Any]:
        unstacked = model.clone(scan_layers=False)
        state = abstract_state(unstacked, optimizer, mesh, cfg.adapters)
        return checkpoint.as_tree(state)

    check = partial(_check_contract, cfg, model, tokenizer)
    found = checkpoint.latest_sound(folder, abstract, check)
    if found is None:
        return None
    contract, tree = found
    for name, (old, new) in changes(contract.run, plain(cfg)).items():
        note_once(f"{name} was {old} and is now {new}")
    state = TrainState(**tree)
    if model.scan_layers:
        state = stack_state(state, model, optimizer, mesh, cfg.adapters)
    return contract, state


def _check_contract(
    cfg: TrainConfig,
    model: GPT2,
    tokenizer: Tokenizer,
    folder: Path,
    contract: checkpoint.Contract,
) -> None:
    """Raises ValueError when a checkpoint is not one of this run."""
    contract.check_is_of_a_run(folder)
    ours, theirs = dataclasses.asdict(model.cfg), dataclasses.asdict(contract.model)
    for name, value in theirs.items():
        if ours[name] != value:
            raise ValueError(
                f"checkpoint {folder} has model.{name}={value}, the config "
                f"{ours[name]}: choose another workdir or the same model"
            )
    if tokenizer_hash(tokenizer) != tokenizer_hash(contract.tokenizer):
        raise ValueError(
            f"checkpoint {folder} has another tokenizer than the data: choose another "
            "workdir or the same data"
        )
    optim.check_same_state(cfg.optim, contract.run["optim"])
    ours, theirs = plain(cfg)["lora"], contract.run.get("lora", {"rank": 0})
    for name in ("rank", "alpha", "kernels") if ours["rank"] else ("rank",):
        if ours[name] != theirs.get(name):
            raise ValueError(
                f"checkpoint {folder} has lora.{name}={theirs.get(name)}, the config "
                f"{ours[name]}: choose another workdir or the same adapters"
            )
    saved_size = contract.run.get("block_size", cfg.block_size)
    if saved_size != cfg.block_size:
        raise ValueError(
            f"checkpoint {folder} has block_size={saved_size}, the config "
            f"{cfg.block_size}: a run counts its data in examples of that size; "
            "init_from begins another run with these weights"
        )
    if contract.step > cfg.steps:
        raise ValueError(f"checkpoint {folder} is past steps={cfg.steps}")


def position(cfg: TrainConfig, contract: checkpoint.Contract) -> Position:
    """The position of a checkpoint in the data, whatever sizes its batches had."""
    if contract.examples is not None:
        return Position(contract.step, contract.examples)
    # Older checkpoints lack it: their config was the run's from its first step on.
    names = ("batch_size", "batch_warmup")
    sizes = {name: contract.run[name] for name in names if name in contract.run}
    saved = dataclasses.replace(cfg, **sizes)
    return Position(contract.step, saved.batch(contract.step).start)


def best_before(workdir: Path, contract: checkpoint.Contract) -> Best | None:
    """The best evaluation of a run up to a checkpoint.

    Older checkpoints lack it where a loss was not finite; the best of those that were
    saved takes its place.
    """
    if contract.best is not None:
        return Best(**contract.best)
    with contextlib.suppress(FileNotFoundError, checkpoint.DamagedCheckpointError):
        found = checkpoint.find_step(workdir, checkpoint.BEST)
        losses = checkpoint.read_contract(found).metrics
        return Best(int(found.name), losses[checkpoint.VAL_LOSS])
    return None
