"""Early stopping: the best evaluation so far, and how long ago it was."""

import dataclasses
import math


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


class EarlyStopping:
    """Ends a run whose validation loss has not improved for `patience` evaluations.

    Args:
      patience: 0: the run is never ended, and only the best evaluation is known.
      best: that of the evaluations before, None where there was none.
    """

    def __init__(self, patience: int, best: Best | None) -> None:
        self.patience = patience
        self.best = best

    def update(self, step: int, val_loss: float) -> None:
        """Takes the result of one more evaluation."""
        self.best = Best.after(self.best, step, val_loss)

    @property
    def exhausted(self) -> bool:
        """Whether the loss has not improved for too many evaluations."""
        return bool(self.patience and self.best and self.best.since >= self.patience)

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step is the best one, and is kept for that."""
        return bool(self.patience and self.best and self.best.step == step)
