"""Curves of one or several runs as a picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.metrics import read_metrics
from gpt2_jax.train_config import changes

AXES = ("step", "tokens")
MOST_KEYS = 3  # of a config that a legend names
SMOOTHED = 100  # records of a curve, from which on its running mean is drawn too
FAINT = 0.3


def draw_curves(workdirs: Sequence[Path], png: Path, *, x: str = "step") -> None:
    """Draws loss (training and validation) and learning rate of runs, as a PNG.

    Several runs are told apart by their names and by what differs in their configs.

    Args:
      x: what lies along the x axis, one of AXES.

    Raises:
      FileNotFoundError: where a folder has no metrics.
      ValueError: where its metrics do not tell the tokens that are asked for.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    if x not in AXES:
        raise ValueError(f"x={x!r} is not one of {', '.join(AXES)}")
    records = [_records(workdir, x) for workdir in workdirs]
    labels = legend(workdirs)
    is_single = len(workdirs) == 1

    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for i, (run, label) in enumerate(zip(records, labels, strict=True)):
        train = _points(run, x, "loss")
        validation = _points(run, x, "val_loss")
        color, other = f"C{i}", "C1" if is_single else f"C{i}"
        mean, n = _running_mean(train[1])
        said = f"training, mean of {n} records" if n > 1 else "training"
        losses.plot(*train, color=color, linewidth=0.9, alpha=FAINT if n > 1 else 0.9)
        if n > 1 and (is_single or not validation[1].size):
            losses.plot(train[0], mean, color=color, linewidth=1.6)
        style = dict(linewidth=1.6, marker="o", markersize=3.5)
        losses.plot(*validation, color=other, **style)
        if is_single:
            handles = [
                Line2D([], [], color=color, label=_with_last(said, mean)),
                Line2D([], [], color=other, **style, label=_with_least(validation, x)),
            ]
            losses.legend(handles=handles[: 1 + bool(validation[1].size)])
        rates.plot(*_points(run, x, "learning_rate"), color=color, linewidth=1.4)
    if not is_single:
        _legend_of_several(losses, records, labels, x)
    figure.suptitle(labels[0] if is_single else f"{len(workdirs)} runs", fontsize=11)
    losses.set_ylabel("loss (nats per token)")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_xlabel("step (updates)" if x == "step" else "tokens seen in training")
    rates.xaxis.set_major_formatter(
        EngFormatter(sep="") if x == "tokens" else lambda value, _: f"{value:,.0f}"
    )
    rates.margins(x=0.01)
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(png)


def legend(workdirs: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, and the keys in which configs differ.

    Raises:
      ValueError: where a folder is given twice.
    """
    if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        raise ValueError(f"{', '.join(map(str, workdirs))}: a run is given twice")
    configs = [_config(workdir) for workdir in workdirs]
    keys = sorted({key for c in configs for key in changes(configs[0], c)})
    shown = keys[:MOST_KEYS]
    rest = f", and {len(keys) - MOST_KEYS} more" if len(keys) > MOST_KEYS else ""
    names = [workdir.resolve().name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = [str(workdir) for workdir in workdirs]
    return [
        f"{name}: " + ", ".join(f"{key}={value_of(c, key)}" for key in shown) + rest
        if keys
        else name
        for name, c in zip(names, configs, strict=True)
    ]


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """Of a key with dots; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _config(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _records(workdir: Path, x: str) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no run's folder: no {path.name}")
    records = read_metrics(path)
    if any(x not in r for r in records):
        raise ValueError(f"{path} does not tell the {x} of each record")
    return records


def _points(
    records: Sequence[Mapping[str, float]], x: str, name: str
) -> tuple[np.ndarray, np.ndarray]:
    points = [(r[x], r[name]) for r in records if name in r]
    array = np.array(points, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _running_mean(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The mean around each value, and of how many: one where they are few."""
    n = 1 + 2 * (len(values) // SMOOTHED)
    padded = np.pad(values, n // 2, mode="edge") if len(values) else values
    return (np.convolve(padded, np.ones(n) / n, "valid") if n > 1 else values), n


def _with_last(label: str, values: np.ndarray) -> str:
    return f"{label} (last {values[-1]:.3f})" if len(values) else label


def _with_least(points: tuple[np.ndarray, np.ndarray], x: str) -> str:
    at, values = points
    finite = np.flatnonzero(np.isfinite(values))
    if not len(finite):
        return "validation"
    best = finite[np.argmin(values[finite])]
    return f"validation (last {values[-1]:.3f}, least {values[best]:.3f})"


def _legend_of_several(losses: Any, records: Any, labels: Any, x: str) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for i, (run, label) in enumerate(zip(records, labels, strict=True)):
        validation = _points(run, x, "val_loss")
        if validation[1].size:
            label += f" ({_with_least(validation, x)})"
        handles.append(Line2D([], [], color=f"C{i}", linewidth=1.6, label=label))
    losses.legend(handles=handles, fontsize=8)
