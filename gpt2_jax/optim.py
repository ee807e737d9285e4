"""AdamW as GPT-2's reproductions use it: clip, decay on matrices, warmup + cosine."""

import dataclasses
import math

import jax
import optax

from gpt2_jax.model import Params


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule; steps are counted in updates.

    Raises:
      ValueError: on an impossible value, naming it.
    """

    learning_rate: float  # peak
    min_learning_rate: float  # at the last step
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float  # of the global gradient

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"optim.{field.name}={value} must be finite and >= 0")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optim.min_learning_rate={self.min_learning_rate} exceeds "
                f"optim.learning_rate={self.learning_rate}"
            )
        for name in ("b1", "b2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be < 1")
        for name in ("eps", "clip_norm"):
            if getattr(self, name) == 0:
                raise ValueError(f"optim.{name}=0 must be > 0")


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, ...: linear warmup, then a cosine to the minimum.

    Update 0 already has a rate of peak / warmup_steps, update `steps - 1` the least.
    """
    if cfg.warmup_steps >= steps:
        raise ValueError(
            f"optim.warmup_steps={cfg.warmup_steps} must be less than steps={steps}"
        )
    curve = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=cfg.learning_rate,
        warmup_steps=cfg.warmup_steps,
        decay_steps=steps,
        end_value=cfg.min_learning_rate,
    )
    return lambda step: curve(step + 1)


def decay_mask(params: Params) -> Params:
    """True where weight decay applies: tensors of ndim >= 2, never bias or norm."""
    return jax.tree.map(lambda x: x.ndim >= 2, params)


def make_optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; the state mirrors the params tree."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(
            schedule(cfg, steps),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            mask=decay_mask,
        ),
    )
