"""How fast a run goes: what a token costs, the rate of steps, the time left."""

import dataclasses
import time

import numpy as np
from tqdm import tqdm

from gpt2_jax.layout import count_params
from gpt2_jax.training import metrics
from gpt2_jax.training.setup import Setup


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a token of training costs, and what the devices can do.

    Attributes:
      n_params: the number of parameters of the whole model.
      n_trained: how many of them the optimizer updates.
      flops: FLOPs per token, by `formula`.
      peak: FLOP/s of all devices together; `peak_source` says how it is known.
    """

    n_params: int
    n_trained: int
    flops: int
    formula: str
    peak: float
    peak_source: str


def training_cost(setup: Setup) -> Cost:
    """Counts the FLOPs of a run's tokens, and measures or looks up the peak."""
    n_params = n_trained = count_params(setup.state.params)
    per_param = 6
    if setup.base is not None:
        n_params += count_params(setup.base.params)
        per_param = 4  # most have no gradient
    flops = metrics.flops_per_token(
        setup.model.cfg, n_params, setup.cfg.block_size, per_param=per_param
    )
    peak, source = metrics.peak_flops(setup.model.dtype)
    formula = f"{per_param}N + 12LDT"
    return Cost(n_params, n_trained, flops, formula, peak * setup.mesh.size, source)


class Throughput:
    """Times the steps of a run, from the end of one to the end of the next."""

    def __init__(self, setup: Setup, cost: Cost) -> None:
        self._cfg, self._since = setup.cfg, setup.position
        self._cost = cost
        # Tokens, seconds, and seconds of waiting for data, of each step since the
        # last record.
        self._recent: list[tuple[int, float, float]] = []
        self._clock: float | None = None  # when the last step was seen to end
        self._began: tuple[int, float] | None = None  # the first, and when it ended

    def step_ended(self, step: int, waited: float) -> None:
        """Takes the time of a step, which spent `waited` seconds waiting for data."""
        now = time.perf_counter()
        if self._clock is not None:
            examples = self._cfg.batch(step - 1, self._since)
            tokens = len(examples) * self._cfg.block_size
            self._recent.append((tokens, now - self._clock, waited))
        self._clock = now
        if self._began is None:
            self._began = step, now

    def pause(self) -> None:
        """Leaves out the time until the next step ends: it was not the steps' alone."""
        self._clock = None

    def take(self) -> dict[str, float]:
        """The rates since the last call; empty where no step was timed."""
        if not self._recent:
            return {}
        tokens, seconds, waited = np.sum(self._recent, axis=0).tolist()
        rate = tokens / seconds
        rates = {
            "step_seconds": seconds / len(self._recent),
            "tokens_per_second": rate,
            "mfu": rate * self._cost.flops / self._cost.peak,
            "data_wait": waited / seconds,
        }
        self._recent.clear()
        return rates

    def left(self, step: int) -> str:
        """Time until the last step, as [H:]MM:SS, evaluations and saves included."""
        assert self._began is not None
        first, began = self._began
        if step in (first, self._cfg.steps):
            return ""
        each = (time.perf_counter() - began) / (step - first)
        return tqdm.format_interval(each * (self._cfg.steps - step))
