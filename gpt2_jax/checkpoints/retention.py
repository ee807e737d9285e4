"""Which checkpoints of a run are kept."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

K = TypeVar("K")


@dataclasses.dataclass(frozen=True)
class Saved:
    """What decides whether a checkpoint is kept.

    Attributes:
      val_loss: of its evaluation; None where there was none, or it is not finite.
      interim: whether it is there to resume from, and no longer than until the next:
        it was saved because of a signal, or while updates were being skipped, or its
        evaluation is still to come or was not finite.
    """

    val_loss: float | None = None
    interim: bool = False


def finite(metrics: Mapping[K, float]) -> dict[K, float]:
    """The metrics without those that are no numbers: these can't be compared."""
    return {name: x for name, x in metrics.items() if math.isfinite(x)}


def best_step(saved: Mapping[int, Saved]) -> int | None:
    """The step of least validation loss, the first of several; None: there is none."""
    losses = {s: x.val_loss for s, x in sorted(saved.items()) if x.val_loss is not None}
    return min(losses, key=losses.__getitem__, default=None)


def kept_steps(saved: Mapping[int, Saved], keep_last: int) -> set[int]:
    """The steps to keep: the latest, and of those that are not interim ones

    - the last `keep_last`,
    - the one of least validation loss,
    - the last that is known to be sound. A finite validation loss shows that, or a
      later one of them: there the loss was finite, and the update was made. So a
      checkpoint of parameters that the last update spoilt pushes out no good one.
    """
    regular = {step: x for step, x in saved.items() if not x.interim}
    steps = sorted(regular)
    sound = [s for s in steps if s < steps[-1] or regular[s].val_loss is not None]
    best = best_step(regular)
    kept = {*steps[-keep_last:], *sound[-1:], *([] if best is None else [best])}
    return kept | {max(saved)} if saved else kept
