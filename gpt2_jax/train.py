"""The training loop: resume, step, log, evaluate, save."""

import ctypes
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from gpt2_jax import checkpoint, metrics, optim, sharding
from gpt2_jax.attention import check_attention
from gpt2_jax.config import GPT2Config
from gpt2_jax.data.loader import TokenDataset, eval_batches, train_batch
from gpt2_jax.data.prepare import prepared_folder
from gpt2_jax.evaluate import check_batch, evaluate, make_eval_step
from gpt2_jax.generate import generate
from gpt2_jax.model import (
    GPT2,
    attention_of,
    count_params,
    dtype_named,
    remat_policy,
)
from gpt2_jax.options import Options
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer, tokenizer_hash
from gpt2_jax.train_step import TrainState, abstract_state, init_state, train_step


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text is from; see configs/default.py for each field."""

    path: str
    tokenizer: str
    vocab_size: int
    splits: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int
    batches: int
    sample_tokens: int
    sample_prompt: str


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int
    keep_last: int


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run. Defaults and the meaning of each key: configs/default.py.

    Raises:
      ValueError: on an impossible value, naming it.
    """

    seed: int
    steps: int
    batch_size: int
    block_size: int
    accumulation: int
    dtype: str
    attention: str
    remat: str
    log_every: int
    model: Mapping[str, Any]  # GPT2Config's fields; vocab_size 0: the tokenizer's
    data: DataConfig
    optim: optim.OptimConfig
    mesh: MeshConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig

    def __post_init__(self) -> None:
        at_least_1 = ("steps", "batch_size", "block_size", "accumulation", "log_every")
        for name, value in [
            *((name, getattr(self, name)) for name in at_least_1),
            ("eval.every", self.eval.every),
            ("checkpoint.every", self.checkpoint.every),
            ("checkpoint.keep_last", self.checkpoint.keep_last),
        ]:
            if value < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        for name, value in [
            ("seed", self.seed),
            ("eval.batches", self.eval.batches),
            ("eval.sample_tokens", self.eval.sample_tokens),
        ]:
            if value < 0:
                raise ValueError(f"{name}={value} must be >= 0")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} does not divide by "
                f"accumulation={self.accumulation}"
            )
        if self.block_size > self.model["n_positions"]:
            raise ValueError(
                f"block_size={self.block_size} exceeds "
                f"model.n_positions={self.model['n_positions']}"
            )
        dtype_named(self.dtype)
        check_attention(self.attention)
        remat_policy(self.remat)
        optim.schedule(self.optim, self.steps)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Of nested plain data, as a config file gives it."""
        sections = {
            "data": DataConfig,
            "optim": optim.OptimConfig,
            "mesh": MeshConfig,
            "eval": EvalConfig,
            "checkpoint": CheckpointConfig,
        }
        return cls(
            **{k: sections[k](**v) if k in sections else v for k, v in values.items()}
        )

    @property
    def microbatch(self) -> int:
        return self.batch_size // self.accumulation


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    step: int
    val_loss: float | None  # of the last evaluation in this call
    signal: int | None  # the signal that ended it before its last step


def train(cfg: TrainConfig, workdir: str | Path) -> Result:
    """Trains up to `cfg.steps` updates, from the latest checkpoint in `workdir`.

    The run is a function of (cfg, data, seed): killed at any moment and called
    again, it ends in the same bits. SIGTERM and Ctrl-C end it after the current
    step, with a checkpoint.

    Raises:
      ValueError, OSError: on bad input, with nothing of the run lost.
    """
    workdir = Path(workdir)
    mesh = sharding.make_mesh(**dataclasses.asdict(cfg.mesh))
    check_batch(cfg.microbatch, mesh)
    make_writable(workdir)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    data_folder = prepared_folder(
        cfg.data.path or None,
        workdir / "data",
        tokenizer=cfg.data.tokenizer,
        vocab_size=cfg.data.vocab_size or None,
        splits=cfg.data.splits,
    )
    tokenizer = load_tokenizer(data_folder / "tokenizer")
    model = make_model(cfg, tokenizer, mesh)
    optimizer = optim.make_optimizer(cfg.optim, cfg.steps)
    checkpoints = checkpoint.Checkpoints(
        workdir / "checkpoints", keep_last=cfg.checkpoint.keep_last
    )
    with StopSignals() as stop:
        try:
            state = resume(cfg, model, optimizer, mesh, tokenizer, checkpoints)
            if state is None:
                state = init_state(model, optimizer, mesh, cfg.seed)
            run = _Run(cfg, workdir, mesh, data_folder, tokenizer, model, checkpoints)
            return run.loop(state, optimizer, stop)
        finally:
            checkpoints.close()


def make_model(
    cfg: TrainConfig, tokenizer: Tokenizer, mesh: Mesh | None = None
) -> GPT2:
    """The model of a run; layers are scanned on accelerators only.

    Raises:
      ValueError: when the vocabulary of the model can't hold the tokenizer's, or the
        attention that is asked for can't run here.
    """
    vocab_size = cfg.model["vocab_size"] or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is less than the tokenizer's "
            f"vocab_size={tokenizer.vocab_size}"
        )
    config = GPT2Config.from_dict({**cfg.model, "vocab_size": vocab_size})
    model = GPT2(
        config,
        dtype=dtype_named(cfg.dtype),
        scan_layers=jax.default_backend() != "cpu",
        remat=cfg.remat,
        attention=cfg.attention,
        mesh=mesh,
    )
    attention_of(model, cfg.microbatch, cfg.block_size, deterministic=False)
    return model


def resume(
    cfg: TrainConfig,
    model: GPT2,
    optimizer: Any,
    mesh: Mesh,
    tokenizer: Tokenizer,
    checkpoints: checkpoint.Checkpoints,
) -> TrainState | None:
    """The state of the latest checkpoint, or None where there is none.

    Raises:
      ValueError: when it is of another model or tokenizer, or has gone further.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    folder = checkpoints.folder / str(step)
    contract = checkpoint.read_contract(folder)
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
    if step > cfg.steps:
        raise ValueError(f"checkpoint {folder} is past steps={cfg.steps}")
    abstract = abstract_state(model, optimizer, mesh)
    tree = checkpoint.restore(folder, checkpoint.as_tree(abstract))
    for name, (old, new) in changes(contract.run, plain(cfg)).items():
        print(f"note: {name} was {old} and is now {new}", file=sys.stderr)
    return TrainState(**tree)


class _Run:
    """One call of `train`: what the loop reads, and the places where it writes."""

    def __init__(
        self,
        cfg: TrainConfig,
        workdir: Path,
        mesh: Mesh,
        data_folder: Path,
        tokenizer: Tokenizer,
        model: GPT2,
        checkpoints: checkpoint.Checkpoints,
    ) -> None:
        self.cfg = cfg
        self.workdir = workdir
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.model = model
        self.checkpoints = checkpoints
        self.dataset = TokenDataset(data_folder, "train")
        self.data_folder = data_folder
        self.validation = (
            TokenDataset(data_folder, "validation")
            if "validation" in self.dataset.index.splits
            else None
        )
        self.eval_step = make_eval_step(model)
        self.val_loss: float | None = None
        self._clock: float | None = None  # when the last step was seen to end

    def loop(self, state: TrainState, optimizer: Any, stop: "StopSignals") -> Result:
        cfg = self.cfg
        start = int(state.step)
        self._open(state, start)
        step_fn = jax.jit(
            partial(train_step, model=self.model, optimizer=optimizer, seed=cfg.seed),
            donate_argnums=0,
        )
        try:
            if start == 0:
                self._evaluate(state, 0)
            pending = None  # the metrics of the step that the device is at
            for step in range(start, cfg.steps):
                tokens = global_batch(self.dataset, cfg, self.mesh, step)
                state, fresh = step_fn(state, tokens)
                self._log(pending)
                pending = (step + 1, fresh)
                last = step + 1 == cfg.steps or stop.received is not None
                evaluated = last or (step + 1) % cfg.eval.every == 0
                saved = last or (step + 1) % cfg.checkpoint.every == 0
                if evaluated or saved:
                    self._log(pending)
                    pending = None
                val_loss = None
                if evaluated and stop.received is None:
                    val_loss = self._evaluate(state, step + 1)
                if saved:
                    self._save(state, val_loss)
                if evaluated or saved:
                    self._clock = None  # this time was not the steps'
                if last:
                    break
            self.checkpoints.wait()
            return self._close(int(state.step), stop.received)
        finally:
            self._bar.close()
            self._writer.close()

    def _open(self, state: TrainState, start: int) -> None:
        cfg, shape = self.cfg, self.mesh.shape
        (self.workdir / "config.json").write_text(json.dumps(plain(cfg), indent=1))
        n_params = count_params(state.params)
        self._flops = metrics.flops_per_token(self.model.cfg, n_params, cfg.block_size)
        peak, source = metrics.peak_flops(self.model.dtype)
        self._peak = peak * self.mesh.size
        self._schedule = optim.schedule(cfg.optim, cfg.steps)
        self._recent: list[float] = []  # seconds of the steps since the last record
        self._writer = metrics.Writer(self.workdir, start)
        on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=cfg.steps,
            initial=start,
            unit="step",
            disable=not on_terminal,
            dynamic_ncols=True,
        )
        devices = jax.devices()
        attention = attention_of(
            self.model, cfg.microbatch, cfg.block_size, deterministic=False
        )
        self._say(
            f"{n_params:,} parameters, {len(self.dataset):,} training tokens, "
            f"vocabulary {self.model.cfg.vocab_size} ({self.tokenizer.kind})"
        )
        self._say(
            f"{len(devices)} x {devices[0].device_kind}, mesh {dict(shape)}, "
            f"{cfg.dtype}, attention by {attention}; "
            f"{cfg.batch_size} x {cfg.block_size} tokens a step"
        )
        self._say(
            f"MFU = tokens/s x (6N + 12LDT) / peak, peak {self._peak / 1e12:.3g} "
            f"TFLOP/s ({source})"
        )
        if start:
            self._say(f"resumed at step {start} of {cfg.steps} in {self.workdir}")

    def _log(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Fetches the metrics of a step, which waits until it is done."""
        if pending is None:
            return
        step, arrays = pending
        values = {name: float(x) for name, x in jax.device_get(arrays).items()}
        now = time.perf_counter()
        if self._clock is not None:
            self._recent.append(now - self._clock)
        self._clock = now
        self._bar.update(step - self._bar.n)
        shown = {"loss": values["loss"], "val": self.val_loss}
        self._bar.set_postfix(
            {k: f"{x:.3f}" for k, x in shown.items() if x is not None}
        )
        if step % self.cfg.log_every and step != self.cfg.steps:
            return
        values["learning_rate"] = float(self._schedule(step - 1))
        if self._recent:
            seconds = float(np.mean(self._recent))
            rate = self.cfg.batch_size * self.cfg.block_size / seconds
            values["step_seconds"] = seconds
            values["tokens_per_second"] = rate
            values["mfu"] = rate * self._flops / self._peak
            self._recent.clear()
        self._writer.write(step, **values)
        if self._bar.disable:
            speed = (
                f", {values['tokens_per_second']:,.0f} tokens/s, "
                f"MFU {values['mfu']:.1%}"
                if "mfu" in values
                else ""
            )
            self._say(f"step {step}/{self.cfg.steps}: loss {values['loss']:.4f}{speed}")

    def _evaluate(self, state: TrainState, step: int) -> float | None:
        """Validation loss over the same batches each time, and a sample if asked."""
        cfg = self.cfg
        if self.validation is not None:
            batches = eval_batches(
                self.validation,
                batch_size=cfg.microbatch,
                block_size=cfg.block_size,
                max_batches=cfg.eval.batches or None,
            )
            result = evaluate(
                state.params, batches, step=self.eval_step, mesh=self.mesh
            )
            self.val_loss = result.loss
            self._writer.write(step, val_loss=result.loss)
            self._say(
                f"step {step}/{cfg.steps}: validation loss {result.loss:.4f}, "
                f"perplexity {result.perplexity:.2f} ({result.tokens:,} tokens)"
            )
        if cfg.eval.sample_tokens:
            text = self._sample(state)
            self._writer.write_text(step, "sample", text)
            self._say(f"--- sample at step {step}\n{text}\n---")
        return self.val_loss

    def _sample(self, state: TrainState) -> str:
        prompt = self.cfg.eval.sample_prompt
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eot_id]
        [new_ids] = generate(
            self.model,
            state.params,
            [ids],
            Options(max_new_tokens=self.cfg.eval.sample_tokens),
            seed=self.cfg.seed,
            end_ids=[self.tokenizer.eot_id],
            n_valid=self.tokenizer.vocab_size,
            mesh=self.mesh,
        )
        return prompt + self.tokenizer.decode(new_ids)

    def _save(self, state: TrainState, val_loss: float | None) -> None:
        self.checkpoints.save(
            state,
            model=self.model.cfg,
            run=plain(self.cfg),
            tokenizer=self.tokenizer,
            val_loss=val_loss,
        )

    def _close(self, step: int, received: int | None) -> Result:
        curve = self.workdir / "loss.png"
        metrics.plot_losses(self.workdir / "metrics.jsonl", curve)
        self._bar.close()
        if received is not None:
            name = signal.Signals(received).name
            print(
                f"{name}: stopped at step {step} of {self.cfg.steps}, checkpoint "
                f"saved. To resume: {shlex.join([sys.executable, *sys.argv])}"
            )
        else:
            print(f"done: step {step}, run in {self.workdir}, loss curve in {curve}")
        return Result(step, self.val_loss, received)

    def _say(self, text: str) -> None:
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)


def global_batch(
    dataset: TokenDataset, cfg: TrainConfig, mesh: Mesh, step: int
) -> jax.Array:
    """The batch of a step, int32 [A, B, T + 1], B spread over the mesh.

    Example i of the global batch is [i // B, i % B]; each host reads only the rows
    of its own devices.
    """
    shape = (cfg.accumulation, cfg.microbatch, cfg.block_size + 1)
    row_AB = np.arange(cfg.batch_size).reshape(shape[:2])

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        rows_AB = row_AB if index is None else row_AB[index[:2]]
        tokens = train_batch(
            dataset,
            seed=cfg.seed,
            step=step,
            batch_size=cfg.batch_size,
            block_size=cfg.block_size,
            rows=rows_AB.ravel(),
        )
        return tokens.reshape(*rows_AB.shape, -1)

    spread = sharding.batch_sharding(mesh, ndim=3, axis=1)
    return jax.make_array_from_callback(shape, spread, read)


class StopSignals:
    """While entered, SIGTERM and SIGINT set `received`; a second one kills."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> Self:
        self._old = {
            s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)

    def _handle(self, number: int, _: object) -> None:
        self.received = number
        for s, handler in self._old.items():
            signal.signal(s, handler)
        print("stopping after this step ...", file=sys.stderr, flush=True)


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


def plain(cfg: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON data."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def changes(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """path -> (old, new) where two trees of plain data differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*old, *new}):
            name = f"{path}.{key}" if path else key
            found |= changes(old.get(key), new.get(key), name)
        return found
    return {} if old == new else {path: (old, new)}
