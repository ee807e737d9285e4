"""How a run shows itself: a bar or lines, records, a trace, the plot at its end."""

import contextlib
import dataclasses
import datetime
import json
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import jax
from tqdm import tqdm

from gpt2_jax.checks import one_line
from gpt2_jax.runtime import distributed
from gpt2_jax.runtime.environment import environment
from gpt2_jax.runtime.notes import note_once
from gpt2_jax.runtime.profiling import StepTrace
from gpt2_jax.training import metrics, optim, plot
from gpt2_jax.training.config import plain
from gpt2_jax.training.early_stopping import EarlyStopping
from gpt2_jax.training.evaluate import Evaluation
from gpt2_jax.training.records import append_record
from gpt2_jax.training.setup import Setup
from gpt2_jax.training.step import attention_of
from gpt2_jax.training.throughput import Cost, Throughput, training_cost

T = TypeVar("T")


class Report:
    """Shows one call of `train`, and writes its records; only process 0 does.

    Args:
      profiled: the updates that are traced.
    """

    def __init__(self, setup: Setup, profiled: range) -> None:
        self._setup = setup
        self._is_first = distributed.is_first()
        self._failed: set[str] = set()  # what could not be shown
        cfg, start = setup.cfg, setup.position.step
        if self._is_first:
            (setup.workdir / "config.json").write_text(
                json.dumps(plain(cfg), indent=1), encoding="utf-8"
            )
        cost = training_cost(setup)
        self._throughput = Throughput(setup, cost)
        self._learning_rate = jax.jit(optim.schedule(cfg.optim, cfg.steps))
        self._learning_rate(start)  # compiles it, before steps are timed
        self._shown = {"loss": "-"}  # beside the bar
        self._writer = distributed.first_process_first(self._make_writer)
        self._trace_folder = setup.workdir / "profile"
        traces = self._is_first and profiled
        self._trace = StepTrace(self._trace_folder if traces else None, profiled)
        on_terminal = sys.stderr.isatty() and self._is_first
        self._bar = tqdm(
            total=cfg.steps,
            initial=start,
            unit="step",
            disable=not on_terminal,
            dynamic_ncols=True,
        )
        self._introduce(cost, profiled)

    def _make_writer(self) -> metrics.Writer | None:
        if not self._is_first:
            return None
        cfg = self._setup.cfg
        return metrics.Writer(
            self._setup.workdir,
            self._setup.position.step,
            due=self._setup.due,
            wandb_project=cfg.wandb_project,
            config=plain(cfg),
        )

    def _introduce(self, cost: Cost, profiled: range) -> None:
        """Says what the run begins with, and records it in environment.jsonl."""
        setup, cfg, start = self._setup, self._setup.cfg, self._setup.position.step
        devices, shape = jax.devices(), dict(setup.mesh.shape)
        cut = cfg.microbatches(cfg.batch_size, setup.mesh)
        rows = cfg.batch_size // cut
        attention = attention_of(setup.model, rows, cfg.block_size, deterministic=False)
        vocab_size = setup.model.cfg.vocab_size
        part = cost.n_trained < cost.n_params
        self.say(
            f"{cost.n_params:,} parameters, "
            + (f"{cost.n_trained:,} of them trained, " if part else "")
            + f"{len(setup.examples):,} training tokens, "
            f"vocabulary {vocab_size} ({setup.tokenizer.kind})"
        )
        self.say(
            f"{len(devices)} x {devices[0].device_kind}, mesh {shape}, "
            f"{cfg.dtype}, attention by {attention}; "
            f"{cfg.batch_size} x {cfg.block_size} tokens a step, microbatches {cut}"
        )
        self.say(
            f"MFU = tokens/s x ({cost.formula}) / peak, peak "
            f"{cost.peak / 1e12:.3g} TFLOP/s ({cost.peak_source})"
        )
        if start:
            self.say(f"resumed at step {start} of {cfg.steps} in {setup.workdir}")
        if profiled and start >= profiled.stop:
            self.say("nothing to profile: the steps are done")
        if self._is_first:
            self._record_start(
                step=start,
                model=dataclasses.asdict(setup.model.cfg),
                mesh=shape,
                attention=attention,
                microbatches=cut,
                parameters=cost.n_params,
                trained=cost.n_trained,
                training_tokens=len(setup.examples),
                vocab_size=vocab_size,
                tokenizer=setup.tokenizer.kind,
                flops_per_token=cost.flops,
                flops_formula=cost.formula,
                peak_flops=cost.peak,
                peak_source=cost.peak_source,
            )

    def _record_start(self, **facts: Any) -> None:
        """Adds a line to environment.jsonl, which has one for each start of the run."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {"started": now, **environment(), **facts}
        append_record(self._setup.workdir / "environment.jsonl", record)

    def say(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if not self._is_first:
            return
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def attempt(self, what: str, show: Callable[[], T]) -> T | None:
        """Calls what only shows the run: a failure is noted once and ends nothing."""
        try:
            return show()
        except Exception as error:  # of any library; none of them is worth the run
            if distributed.is_lost_peer(error):
                raise
            if what not in self._failed:
                self._failed.add(what)
                note_once(f"the run goes on without its {what}: {one_line(error)}")
            return None

    def trace(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Is entered around the call that begins the computation of a step."""
        traced = self.attempt("trace", partial(self._trace.step, step))
        return traced or contextlib.nullcontext()

    def end_trace(self, step: int, results: Mapping[str, jax.Array]) -> None:
        """Writes the trace, if the step was the last one that is traced."""
        if self.attempt("trace", partial(self._trace.end, step, results)):
            self.say(f"step {step + 1}: trace in {self._trace_folder}")
            self.pause()  # writing it took time

    def step_ended(self, step: int, waited: float) -> None:
        """Takes the time of a step, which spent `waited` seconds waiting for data."""
        self._throughput.step_ended(step, waited)

    def pause(self) -> None:
        """Leaves the time until the next step ends out of the throughput."""
        self._throughput.pause()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Shows the metrics of a step, and records them where the config says so."""
        cfg = self._setup.cfg
        self._bar.update(step - self._bar.n)
        self._show(loss=f"{values['loss']:.3f}")
        if step % cfg.log_every and step != cfg.steps:
            return
        updates = step - int(values["skipped"])
        values["learning_rate"] = float(self._learning_rate(max(updates - 1, 0)))
        if rates := self._throughput.take():
            values |= rates
            rate, mfu = rates["tokens_per_second"], rates["mfu"]
            self._show(**{"tokens/s": f"{rate:,.0f}", "MFU": f"{mfu:.1%}"})
        kind, peak = metrics.memory_in_use()
        values[kind] = peak
        self._write(step, **values)
        if self._bar.disable:
            left = self._throughput.left(step)
            self.say(metrics.log_line(step, cfg.steps, values, left))

    def log_evaluation(self, step: int, result: Evaluation) -> None:
        """Shows and records the validation loss."""
        self._show(val=f"{result.loss:.3f}")
        self._write(step, val_loss=result.loss)
        self.say(
            f"step {step}/{self._setup.cfg.steps}: validation loss {result.loss:.4f}, "
            f"perplexity {result.perplexity:.2f} ({result.tokens:,} tokens)"
        )

    def log_sample(self, step: int, text: str) -> None:
        """Shows and records a generated text."""
        if self._writer is not None:
            self._writer.write_text(step, "sample", text)
        self.say(f"--- sample at step {step}\n{text}\n---")

    def _show(self, **texts: str) -> None:
        """Updates texts beside the bar, and leaves the others there."""
        self._shown |= texts
        self._bar.set_postfix(self._shown)

    def _write(self, step: int, **values: float) -> None:
        if self._writer is not None:
            cfg = self._setup.cfg
            tokens = cfg.batch(step, self._setup.position).start * cfg.block_size
            self._writer.write(step, tokens=tokens, **values)

    def conclude(
        self, step: int, received: int | None, early_stopping: EarlyStopping
    ) -> None:
        """Plots the run, and says how this call of `train` ended.

        Args:
          received: the signal that ended it before its last step.
        """
        self._bar.close()
        if not self._is_first:
            return
        workdir, steps = self._setup.workdir, self._setup.cfg.steps
        best = early_stopping.best
        curve = workdir / "loss.png"
        self.attempt("plot", partial(plot.draw_curves, [workdir], curve))
        if received is not None:
            name = signal.Signals(received).name
            print(
                f"{name}: stopped at step {step} of {steps}, checkpoint "
                f"saved. To resume: {shlex.join([sys.executable, *sys.argv])}"
            )
            return
        if best is not None:
            print(f"least validation loss {best.val_loss:.4f}, at step {best.step}")
        if early_stopping.exhausted:
            print(f"stopped early: eval.patience={early_stopping.patience}")
        print(f"done: step {step}, run in {workdir}, loss curve in {curve}")

    def close_trace(self) -> None:
        """Writes the part of a trace that there is, where a call ended within it."""
        self.attempt("trace", self._trace.close)

    def close(self) -> None:
        """Closes the bar and the writers."""
        self._bar.close()
        if self._writer is not None:
            self._writer.close()
