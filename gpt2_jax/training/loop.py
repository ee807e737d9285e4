"""The training loop: get a batch, step, log, evaluate and save, stop."""

import dataclasses
from functools import partial

import jax

from gpt2_jax.checkpoints.checkpoint import Checkpoints
from gpt2_jax.runtime.lock import Lock
from gpt2_jax.training.batches import Prefetcher, global_batch
from gpt2_jax.training.divergence import DivergenceGuard
from gpt2_jax.training.milestones import Milestones
from gpt2_jax.training.report import Report
from gpt2_jax.training.setup import Setup
from gpt2_jax.training.step import jit_step
from gpt2_jax.training.stop import StopSignals


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    step: int
    val_loss: float | None  # of the last evaluation in this call
    best_step: int | None  # of the least validation loss, in this call or before
    signal: int | None  # the signal that ended it before its last step


def run_loop(
    setup: Setup,
    checkpoints: Checkpoints,
    stop: StopSignals,
    lock: Lock | None,
    profiled: range,
) -> Result:
    """Trains to the last step, the end of `eval.patience`, or a signal.

    Args:
      lock: what process 0 holds, which is checked before each step.
      profiled: the updates that are traced.
    """
    cfg, state, start = setup.cfg, setup.state, setup.position.step
    n_valid = setup.tokenizer.vocab_size
    base = None if setup.base is None else setup.base.params
    if start < cfg.steps:
        checkpoints.check_space(state)
    report = Report(setup, profiled)
    guard = DivergenceGuard(cfg.optim.max_skipped, state, checkpoints, report.say)
    milestones = Milestones(setup, checkpoints, report, guard)
    step_fn = jit_step(cfg, setup.model, setup.optimizer, state, setup.mesh, n_valid)
    make = partial(global_batch, setup.examples, cfg, setup.mesh, since=setup.position)
    batches = Prefetcher(make, range(start, cfg.steps))
    log = _StepLog(batches, guard, report)
    try:
        if setup.due:
            ended = milestones.reach(state, start, None)
        else:
            ended = milestones.early_stopping.exhausted
        for step in range(start, start if ended else cfg.steps):
            if lock is not None:
                lock.check()
            batch = batches.get(step)
            with report.trace(step):
                state, metrics = step_fn(state, *batch, base)
            batches.begin(step + 1)
            report.end_trace(step, metrics)
            log.add(step + 1, metrics)
            checkpoints.check()  # a save that failed ends the run at once
            if stop.requested() or milestones.at(step + 1):
                log.flush()
                if milestones.reach(state, step + 1, stop):
                    break
                report.pause()  # this time was not the steps'
        checkpoints.wait()
        return _conclude(cfg.steps, int(state.step), stop.received, milestones, report)
    finally:
        report.close_trace()
        batches.close()
        report.close()


class _StepLog:
    """Logs the metrics of a step once the device has been given the next one.

    To fetch them is to wait until the step is done, and the device must not idle then.
    """

    def __init__(
        self,
        batches: Prefetcher[tuple[jax.Array | None, ...]],
        guard: DivergenceGuard,
        report: Report,
    ) -> None:
        self._batches, self._guard, self._report = batches, guard, report
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Logs what is pending, and keeps the metrics of a step that was just begun."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Logs what is pending.

        Raises:
          DivergedError: as `DivergenceGuard.check`.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        self._report.step_ended(step, self._batches.take_waited())
        self._guard.check(step, values)
        self._report.log(step, values)


def _conclude(
    steps: int, step: int, received: int | None, milestones: Milestones, report: Report
) -> Result:
    """Says how the run ended."""
    early_stopping = milestones.early_stopping
    if (step == steps or early_stopping.exhausted) and not milestones.due:
        received = None  # it came too late to stop anything
    report.conclude(step, received, early_stopping)
    best = early_stopping.best
    best_step = None if best is None else best.step
    return Result(step, milestones.val_loss, best_step, received)
