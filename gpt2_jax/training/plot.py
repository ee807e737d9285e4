"""Curves of one or several runs as a picture."""

import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_jax.checks import check_choice, one_line, shown
from gpt2_jax.runtime.files import read_json
from gpt2_jax.training.config import changes
from gpt2_jax.training.records import read_metrics

AXES = ("step", "tokens")
MOST_RUNS = 10  # as there are colours
MOST_KEYS = 3  # of a config that a legend names
LONGEST = 30  # characters of a value there
WIDTH = 120  # characters of its lines
SMOOTHED = 100  # records of a curve, from which on its running median is drawn too
DRAWN = 1000  # points of that at most
BEGINNING, SPIKES = 0.05, 0.002  # shares of a run that may run out of the picture

THICK: dict[str, Any] = {"linewidth": 1.6}
THIN: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.7}
FAINT: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.3}
DOTTED: dict[str, Any] = {**THICK, "marker": "o", "markersize": 3.5}

Records = Sequence[Mapping[str, float]]
Points = tuple[np.ndarray, np.ndarray]


def draw_curves(workdirs: Sequence[Path], png: Path, *, x: str = "step") -> None:
    """Draws loss (training and validation) and learning rate of runs, as a PNG.

    Several runs are told apart by their names and by what differs in their configs.

    Args:
      x: what lies along the x axis, one of AXES.

    Raises:
      FileNotFoundError: where a folder has no metrics.
      ValueError: where its metrics do not tell the tokens that are asked for, or on
        more than MOST_RUNS runs.
    """
    from matplotlib import rc_context

    check_choice("x", x, AXES)
    if len(workdirs) > MOST_RUNS:
        raise ValueError(f"{len(workdirs)} runs are more than {MOST_RUNS}")
    runs = [_records(workdir, x) for workdir in workdirs]
    names = legend(workdirs)
    if len(runs) > 1:
        names = [
            textwrap.fill(f"{name}; validation{_last_and_least(run)}", WIDTH)
            for name, run in zip(names, runs, strict=True)
        ]
    # Names are no formulas, and those that the font lacks are boxes in the picture.
    with (
        rc_context({"text.parse_math": False, "text.usetex": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        _draw(runs, names, x).savefig(png)


def _draw(runs: Sequence[Records], names: Sequence[str], x: str) -> Any:
    """The figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    below = sum(1 + name.count("\n") for name in names) if len(runs) > 1 else 0
    figure = Figure(figsize=(8, 6 + 0.2 * below), dpi=150, layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    if len(runs) == 1:
        _draw_one(losses, runs[0], x)
        figure.suptitle(names[0], fontsize=11)
    else:
        _draw_several(losses, runs, names, x)
    for i, run in enumerate(runs):
        rates.plot(*_points(run, x, "learning_rate"), color=f"C{i}", **THICK)
    losses.set_ylabel("loss (nats per token)")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_xlabel("step (updates)" if x == "step" else "tokens seen in training")
    rates.xaxis.set_major_formatter(
        EngFormatter(sep="") if x == "tokens" else lambda value, _: f"{value:,.0f}"
    )
    rates.set_xlim(0, 1.01 * max([1, *(r[x] for run in runs for r in run)]))
    _limit_losses(losses)
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_one(losses: Any, run: Records, x: str) -> None:
    """Each record faintly, their running median, and validation."""
    train, validation = _points(run, x, "loss"), _points(run, x, "val_loss")
    at, median, n = _running_median(*train)
    label = f"training, median of {n} records" if n > 1 else "training"
    if n > 1:
        losses.plot(*train, color="C0", **FAINT)
    if len(median):
        label += f": {median[-1]:.3f}"
    losses.plot(at, median, color="C0", label=label, **THICK)
    if len(validation[0]):
        label = f"validation{_last_and_least(run)}"
        losses.plot(*validation, color="C1", label=label, **DOTTED)
    losses.legend(fontsize=9, loc="upper right")


def _draw_several(
    losses: Any, runs: Sequence[Records], names: Sequence[str], x: str
) -> None:
    """Validation, and thinner the running median of training; names go below."""
    from matplotlib.lines import Line2D

    for i, run in enumerate(runs):
        at, median, _ = _running_median(*_points(run, x, "loss"))
        validation = _points(run, x, "val_loss")
        losses.plot(at, median, color=f"C{i}", **THIN)
        losses.plot(*validation, color=f"C{i}", zorder=3, **DOTTED)
    handles = [
        # matplotlib leaves labels that begin with _ out
        Line2D([], [], color=f"C{i}", label=re.sub("^_", " _", name), **THICK)
        for i, name in enumerate(names)
    ]
    losses.figure.legend(handles=handles, fontsize=8, loc="outside lower left")
    kinds = [("validation", DOTTED), ("training", THIN)]
    handles = [Line2D([], [], color="grey", label=k, **style) for k, style in kinds]
    losses.legend(handles=handles, fontsize=8, loc="upper right")


def _limit_losses(axes: Any) -> None:
    """Cuts off the beginning and spikes where else all the rest would lie flat."""
    points = np.concatenate([line.get_xydata() for line in axes.lines])
    if not len(points):
        return
    x, y = points.T
    late = y[x >= BEGINNING * x.max()]
    least, most = y.min(), np.quantile(late, 1 - SPIKES)
    if most - least < 0.5 * (y.max() - least):
        margin = 0.05 * (most - least)
        axes.set_ylim(least - margin, most + 4 * margin)
        axes.set_title(f"↑ up to {y.max():.3g}", loc="left", fontsize=8)


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
    names = [one_line(workdir.resolve().name) for workdir in workdirs]
    if len(set(names)) < len(names):
        names = [one_line(workdir) for workdir in workdirs]
    if not keys:
        return names
    differ = [
        ", ".join(f"{one_line(k)}={_short(value_of(c, k))}" for k in shown)
        for c in configs
    ]
    return [f"{n}: {d}{rest}" for n, d in zip(names, differ, strict=True)]


def _short(value: Any) -> str:
    """Its end, which tells paths apart, where it is long."""
    text = str(value)
    return one_line(text if len(text) <= LONGEST else f"…{text[1 - LONGEST :]}")


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key with dots; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _config(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    config = read_json(path) if path.exists() else {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: {shown(config)} is not an object")
    return config


def _records(workdir: Path, x: str) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no run's folder: no {path.name}")
    records = read_metrics(path)
    if any(x not in r for r in records):
        raise ValueError(f"{path} does not tell the {x} of each record")
    return records


def _points(records: Records, x: str, name: str) -> Points:
    """Those of a metric that are finite."""
    points = [(r[x], r[name]) for r in records if math.isfinite(r.get(name, math.nan))]
    array = np.array(points, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _running_median(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """x, the median of y around there, and of how many: 1 of few."""
    n = 1 + 2 * (len(y) // SMOOTHED)
    if n == 1:
        return x, y, n
    centres = np.unique(np.linspace(0, len(y) - 1, DRAWN).astype(int))
    windows = np.abs(centres[:, None] + np.arange(n) - n // 2)  # mirrored at the ends
    windows = len(y) - 1 - np.abs(len(y) - 1 - windows)
    return x[centres], np.median(y[windows], axis=1), n


def _last_and_least(records: Records) -> str:
    """The last and the least validation loss; nothing where there are none."""
    values = [r["val_loss"] for r in records if "val_loss" in r]
    if not values:
        return ": none"
    least_value = min(filter(math.isfinite, values), default=values[-1])
    last, least = f"{values[-1]:.3f}", f"{least_value:.3f}"
    return f": {last}" if last == least else f": {last}, least {least}"
