"""The training loop: resume, step, log, evaluate, save."""

import contextlib
import ctypes
import dataclasses
import datetime
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from gpt2_jax.checkpoints import checkpoint
from gpt2_jax.checks import one_line
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
from gpt2_jax.formats.open_model import load_base
from gpt2_jax.layout import (
    Params,
    count_params,
    dtype_named,
    stack_layers,
    unstack_layers,
)
from gpt2_jax.lora import with_adapters
from gpt2_jax.model import GPT2, abstract_params
from gpt2_jax.runtime import distributed, sharding
from gpt2_jax.runtime.environment import environment
from gpt2_jax.runtime.files import user_path
from gpt2_jax.runtime.lock import Lock
from gpt2_jax.runtime.platform import on_cpu, on_gpu
from gpt2_jax.runtime.profiling import StepTrace
from gpt2_jax.runtime.xla_flags import step_options
from gpt2_jax.tokenizers.files import load_tokenizer, save_tokenizer, tokenizer_hash
from gpt2_jax.tokenizers.protocol import Tokenizer
from gpt2_jax.training import finetune, metrics, optim, plot
from gpt2_jax.training.batches import Ahead, in_order, spread
from gpt2_jax.training.config import BEGINNING, Position, TrainConfig, changes, plain
from gpt2_jax.training.evaluate import evaluate, make_eval_step
from gpt2_jax.training.optim import guard_counts
from gpt2_jax.training.records import append_record
from gpt2_jax.training.samples import check_sample, sample_text
from gpt2_jax.training.step import (
    TrainState,
    abstract_state,
    attention_of,
    init_state,
    stack_state,
    state_of,
    train_step,
)
from gpt2_jax.training.stop import StopSignals

T = TypeVar("T")


class DivergedError(ValueError):
    """Too many updates in a row were skipped."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    step: int
    val_loss: float | None  # of the last evaluation in this call
    best_step: int | None  # of the least validation loss, in this call or before
    signal: int | None  # the signal that ended it before its last step


def train(
    cfg: TrainConfig, workdir: str | Path, *, profiled: range = range(0)
) -> Result:
    """Trains up to `cfg.steps` updates, from the latest checkpoint in `workdir`.

    The run is a function of (cfg, data, seed): killed at any moment and called
    again, it ends in the same bits. From its first step on, SIGTERM, SIGHUP and
    Ctrl-C end it after the current step, with a checkpoint.

    Args:
      profiled: updates, counted from 0, of which process 0 writes a trace into the
        folder `profile` of `workdir`.

    Raises:
      ValueError, OSError: on bad input, with nothing of the run lost.
      DivergedError: when `optim.max_skipped` is exceeded.
    """
    workdir = user_path(workdir)
    if profiled and profiled.start >= cfg.steps:
        raise ValueError(
            f"profile_steps={profiled.start}:{profiled.stop} begins after "
            f"steps={cfg.steps}"
        )
    mesh = sharding.make_mesh(**dataclasses.asdict(cfg.mesh))
    for size in {size for _, size in cfg.batch_warmup} | {cfg.batch_size}:
        cfg.microbatches(size, mesh)
    begun = None
    if cfg.init_from:
        begun = checkpoint.latest_contract(workdir / "checkpoints")
    source = None
    if cfg.init_from and begun is None:
        source = distributed.first_alone(lambda: finetune.open_base(cfg.init_from))
    make_writable(workdir)
    distributed.check_shared(workdir)
    with distributed.first_alone(partial(_lock, workdir)) as lock:
        return _train(cfg, workdir, mesh, source, begun, lock, profiled)


def _lock(workdir: Path) -> contextlib.AbstractContextManager[Lock | None]:
    """What process 0 holds while a job trains: two in one folder mix their files."""
    if not distributed.is_first():
        return contextlib.nullcontext()
    return Lock(workdir / ".lock", f"training in {workdir}")


def _train(
    cfg: TrainConfig,
    workdir: Path,
    mesh: Mesh,
    source: finetune.Source | None,
    begun: checkpoint.Contract | None,
    lock: Lock | None,
    profiled: range,
) -> Result:
    """`train`, in a folder that is this job's alone."""
    folder = workdir / "checkpoints"
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    tokenizer, data = distributed.first_alone(lambda: open_data(cfg, workdir, source))
    check_splits(cfg, data)
    if source is not None:
        finetune.check_tokenizer(tokenizer, source.tokenizer)
    base = source.config if source else begun.model if begun else None
    model = make_model(cfg, tokenizer, mesh, base=base)
    check_sample(cfg.eval, tokenizer, model.cfg)
    optimizer = optim.make_optimizer(cfg.optim, cfg.steps)
    with StopSignals() as stop:
        resumed = resume(cfg, model, optimizer, mesh, tokenizer, folder)
        adapted: tuple[Params, Mapping[str, Any]] | None = None
        if resumed is not None:
            contract, state = resumed
            since = position(cfg, contract)
            if contract.base is not None:
                places = sharding.tree_shardings(abstract_params(model.cfg), mesh)
                params = load_base(
                    contract.base, places, f"{workdir} adapts", workdir, cfg.init_from
                )
                adapted = params, contract.base
        else:
            contract, since = None, BEGINNING
            if source is not None:
                _note_changes(cfg.init_from, source.config, model.cfg)
            if source is not None and cfg.adapters:
                adapted = finetune.adapted(
                    cfg.init_from, source, model, tokenizer, mesh, workdir
                )
            if source is not None and not cfg.adapters:
                params = finetune.load_params(
                    source, model.cfg, tokenizer, mesh, cfg.seed
                )
                state = state_of(params, model, optimizer, mesh)
            else:
                state = init_state(model, optimizer, mesh, cfg.seed, cfg.adapters)
        checkpoints = checkpoint.Checkpoints(folder, keep_last=cfg.checkpoint.keep_last)
        try:
            run = _Run(
                cfg, workdir, mesh, data, tokenizer, model, checkpoints, profiled
            )
            run.lock = lock
            if adapted is not None:
                run.adapt(*adapted)
            due = contract is None or contract.due
            if contract is not None:
                run.best = _best_of(workdir, contract)
            return run.loop(state, optimizer, stop, since, due=due)
        except BaseException as error:
            if distributed.is_lost_peer(error):
                checkpoints.give_up()
            raise
        finally:
            checkpoints.close()


def _note_changes(what: str, old: GPT2Config, new: GPT2Config) -> None:
    differ = changes(dataclasses.asdict(old), dataclasses.asdict(new))
    for name, (before, now) in differ.items():
        _note(f"{name} of {what} was {before} and is now {now}")


def open_data(
    cfg: TrainConfig, workdir: Path, source: finetune.Source | None = None
) -> tuple[Tokenizer, dict[str, Examples]]:
    """The tokenizer of a run, and the splits that it is trained and evaluated on.

    Text is prepared in the workdir. Nothing else is written there but the tokenizer of
    `source`, which is used unless the config names another.
    """
    data, kind = cfg.data, cfg.data.tokenizer
    vocab_size = data.vocab_size or None
    if not kind and cfg.init_from:
        kind, vocab_size = str(workdir / "tokenizer"), None
        if source is not None:
            save_tokenizer(source.tokenizer, workdir / "tokenizer")
    kind = kind or "sentencepiece"
    if data.kind == "sft":
        if kind in ("sentencepiece", "char"):
            raise ValueError(
                f"data.tokenizer={kind} is not trained on examples: give bytes, a "
                "path, or init_from"
            )
        tokenizer = examples_tokenizer(kind, vocab_size, workdir)
        splits, n_cut = sft_splits(
            run_examples(data.path, workdir),
            tokenizer,
            template=data.template,
            fractions=data.splits,
            block_size=cfg.block_size,
            seed=cfg.seed,
        )
        if n_cut:
            _note(f"{n_cut} examples of more than block_size + 1 tokens were cut")
        return tokenizer, dict(splits)
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
    splits_there = load_index(folders[0]).splits
    tokenizer = load_tokenizer(folders[0] / "tokenizer")
    found = {split: examples(split) for split in splits_there}
    for part in found["train"].parts if "train" in found else ():
        check_length(part, cfg.block_size)
    return tokenizer, dict(found)


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
    """The model of a run; layers are scanned on accelerators only.

    Args:
      base: what the run begins with, when that is another model.

    Raises:
      ValueError: when the vocabulary of the model can't hold the tokenizer's, its
        context no example, or the attention that is asked for can't run here.
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
    """Whether so many layers are trained by a scan.

    Written out, a program compiles in a time that grows with them, and one for GPUs
    saves a copy of what is kept for the gradient: of 124M a step takes 0.83 times as
    long there. But then XLA:GPU keeps what `remat` would have it compute again.
    """
    if on_cpu():
        return False
    return n_layer > 24 or remat != "none" or not on_gpu()


def model_config(
    cfg: TrainConfig, tokenizer: Tokenizer, base: GPT2Config | None
) -> GPT2Config:
    """As the config says; or that of `base`, resized and with the config's dropout."""
    asked = dict(cfg.model)
    if base is not None:
        ours = {k: v for k, v in asked.items() if k.endswith("_pdrop")}
        sizes = {k: asked[k] for k in ("vocab_size", "n_positions") if asked[k]}
        return dataclasses.replace(base, **ours, **sizes)
    asked["vocab_size"] = asked["vocab_size"] or tokenizer.vocab_size
    asked["n_positions"] = asked["n_positions"] or cfg.block_size
    return GPT2Config.from_dict(asked)


def resume(
    cfg: TrainConfig,
    model: GPT2,
    optimizer: optim.Optimizer,
    mesh: Mesh,
    tokenizer: Tokenizer,
    folder: Path,
) -> tuple[checkpoint.Contract, TrainState] | None:
    """The latest sound checkpoint in `folder`, None where there is none.

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
        _note(f"{name} was {old} and is now {new}")
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
    """Where the run of a checkpoint stands, whatever sizes its batches had."""
    if contract.examples is not None:
        return Position(contract.step, contract.examples)
    # Older ones don't say: their config was that of the run from its first step on.
    names = ("batch_size", "batch_warmup")
    sizes = {name: contract.run[name] for name in names if name in contract.run}
    saved = dataclasses.replace(cfg, **sizes)
    return Position(contract.step, saved.batch(contract.step).start)


def _note(text: str) -> None:
    if distributed.is_first():
        print(f"note: {one_line(text)}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Best:
    """The evaluation of least loss, and how many came since."""

    step: int
    val_loss: float
    since: int = 0

    @classmethod
    def after(cls, best: "Best | None", step: int, val_loss: float) -> "Best | None":
        """The best when one more has come; what is not finite is never better."""
        if math.isfinite(val_loss) and (best is None or val_loss < best.val_loss):
            return cls(step, val_loss)
        return best and dataclasses.replace(best, since=best.since + 1)


def _best_of(workdir: Path, contract: checkpoint.Contract) -> Best | None:
    """The best of a run up to a checkpoint.

    Older versions wrote down as such what is not finite; the best that was saved stands
    for it then.
    """
    if contract.best is not None:
        return Best(**contract.best)
    with contextlib.suppress(FileNotFoundError, checkpoint.DamagedCheckpointError):
        found = checkpoint.find_step(workdir, checkpoint.BEST)
        losses = checkpoint.read_contract(found).metrics
        return Best(int(found.name), losses[checkpoint.VAL_LOSS])
    return None


class _Stopped(Exception):
    """The run is to end, and an evaluation was given up for that."""


def _until(stop: StopSignals | None, batches: Iterable[T]) -> Iterator[T]:
    """The batches, as long as no signal comes; then raises _Stopped."""
    for batch in batches:
        if stop is not None and stop.requested():
            raise _Stopped
        yield batch


class _Run:
    """One call of `train`: what the loop reads, and the places where it writes."""

    def __init__(
        self,
        cfg: TrainConfig,
        workdir: Path,
        mesh: Mesh,
        data: Mapping[str, Examples],
        tokenizer: Tokenizer,
        model: GPT2,
        checkpoints: checkpoint.Checkpoints,
        profiled: range,
    ) -> None:
        self.cfg = cfg
        self.workdir = workdir
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.model = model
        self.checkpoints = checkpoints
        self.examples = data["train"]
        self.validation = data.get("validation")
        self.n_valid = tokenizer.vocab_size
        self.eval_step = make_eval_step(model, self.n_valid)
        self.writes = distributed.is_first()
        self.profiled = profiled
        self.lock: Lock | None = None
        self.val_loss: float | None = None
        self.best: Best | None = None
        self.base: Params | None = None  # what the params of a state are adapters of
        self.base_said: Mapping[str, Any] | None = None
        self._failed: set[str] = set()  # what was to show the run, and could not
        self._clock: float | None = None  # when the last step was seen to end
        self._began: tuple[int, float] | None = None  # the first, and when it ended

    def adapt(self, base: Params, said: Mapping[str, Any]) -> None:
        """Makes the run one of adapters of `base`, which has an entry a layer."""
        if self.model.scan_layers:
            places = sharding.tree_shardings(
                jax.eval_shape(stack_layers, base), self.mesh
            )
            base = jax.jit(stack_layers, out_shardings=places)(base)
        self.base, self.base_said = base, said

    def loop(
        self,
        state: TrainState,
        optimizer: optim.Optimizer,
        stop: StopSignals,
        since: Position,
        *,
        due: bool,
    ) -> Result:
        """Goes on to the last step, the end of `eval.patience`, or a signal.

        Args:
          since: where the state stands.
          due: whether the evaluation of that step is still to come.
        """
        cfg, start = self.cfg, since.step
        self._since, self._due = since, due
        self._skipped_in_row = int(guard_counts(state.opt_state)["skipped_in_row"])
        if start < cfg.steps:
            self.checkpoints.check_space(state)
        self._open(state, start)
        step_fn = jit_step(cfg, self.model, optimizer, state, self.mesh, self.n_valid)
        make = partial(global_batch, self.examples, cfg, self.mesh, since=since)
        self._batches = Ahead(make, range(start, cfg.steps))
        try:
            ended = self._finish(state, start, None) if due else self._exhausted
            pending = None  # the metrics of the step that the device is at
            for step in range(start, start if ended else cfg.steps):
                if self.lock is not None:
                    self.lock.check()
                batch = self._batches.get(step)
                traced = self._attempt("trace", partial(self._trace.step, step))
                with traced or contextlib.nullcontext():
                    state, fresh = step_fn(state, *batch, self.base)
                self._batches.begin(step + 1)
                if self._attempt("trace", partial(self._trace.end, step, fresh)):
                    self._say(f"step {step + 1}: trace in {self.workdir / 'profile'}")
                    self._clock = None  # writing it took time
                self._log(pending)
                pending = (step + 1, fresh)
                self.checkpoints.check()  # a save that failed ends the run at once
                if stop.requested() or cfg.saves(step + 1) or cfg.evaluates(step + 1):
                    self._log(pending)
                    pending = None
                    if self._finish(state, step + 1, stop):
                        break
                    self._clock = None  # this time was not the steps'
            self.checkpoints.wait()
            return self._close(int(state.step), stop.received)
        finally:
            self._attempt("trace", self._trace.close)
            self._batches.close()
            self._bar.close()
            if self._writer is not None:
                self._writer.close()

    def _finish(self, state: TrainState, step: int, stop: StopSignals | None) -> bool:
        """Saves and evaluates after a step, as far as that is due; whether it was last.

        The state is saved before the evaluation, and what this gives is added to the
        checkpoint. So no step is lost to what an evaluation runs into, a signal need
        not wait for it, and the run that goes on from there begins with it.

        Args:
          stop: None before the first step of a call, where signals end the program.
        """
        cfg, stopped = self.cfg, stop is not None and stop.received is not None
        self._due = cfg.evaluates(step)
        last = step == cfg.steps
        spoilt = self._skipped_in_row > 0  # perhaps by the last update that was made
        regular = cfg.saves(step) and not spoilt
        saved = regular or last or stopped
        if saved:
            self._save(state, interim=not regular or self._due)
        if self._due and not stopped:
            try:
                val_loss = self._evaluate(state, step, stop)
            except _Stopped:
                if not saved:
                    self._save(state, interim=True)
                return True
            except Exception:  # whatever it was, the steps before it are kept
                alone = jax.process_count() == 1  # others may not have met with it
                if alone and not saved and step > self._since.step:
                    self._save(state, interim=True)
                raise
            self._due = False
            last |= self._exhausted
            if val_loss is not None:
                kept = cfg.saves(step) or last or self._is_best_to_keep(step)
                regular = kept and math.isfinite(val_loss)
            if saved or last or regular:
                self._save(state, val_loss, interim=not regular)
        return stopped or last

    @property
    def _exhausted(self) -> bool:
        """Whether evaluations have not got better for too long."""
        patience = self.cfg.eval.patience
        return bool(patience and self.best and self.best.since >= patience)

    def _is_best_to_keep(self, step: int) -> bool:
        return bool(self.cfg.eval.patience and self.best and self.best.step == step)

    def _open(self, state: TrainState, start: int) -> None:
        """Opens the places where the run writes, and says what it begins with."""
        cfg, shape = self.cfg, self.mesh.shape
        if self.writes:
            (self.workdir / "config.json").write_text(
                json.dumps(plain(cfg), indent=1), encoding="utf-8"
            )
        n_params = n_trained = count_params(state.params)
        per_param = 6
        if self.base is not None:
            n_params += count_params(self.base)
            per_param = 4  # most have no gradient
        self._flops = metrics.flops_per_token(
            self.model.cfg, n_params, cfg.block_size, per_param=per_param
        )
        peak, source = metrics.peak_flops(self.model.dtype)
        self._peak = peak * self.mesh.size
        self._schedule = jax.jit(optim.schedule(cfg.optim, cfg.steps))
        self._schedule(start)  # compiles it, before steps are timed
        self._shown = {"loss": "-"}  # beside the bar
        # tokens, seconds and those waited for data, of the steps since the last record
        self._recent: list[tuple[int, float, float]] = []
        self._writer = distributed.first_alone(partial(self._make_writer, start))
        traced = self.workdir / "profile" if self.writes and self.profiled else None
        self._trace = StepTrace(traced, self.profiled)
        on_terminal = sys.stderr.isatty() and self.writes
        self._bar = tqdm(
            total=cfg.steps,
            initial=start,
            unit="step",
            disable=not on_terminal,
            dynamic_ncols=True,
        )
        devices = jax.devices()
        cut = cfg.microbatches(cfg.batch_size, self.mesh)
        rows = cfg.batch_size // cut
        attention = attention_of(self.model, rows, cfg.block_size, deterministic=False)
        self._say(
            f"{n_params:,} parameters, "
            + (f"{n_trained:,} of them trained, " if n_trained < n_params else "")
            + f"{len(self.examples):,} training tokens, "
            f"vocabulary {self.model.cfg.vocab_size} ({self.tokenizer.kind})"
        )
        self._say(
            f"{len(devices)} x {devices[0].device_kind}, mesh {dict(shape)}, "
            f"{cfg.dtype}, attention by {attention}; "
            f"{cfg.batch_size} x {cfg.block_size} tokens a step, microbatches {cut}"
        )
        self._say(
            f"MFU = tokens/s x ({per_param}N + 12LDT) / peak, peak "
            f"{self._peak / 1e12:.3g} TFLOP/s ({source})"
        )
        if start:
            self._say(f"resumed at step {start} of {cfg.steps} in {self.workdir}")
        if self.profiled and start >= self.profiled.stop:
            self._say("nothing to profile: the steps are done")
        if self.writes:
            self._note_start(
                step=start,
                model=dataclasses.asdict(self.model.cfg),
                mesh=dict(shape),
                attention=attention,
                microbatches=cut,
                parameters=n_params,
                trained=n_trained,
                training_tokens=len(self.examples),
                vocab_size=self.model.cfg.vocab_size,
                tokenizer=self.tokenizer.kind,
                flops_per_token=self._flops,
                flops_formula=f"{per_param}N + 12LDT",
                peak_flops=self._peak,
                peak_source=source,
            )

    def _make_writer(self, start: int) -> metrics.Writer | None:
        if not self.writes:
            return None
        project = self.cfg.wandb_project
        return metrics.Writer(
            self.workdir,
            start,
            due=self._due,
            wandb_project=project,
            config=plain(self.cfg),
        )

    def _note_start(self, **facts: Any) -> None:
        """Adds a line to environment.jsonl, which has one for each start of the run."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {"started": now, **environment(), **facts}
        append_record(self.workdir / "environment.jsonl", record)

    def _log(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Fetches the metrics of a step, which waits until it is done."""
        if pending is None:
            return
        step, arrays = pending
        values = {name: float(x) for name, x in jax.device_get(arrays).items()}
        now, waited = time.perf_counter(), self._batches.take_waited()
        if self._clock is not None:
            examples = self.cfg.batch(step - 1, self._since)
            tokens = len(examples) * self.cfg.block_size
            self._recent.append((tokens, now - self._clock, waited))
        self._clock = now
        if self._began is None:
            self._began = step, now
        self._check_skipped(step, values)
        self._bar.update(step - self._bar.n)
        self._show(loss=f"{values['loss']:.3f}")
        if step % self.cfg.log_every and step != self.cfg.steps:
            return
        updates = step - int(values["skipped"])
        values["learning_rate"] = float(self._schedule(max(updates - 1, 0)))
        if self._recent:
            tokens, seconds, waited = np.sum(self._recent, axis=0).tolist()
            rate = tokens / seconds
            values["step_seconds"] = seconds / len(self._recent)
            values["tokens_per_second"] = rate
            values["mfu"] = rate * self._flops / self._peak
            values["data_wait"] = waited / seconds
            self._recent.clear()
            self._show(**{"tokens/s": f"{rate:,.0f}", "MFU": f"{values['mfu']:.1%}"})
        kind, peak = metrics.memory_in_use()
        values[kind] = peak
        self._write(step, **values)
        if self._bar.disable:
            self._say(metrics.log_line(step, self.cfg.steps, values, self._left(step)))

    def _show(self, **texts: str) -> None:
        """Beside the bar, with what stands there."""
        self._shown |= texts
        self._bar.set_postfix(self._shown)

    def _left(self, step: int) -> str:
        """Time until the last step, as [H:]MM:SS, evaluations and saves included."""
        assert self._began is not None
        first, began = self._began
        if step in (first, self.cfg.steps):
            return ""
        each = (time.perf_counter() - began) / (step - first)
        return tqdm.format_interval(each * (self.cfg.steps - step))

    def _check_skipped(self, step: int, values: dict[str, float]) -> None:
        in_row, most = int(values["skipped_in_row"]), self.cfg.optim.max_skipped
        self._skipped_in_row = in_row
        if not in_row:
            return
        what = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
        self._say(f"step {step}: the update was skipped ({what}), {in_row} in a row")
        if in_row > most:
            self.checkpoints.wait()
            saved = self.checkpoints.latest_step()
            raise DivergedError(
                f"step {step}: {in_row} updates in a row were skipped ({what}), more "
                f"than optim.max_skipped={most}; the last checkpoint is of step {saved}"
            )

    def _evaluate(
        self, state: TrainState, step: int, stop: StopSignals | None
    ) -> float | None:
        """Validation loss over the same batches each time, and a sample if asked.

        Raises:
          _Stopped: when a signal came.
        """
        cfg = self.cfg
        val_loss: float | None = None
        params = optim.averaged_params(state.opt_state) or state.params
        if self.base is not None:
            params = with_adapters(self.base, params, self.cfg.lora)
        if self.validation is not None:
            cut = cfg.microbatches(cfg.batch_size, self.mesh)
            batch_size = cfg.batch_size // cut
            examples = self.validation.evaluation(cfg.eval.examples or None)
            batches = in_order(examples, batch_size, cfg.block_size, self.mesh)
            result = evaluate(params, _until(stop, batches), step=self.eval_step)
            val_loss = result.loss
            self.best = Best.after(self.best, step, val_loss)
            self._show(val=f"{result.loss:.3f}")
            self._write(step, val_loss=result.loss)
            self._say(
                f"step {step}/{cfg.steps}: validation loss {result.loss:.4f}, "
                f"perplexity {result.perplexity:.2f} ({result.tokens:,} tokens)"
            )
        if stop is not None and stop.requested():
            raise _Stopped
        self.val_loss = val_loss
        if cfg.eval.sample_tokens:
            self._attempt("sample", partial(self._sample, params, step))
        return val_loss

    def _attempt(self, what: str, report: Callable[[], T]) -> T | None:
        """Does what only shows the run: where it fails, that is said once, no more."""
        try:
            return report()
        except Exception as error:  # of any library; none of them is worth the run
            if distributed.is_lost_peer(error):
                raise
            if what not in self._failed:
                self._failed.add(what)
                _note(f"the run goes on without its {what}: {one_line(error)}")
            return None

    def _sample(self, params: Params, step: int) -> None:
        model = self.model
        mesh: Mesh | None = self.mesh
        if jax.process_count() > 1:
            params = sharding.local_copy(params, self.mesh)
            if not self.writes:
                return
            model, mesh = model.clone(mesh=None), None  # one device
        text = sample_text(
            model,
            unstack_layers(params),
            self.tokenizer,
            self.cfg.eval,
            seed=self.cfg.seed,
            mesh=mesh,
        )
        if self._writer is not None:
            self._writer.write_text(step, "sample", text)
        self._say(f"--- sample at step {step}\n{text}\n---")

    def _save(
        self, state: TrainState, val_loss: float | None = None, *, interim: bool
    ) -> None:
        self.checkpoints.save(
            state,
            model=self.model.cfg,
            run=plain(self.cfg),
            tokenizer=self.tokenizer,
            val_loss=val_loss,
            base=self.base_said,
            best=None if self.best is None else dataclasses.asdict(self.best),
            examples=self._examples_seen(int(state.step)),
            due=self._due,
            interim=interim,
        )

    def _close(self, step: int, received: int | None) -> Result:
        self._bar.close()
        if (step == self.cfg.steps or self._exhausted) and not self._due:
            received = None  # it came too late to stop anything
        result = Result(
            step, self.val_loss, None if self.best is None else self.best.step, received
        )
        if not self.writes:
            return result
        curve = self.workdir / "loss.png"
        self._attempt("plot", partial(plot.draw_curves, [self.workdir], curve))
        if received is not None:
            name = signal.Signals(received).name
            print(
                f"{name}: stopped at step {step} of {self.cfg.steps}, checkpoint "
                f"saved. To resume: {shlex.join([sys.executable, *sys.argv])}"
            )
            return result
        if self.best is not None:
            print(
                f"least validation loss {self.best.val_loss:.4f}, at step "
                f"{self.best.step}"
            )
        if self._exhausted:
            print(f"stopped early: eval.patience={self.cfg.eval.patience}")
        print(f"done: step {step}, run in {self.workdir}, loss curve in {curve}")
        return result

    def _write(self, step: int, **values: float) -> None:
        if self._writer is not None:
            tokens = self._examples_seen(step) * self.cfg.block_size
            self._writer.write(step, tokens=tokens, **values)

    def _examples_seen(self, step: int) -> int:
        return self.cfg.batch(step, self._since).start

    def _say(self, text: str) -> None:
        if not self.writes:
            return
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)


def global_batch(
    source: Examples,
    cfg: TrainConfig,
    mesh: Mesh,
    step: int,
    since: Position = BEGINNING,
) -> tuple[jax.Array | None, ...]:
    """The batch of a step as `train_step` takes it: tokens, mask and segments.

    Tokens are int32 [A, B, T + 1], B spread over the mesh; example i of the batch is
    [i // B, i % B].
    """
    examples = np.array(cfg.batch(step, since))
    number_AB = examples.reshape(cfg.microbatches(len(examples), mesh), -1)
    return spread(source.train, number_AB, cfg.block_size, mesh)


def jit_step(
    cfg: TrainConfig,
    model: GPT2,
    optimizer: optim.Optimizer,
    state: TrainState,
    mesh: Mesh,
    n_valid: int,
) -> Any:
    """The train step, jitted: (state, *batch) -> (state, metrics); donates the state.

    Args:
      state: for its shardings, which stay what they are; abstract leaves will do.
      n_valid: the size of the vocabulary without its padding.
    """
    return jax.jit(
        partial(
            train_step,
            model=model,
            optimizer=optimizer,
            seed=cfg.seed,
            n_valid=n_valid,
            lora=cfg.adapters,
        ),
        donate_argnums=0,
        compiler_options=step_options(os.environ),
        out_shardings=(
            jax.tree.map(lambda x: x.sharding, state),
            sharding.replicated(mesh),
        ),
    )


def make_writable(workdir: Path) -> None:
    """Makes the folder and tries to write into it, before anything takes time."""
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".probe-{os.getpid()}"
    probe.touch()
    probe.unlink()


def keep_freed_memory() -> None:
    """Tells glibc to keep the memory of large temporaries instead of unmapping it.

    XLA on CPU allocates and frees its temporaries each step, and with the default
    thresholds it spends a quarter of a small model's step in page faults.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)
        mallopt(m_top_pad, 1 << 26)  # what threads' arenas go by instead
