"""The steps at which a run is evaluated and saved, and what happens there in order."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TypeVar

import jax

from gpt2_jax.checkpoints.checkpoint import Checkpoints
from gpt2_jax.layout import Params
from gpt2_jax.lora import with_adapters
from gpt2_jax.training import optim
from gpt2_jax.training.batches import in_order
from gpt2_jax.training.config import plain
from gpt2_jax.training.divergence import DivergenceGuard
from gpt2_jax.training.early_stopping import EarlyStopping
from gpt2_jax.training.evaluate import evaluate, make_eval_step
from gpt2_jax.training.report import Report
from gpt2_jax.training.samples import Sampler
from gpt2_jax.training.setup import Setup
from gpt2_jax.training.step import TrainState
from gpt2_jax.training.stop import StopSignals

T = TypeVar("T")


class _Stopped(Exception):
    """A signal ends the run, and its evaluation was given up."""


def _until_stopped(stop: StopSignals | None, batches: Iterable[T]) -> Iterator[T]:
    """The batches, as long as no signal comes; then raises _Stopped."""
    for batch in batches:
        if stop is not None and stop.requested():
            raise _Stopped
        yield batch


class Milestones:
    """Saves and evaluates a run after those of its steps where that is due.

    Attributes:
      early_stopping: knows the best evaluation.
      val_loss: of the last evaluation in this call of `train`.
      due: whether the evaluation of the step that was reached last is still to come.
    """

    def __init__(
        self,
        setup: Setup,
        checkpoints: Checkpoints,
        report: Report,
        guard: DivergenceGuard,
    ) -> None:
        self._setup = setup
        self._checkpoints = checkpoints
        self._report = report
        self._guard = guard
        self.early_stopping = EarlyStopping(setup.cfg.eval.patience, setup.best)
        self.val_loss: float | None = None
        self.due = setup.due
        self._eval_step = make_eval_step(setup.model, setup.tokenizer.vocab_size)
        self._sampler = Sampler(
            setup.model, setup.tokenizer, setup.cfg.eval, setup.cfg.seed, setup.mesh
        )

    def at(self, step: int) -> bool:
        """Whether the config saves or evaluates after so many updates."""
        return self._setup.cfg.saves(step) or self._setup.cfg.evaluates(step)

    def reach(self, state: TrainState, step: int, stop: StopSignals | None) -> bool:
        """Saves and evaluates after a step, as far as that is due.

        The state is saved before the evaluation, and the result of the evaluation is
        added to the checkpoint. So no step is lost to a failure of the evaluation, a
        signal need not wait for it, and the run that resumes there begins with it.

        Args:
          stop: None before the first step of a call, where signals end the program.

        Returns:
          Whether the run ends here.
        """
        cfg, stopped = self._setup.cfg, stop is not None and stop.received is not None
        self.due = cfg.evaluates(step)
        last = step == cfg.steps
        spoilt = self._guard.in_row > 0  # perhaps by the last update that was made
        regular = cfg.saves(step) and not spoilt
        saved = regular or last or stopped
        if saved:
            self._save(state, interim=not regular or self.due)
        if self.due and not stopped:
            try:
                val_loss = self._evaluate(state, step, stop)
            except _Stopped:
                if not saved:
                    self._save(state, interim=True)
                return True
            except Exception:  # whatever it was, the steps before it are kept
                alone = jax.process_count() == 1  # others may not have met with it
                if alone and not saved and step > self._setup.position.step:
                    self._save(state, interim=True)
                raise
            self.due = False
            last |= self.early_stopping.exhausted
            if val_loss is not None:
                kept = cfg.saves(step) or last or self.early_stopping.keeps(step)
                regular = kept and math.isfinite(val_loss)
            if saved or last or regular:
                self._save(state, val_loss, interim=not regular)
        return stopped or last

    def _evaluate(
        self, state: TrainState, step: int, stop: StopSignals | None
    ) -> float | None:
        """Validation loss over the same batches each time, and a sample if configured.

        Raises:
          _Stopped: when a signal came.
        """
        setup, cfg = self._setup, self._setup.cfg
        val_loss: float | None = None
        params = optim.averaged_params(state.opt_state) or state.params
        if setup.base is not None:
            params = with_adapters(setup.base.params, params, cfg.lora)
        if setup.validation is not None:
            cut = cfg.microbatches(cfg.batch_size, setup.mesh)
            batch_size = cfg.batch_size // cut
            examples = setup.validation.evaluation(cfg.eval.examples or None)
            batches = in_order(examples, batch_size, cfg.block_size, setup.mesh)
            batches = _until_stopped(stop, batches)
            result = evaluate(params, batches, step=self._eval_step)
            # Before it counts: the run that resumes here evaluates this step again.
            if stop is not None and stop.requested():
                raise _Stopped
            val_loss = result.loss
            self.early_stopping.update(step, val_loss)
            self._report.log_evaluation(step, result)
        self.val_loss = val_loss
        if cfg.eval.sample_tokens:
            self._report.attempt("sample", partial(self._sample, params, step))
        return val_loss

    def _sample(self, params: Params, step: int) -> None:
        text = self._sampler.sample(params)
        if text is not None:
            self._report.log_sample(step, text)

    def _save(
        self, state: TrainState, val_loss: float | None = None, *, interim: bool
    ) -> None:
        setup, best = self._setup, self.early_stopping.best
        self._checkpoints.save(
            state,
            model=setup.model.cfg,
            run=plain(setup.cfg),
            tokenizer=setup.tokenizer,
            val_loss=val_loss,
            base=None if setup.base is None else setup.base.record,
            best=None if best is None else dataclasses.asdict(best),
            examples=setup.cfg.batch(int(state.step), setup.position).start,
            due=self.due,
            interim=interim,
        )
