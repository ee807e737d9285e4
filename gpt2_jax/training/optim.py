"""AdamW, Muon, schedules, averaged parameters; bad updates are skipped."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from gpt2_jax.checks import check_choice, shown
from gpt2_jax.fields import (
    check_below_1,
    check_positive,
    check_range,
    check_types,
)
from gpt2_jax.layout import DTYPES, LAYER, STACKED, Params, is_stacked
from gpt2_jax.runtime.platform import on_gpu

CHOICES = {
    "name": ("adamw", "muon"),
    "schedule": ("cosine", "wsd", "linear", "constant"),
    "state_dtype": tuple(DTYPES),
}

# The axes of a kernel that are its inputs and its outputs, by its ndim: [D, F],
# [H, K, D] and [D, 3, H, K]. The axis left out is that of q, k and v, three matrices.
KERNEL_AXES = {
    2: MuonDimensionNumbers((0,), (1,)),
    3: MuonDimensionNumbers((0, 1), (2,)),
    4: MuonDimensionNumbers((0,), (2, 3)),
}
MUON_RMS = 0.2  # of the elements of Muon's update at a rate of 1, about as AdamW's

LOSS_WINDOW = 100  # losses that their running mean and variance go back over


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule; steps are counted in updates.

    Raises:
      ValueError: on an impossible value, naming it.
    """

    name: str  # adamw or muon
    learning_rate: float  # peak
    muon_learning_rate: float  # peak of the kernels under Muon; 0: learning_rate
    schedule: str  # cosine, wsd, linear or constant
    min_learning_rate: float  # at the last step, unless constant
    warmup_steps: int
    decay_steps: int  # the last ones, in which wsd decays
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float  # of the global gradient
    state_dtype: str  # of the first moment
    ema_decay: float  # of the averaged parameters; 0: none
    max_skipped: int  # updates in a row
    max_loss_z: float  # standard deviations over the mean; 0: no limit
    lr_scales: tuple[tuple[str, float], ...]  # see `rate_factors`

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        for name, choices in CHOICES.items():
            check_choice(f"optim.{name}", getattr(self, name), choices)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in (*CHOICES, "lr_scales"):
                continue
            if value < 0:
                raise ValueError(f"optim.{field.name}={value} must be >= 0")
        for name in ("warmup_steps", "decay_steps", "max_skipped"):
            check_range(f"optim.{name}", getattr(self, name), 0)
        for name in ("learning_rate", "eps", "clip_norm"):
            check_positive(f"optim.{name}", getattr(self, name))
        for name in ("b1", "b2", "ema_decay"):
            check_below_1(f"optim.{name}", getattr(self, name))
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optim.min_learning_rate={self.min_learning_rate} exceeds "
                f"optim.learning_rate={self.learning_rate}"
            )
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise ValueError("optim.decay_steps=0 must be >= 1 with optim.schedule=wsd")
        if self.schedule != "wsd" and self.decay_steps:
            raise ValueError(
                f"optim.decay_steps={self.decay_steps} must be 0 with "
                f"optim.schedule={self.schedule}"
            )
        if self.name != "muon" and self.muon_learning_rate:
            raise ValueError(
                f"optim.muon_learning_rate={self.muon_learning_rate} must be 0 with "
                f"optim.name={self.name}"
            )
        for pattern, factor in self.lr_scales:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                what = shown(pattern)
                raise ValueError(f"optim.lr_scales: {what}: {error}") from None
            if factor < 0:
                raise ValueError(
                    f"optim.lr_scales: factor {factor} of {shown(pattern)} must be >= 0"
                )


def check_same_state(cfg: OptimConfig, saved: Mapping[str, Any]) -> None:
    """Raises ValueError when a state saved under `saved` is of another kind than ours.

    Rates, schedules and decays may change from one call of a run to the next.
    """
    for name in ("name", "state_dtype", "ema_decay"):
        ours, theirs = getattr(cfg, name), saved.get(name)
        if ours != theirs and not (ours and theirs and name == "ema_decay"):
            raise ValueError(
                f"the checkpoint has optim.{name}={theirs}, the config {ours}: choose "
                "another workdir or the same optimizer"
            )
    ours, theirs = cfg.lr_scales, saved.get("lr_scales", ())
    if _frozen_patterns(ours) != _frozen_patterns(theirs):
        raise ValueError(
            f"the checkpoint has optim.lr_scales={theirs}, the config {ours}: choose "
            "another workdir or freeze the same parameters"
        )


def _frozen_patterns(lr_scales: Any) -> list[Any]:
    """What decides which parameters have no state: a pattern may shadow a later one."""
    if all(factor for _, factor in lr_scales):
        return []
    return [[pattern, not factor] for pattern, factor in lr_scales]


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, ...: linear warmup, then one of

    - cosine, linear: from the peak to the minimum by that curve,
    - wsd: the peak, and in the last `decay_steps` to the minimum by 1 - sqrt (source:
      https://arxiv.org/abs/2405.18392),
    - constant: the peak.

    Update 0 already has a rate of peak / warmup_steps, update `steps - 1` the least.
    It is a function of the updates done: one that was skipped does not count.

    Raises:
      ValueError: when warmup and decay take longer than the run.
    """
    if cfg.warmup_steps >= steps:
        raise ValueError(
            f"optim.warmup_steps={cfg.warmup_steps} must be less than steps={steps}"
        )
    if cfg.warmup_steps + cfg.decay_steps > steps:
        raise ValueError(
            f"optim.warmup_steps={cfg.warmup_steps} + "
            f"optim.decay_steps={cfg.decay_steps} exceed steps={steps}"
        )
    peak, least = cfg.learning_rate, cfg.min_learning_rate
    decay_steps = cfg.decay_steps or steps - cfg.warmup_steps
    hold = optax.constant_schedule(peak)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=least / peak),
        "linear": optax.linear_schedule(peak, least, decay_steps),
        "wsd": lambda done: (
            peak + (least - peak) * jnp.sqrt(jnp.clip(done / decay_steps, 0, 1))
        ),
        "constant": hold,
    }[cfg.schedule]
    warmup = optax.linear_schedule(0.0, peak, cfg.warmup_steps)
    boundaries = [cfg.warmup_steps, steps - decay_steps]
    curve = optax.join_schedules([warmup, hold, decay], boundaries)
    return lambda step: curve(step + 1)


def decay_mask(params: Params) -> Params:
    """True where weight decay applies: tensors of ndim >= 2, never bias or norm."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim - is_stacked(path) >= 2, params
    )


class LossStatistics(NamedTuple):
    """Statistics of the losses whose updates weren't skipped."""

    seen: jax.Array  # int32, how many
    mean: jax.Array  # exponentially weighted over about LOSS_WINDOW losses
    variance: jax.Array

    def add(self, loss: jax.Array) -> "LossStatistics":
        """Each loss weighs the same until there are LOSS_WINDOW of them."""
        seen = self.seen + 1
        weight = 1 / jnp.minimum(seen, LOSS_WINDOW)
        delta = loss - self.mean
        variance = (1 - weight) * (self.variance + weight * delta**2)
        return LossStatistics(seen, self.mean + weight * delta, variance)

    def is_spike(self, loss: jax.Array, max_z: float) -> jax.Array:
        """Whether it lies more than `max_z` deviations above a mean that is known."""
        limit = self.mean + max_z * jnp.sqrt(self.variance)
        return (self.seen >= LOSS_WINDOW) & (loss > limit)


class GuardState(NamedTuple):
    inner: Any
    skipped: jax.Array  # int32, updates in all
    skipped_in_row: jax.Array  # int32, the latest ones
    losses: LossStatistics


class Optimizer(NamedTuple):
    """`init(params) -> state`, and `apply`.

    `apply(grads, state, params, loss) -> params, state, grad_norm`, the global norm
    being that before clipping.
    """

    init: Callable[[Params], GuardState]
    apply: Callable[..., tuple[Params, GuardState, jax.Array]]


def make_optimizer(cfg: OptimConfig, steps: int) -> Optimizer:
    """Clip by global norm, AdamW or Muon, then average; bad updates are skipped.

    The state mirrors the params tree. See `clip_and_guard`.
    """
    inner = (_muon if cfg.name == "muon" else _adamw)(cfg, steps)
    factors = partial(rate_factors, cfg.lr_scales) if cfg.lr_scales else None
    if factors is not None:
        inner = _scale_rates(inner, factors)
    parts = [inner]
    if cfg.ema_decay:
        parts.append(average_params(cfg.ema_decay))
    chain = optax.chain(*parts)
    return clip_and_guard(chain, cfg.clip_norm, cfg.max_loss_z, factors)


def rate_factors(
    lr_scales: Sequence[tuple[str, float]], params: Params
) -> dict[str, Any]:
    """The factor of each parameter's learning rate, a tree as theirs.

    That of the first pattern which is found in its path, else 1. Where layers are
    stacked it is an array with an axis for them: it is the same on either layout.

    Raises:
      ValueError: on a pattern that is found in no path.
    """
    found: set[str] = set()

    def of_path(path: str) -> float:
        for pattern, factor in lr_scales:
            if re.search(pattern, path):
                found.add(pattern)
                return float(factor)
        return 1.0

    def of_leaf(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not is_stacked(path):
            return of_path(name)
        layers = [
            of_path(f"{LAYER}{i}{name.removeprefix(STACKED)}") for i in range(len(x))
        ]
        if len(set(layers)) == 1:
            return layers[0]
        return np.array(layers, np.float32).reshape(-1, *[1] * (x.ndim - 1))

    factors = jax.tree_util.tree_map_with_path(of_leaf, params)
    for pattern, _ in lr_scales:
        if pattern not in found:
            raise ValueError(
                f"optim.lr_scales: {shown(pattern)} is found in no parameter's path, "
                "or only where one before it is"
            )
    return factors


def _scale_rates(
    inner: optax.GradientTransformation, factors: Callable[[Params], Any]
) -> optax.GradientTransformation:
    """Updates times their factors; what is frozen in all layers has no state.

    Weight decay is part of the update, so it has the factor too.
    """

    def trained(params: Params) -> Any:
        """Whether a parameter is, in this layer or in another: on either layout."""
        scales = factors(params)
        kinds: dict[str, bool] = {}

        def kind(path: Any) -> str:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return re.sub(rf"^{LAYER}\d+/", f"{STACKED}/", name)

        for path, x in jax.tree_util.tree_leaves_with_path(scales):
            kinds[kind(path)] = kinds.get(kind(path), False) or bool(np.any(x))
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "trained" if kinds[kind(path)] else "frozen", params
        )

    def scale(updates: Params, _: Any) -> Params:
        return jax.tree.map(lambda u, s: u * s, updates, factors(updates))

    parts = {"trained": inner, "frozen": optax.set_to_zero()}
    return optax.chain(optax.partition(parts, trained), optax.stateless(scale))


def _adamw(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    return optax.adamw(
        schedule(cfg, steps),
        b1=cfg.b1,
        b2=cfg.b2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=decay_mask,
        mu_dtype=DTYPES[cfg.state_dtype],
    )


def _muon(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Muon for kernels, q, k and v each apart; AdamW for embeddings, norms and biases.

    Momentum is 0.95, by Nesterov, and the Newton-Schulz iteration has five steps, as
    in https://kellerjordan.github.io/posts/muon. Updates are scaled to the size of
    AdamW's, so that rate and decay have their usual values (source:
    https://arxiv.org/abs/2502.16982).
    """
    rate = schedule(cfg, steps)
    ratio = (cfg.muon_learning_rate or cfg.learning_rate) / cfg.learning_rate
    kernels = optax.chain(
        scale_by_muon(
            mu_dtype=DTYPES[cfg.state_dtype],
            weight_dimension_numbers=partial(
                jax.tree_util.tree_map_with_path, _kernel_axes
            ),
        ),
        optax.stateless(
            lambda updates, _: jax.tree_util.tree_map_with_path(
                _to_adamws_size, updates
            )
        ),
        optax.add_decayed_weights(cfg.weight_decay),
        optax.scale_by_learning_rate(lambda step: ratio * rate(step)),
    )
    return optax.partition(
        {"kernels": kernels, "rest": _adamw(cfg, steps)},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "kernels" if path[-1].key == "kernel" else "rest", params
        ),
    )


def _kernel_axes(path: Any, kernel: jax.Array) -> MuonDimensionNumbers:
    if not is_stacked(path):
        return KERNEL_AXES[kernel.ndim]
    axes = KERNEL_AXES[kernel.ndim - 1]
    return MuonDimensionNumbers(*(tuple(a + 1 for a in group) for group in axes))


def _to_adamws_size(path: Any, update: jax.Array) -> jax.Array:
    """Scales an orthogonal [m, n], whose elements have RMS 1 / sqrt(max(m, n))."""
    m, n = (
        math.prod(update.shape[axis] for axis in axes)
        for axes in _kernel_axes(path, update)
    )
    return MUON_RMS * math.sqrt(max(m, n)) * update


class AverageState(NamedTuple):
    ema: Params  # float32


def average_params(decay: float) -> optax.GradientTransformation:
    """Keeps ema = decay * ema + (1 - decay) * params, of the params after the update.

    It starts at the initial params, and has to be the last transformation.
    """

    def init(params: Params) -> AverageState:
        return AverageState(jax.tree.map(lambda x: jnp.array(x, jnp.float32), params))

    def update(
        updates: Params, state: AverageState, params: Params
    ) -> tuple[Params, AverageState]:
        new_params = optax.apply_updates(params, updates)
        ema = optax.incremental_update(new_params, state.ema, 1 - decay)
        return updates, AverageState(ema)

    return optax.GradientTransformation(init, update)


def averaged_params(opt_state: Any) -> Params | None:
    """The averaged params in the state of an optimizer; None where it keeps none."""
    return optax.tree.get(opt_state, "ema")


def clip_and_guard(
    inner: optax.GradientTransformation,
    clip_norm: float,
    max_loss_z: float = 0.0,
    factors: Callable[[Params], Any] | None = None,
) -> Optimizer:
    """Clips by global norm, and skips updates that would spoil the run.

    That is when the loss or the norm is not finite, and, if `max_loss_z` > 0, when the
    loss lies more than so many standard deviations above its running mean. Params and
    inner state (moments, averages, the schedule's count) are then bit for bit as if
    the batch had never been.

    All of the update is in one conditional: a selection between new and old values
    would make XLA on CPU copy them, where donated they are written where they lie. On
    GPUs it is a selection, which costs nothing: at a conditional the host would wait,
    and the next update would not be at hand when this one is done.
    Gradients are multiplied by one number, whether it clips or not, for that melts
    into the update where a selection makes a copy of them: 0.1 s a step at 124M.

    Args:
      factors: of rates; where they are 0 a gradient has no part in the norm.
    """

    def init(params: Params) -> GuardState:
        seen, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        mean, variance = (jnp.zeros((), jnp.float32) for _ in range(2))
        losses = LossStatistics(seen, mean, variance)
        return GuardState(inner.init(params), skipped, in_row, losses)

    def apply(
        grads: Params, state: GuardState, params: Params, loss: jax.Array
    ) -> tuple[Params, GuardState, jax.Array]:
        if factors is not None:
            grads = jax.tree.map(_without_frozen, grads, factors(params))
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(norm) & jnp.isfinite(loss)
        if max_loss_z:
            good &= ~state.losses.is_spike(loss, max_loss_z)
        scale = jnp.minimum(1.0, clip_norm / norm)

        def do() -> tuple[Params, Any, LossStatistics]:
            clipped = jax.tree.map(lambda g: (scale * g).astype(g.dtype), grads)
            updates, new_inner = inner.update(clipped, state.inner, params)
            new_params = optax.apply_updates(params, updates)
            return new_params, new_inner, state.losses.add(loss)

        def skip() -> tuple[Params, Any, LossStatistics]:
            return params, state.inner, state.losses

        if on_gpu():
            kept = jax.tree.map(partial(jnp.where, good), do(), skip())
        else:
            kept = jax.lax.cond(good, do, skip)
        params, new_inner, losses = kept
        skipped = state.skipped + ~good
        in_row = jnp.where(good, 0, state.skipped_in_row + 1)
        return params, GuardState(new_inner, skipped, in_row, losses), norm

    return Optimizer(init, apply)


def _without_frozen(grad: jax.Array, factor: Any) -> jax.Array:
    return grad if np.all(factor) else jnp.where(np.asarray(factor) != 0, grad, 0)


def guard_counts(opt_state: GuardState) -> dict[str, jax.Array]:
    """How many updates were skipped: `skipped` in all, `skipped_in_row` up to now."""
    return {
        "skipped": opt_state.skipped,
        "skipped_in_row": opt_state.skipped_in_row,
    }
