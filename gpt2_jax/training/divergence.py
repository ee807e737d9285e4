"""What ends a run that diverges: too many updates in a row that were skipped."""

from collections.abc import Callable, Mapping

from gpt2_jax.checkpoints.checkpoint import Checkpoints
from gpt2_jax.training.optim import guard_counts
from gpt2_jax.training.step import TrainState


class DivergedError(ValueError):
    """Too many updates in a row were skipped."""


class DivergenceGuard:
    """Counts skipped updates, reports each, and raises when there are too many.

    Args:
      most: `optim.max_skipped`.
      state: what the run begins with.
      checkpoints: the latest of them is named in the error.
      say: prints a line.
    """

    def __init__(
        self,
        most: int,
        state: TrainState,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
    ) -> None:
        self.in_row = int(guard_counts(state.opt_state)["skipped_in_row"])
        self._most = most
        self._checkpoints = checkpoints
        self._say = say

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step.

        Raises:
          DivergedError: when more than `most` updates in a row were skipped.
        """
        self.in_row = in_row = int(values["skipped_in_row"])
        if not in_row:
            return
        what = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
        self._say(f"step {step}: the update was skipped ({what}), {in_row} in a row")
        if in_row > self._most:
            self._checkpoints.wait()
            saved = self._checkpoints.latest_step()
            raise DivergedError(
                f"step {step}: {in_row} updates in a row were skipped ({what}), more "
                f"than optim.max_skipped={self._most}; the last checkpoint is of step "
                f"{saved}"
            )
