"""A trace of some steps of a run, which xprof and TensorBoard show."""

import contextlib
from pathlib import Path
from typing import Any

import jax

from gpt2_jax.checks import shown

FORM = "must be FIRST:LAST, two numbers of updates with 0 <= FIRST < LAST"


def parse_steps(text: str) -> range:
    """ "10:15": what takes a run from 10 updates to 15, hence five of them.

    Raises:
      ValueError: on anything else.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"profile_steps={shown(text)} {FORM}")
    if int(first) >= int(last):
        raise ValueError(f"profile_steps={shown(text)} {FORM}")
    return range(int(first), int(last))


class StepTrace:
    """Traces those of `steps` that are gone through, as this process sees them.

    Operations carry the names of the model's parts, and each step is marked.

    Args:
      folder: where the trace goes; None: there is none.
    """

    def __init__(self, folder: Path | None, steps: range) -> None:
        self._folder = folder
        self._steps = steps
        self._is_on = False

    def step(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Around the call that begins the computation of a step."""
        if self._folder is None or step not in self._steps:
            return contextlib.nullcontext()
        if not self._is_on:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end(self, step: int, results: Any) -> bool:
        """Whether it was the last of them: waits for its results, writes the trace."""
        if not self._is_on or step + 1 < self._steps.stop:
            return False
        jax.block_until_ready(results)
        self.close()
        return True

    def close(self) -> None:
        """Writes what there is."""
        if self._is_on:
            self._is_on = False
            jax.profiler.stop_trace()
