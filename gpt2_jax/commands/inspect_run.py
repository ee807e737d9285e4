"""What the folder of a run says of it, on one screen.

It is read alone: no device is touched, so that a run may be looked at while it runs.
"""

import json
import math
import shlex
import statistics
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.checkpoints.retention import finite
from gpt2_jax.checkpoints.steps import lacks_its_index, saved_steps
from gpt2_jax.checks import escaped, shown
from gpt2_jax.runtime.chips import chip_of
from gpt2_jax.runtime.files import read_json
from gpt2_jax.runtime.units import size_of, time_of
from gpt2_jax.training.config import changes
from gpt2_jax.training.metrics import EXPECTED_MFU
from gpt2_jax.training.records import read_metrics

RECENT = 20  # records of whose speeds the median is shown
WIDTH = 96
LABEL = 13  # columns
SAMPLE_LINES = 8
SHAPE = ("n_layer", "n_head", "n_embd", "n_positions")
# What is shown of a config, and of a start in environment.jsonl.
CONFIG = {
    "steps": int,
    "batch_size": int,
    "block_size": int,
    "dtype": str,
    "data": dict,
}
TEXTS = ["started", "python", "device_kind", "attention", "tokenizer"]
TEXTS += ["flops_formula", "peak_source"]
COUNTS = ["processes", "devices", "parameters", "trained", "training_tokens"]
COUNTS += ["vocab_size", "flops_per_token", "peak_flops"]
START: dict[str, Any] = {
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(COUNTS, (int, float)),
    **dict.fromkeys(["packages", "variables", "mesh", "model"], dict),
    "command": list,
}


def describe(workdir: Path, defaults: Mapping[str, Any]) -> str:
    """The run in `workdir` as text.

    Args:
      defaults: the config that others start from; what differs from it is shown.

    Raises:
      FileNotFoundError: when it is no run's folder.
      ValueError: when its config can't be read.
    """
    if not workdir.is_dir():
        raise FileNotFoundError(f"no such folder: {workdir}")
    path = workdir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{workdir} is no run's folder: no {path.name}")
    config = _read_config(path)
    records = read_metrics(workdir / "metrics.jsonl")
    starts = read_metrics(workdir / "environment.jsonl")
    starts = [s for s in starts if _is_start(s)]
    samples = [s for s in read_metrics(workdir / "samples.jsonl") if "sample" in s]
    rows = [
        ("run", _run(workdir, starts)),
        ("config", _config(config, defaults)),
        *_environment(config, starts),
        ("progress", _progress(config, records)),
        ("losses", _losses(records)),
        ("speed", _speed(config, records, starts)),
        ("checkpoints", _checkpoints(workdir / "checkpoints", records)),
        ("sample", _sample(samples)),
    ]
    lines = [
        f"{label if i == 0 else '':<{LABEL}}{escaped(line)}".rstrip()
        for label, text in rows
        for i, line in enumerate(text)
    ]
    return "\n".join(lines)


Lines = list[str]


def _lacks(record: Mapping[str, Any], kinds: Mapping[str, Any]) -> str:
    """The first name that has no value of its kind in `record`; none: ""."""
    wrong = (k for k, kind in kinds.items() if not isinstance(record.get(k), kind))
    return next(wrong, "")


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: {shown(config)} is not an object")
    if name := _lacks(config, CONFIG):
        value = shown(config.get(name))
        raise ValueError(f"{path} is damaged: {name}={value}")
    if config["steps"] < 1:
        raise ValueError(f"{path} is damaged: steps={config['steps']}")
    return config


def _is_start(record: Mapping[str, Any]) -> bool:
    return not _lacks(record, START) and not set(SHAPE) - record["model"].keys()


def _wrapped(text: str) -> Lines:
    return textwrap.wrap(text, WIDTH - LABEL, break_on_hyphens=False)


def _run(workdir: Path, starts: list[dict[str, Any]]) -> Lines:
    lines = [str(workdir)]
    if starts:
        at = ", ".join(f"{s['step']:,}" for s in starts)
        lines += _wrapped(f"started at step {at}; last at {starts[-1]['started']} by")
        lines += _wrapped(shlex.join(map(str, starts[-1]["command"])))
    return lines


def _config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Lines:
    differ = changes(json.loads(json.dumps(defaults)), config)
    said = [f"{key}={shlex.quote(str(new))}" for key, (_, new) in differ.items()]
    return _wrapped("  ".join(said)) if said else ["the default"]


def _environment(
    config: Mapping[str, Any], starts: list[dict[str, Any]]
) -> Iterator[tuple[str, Lines]]:
    if not starts:
        return
    last = starts[-1]
    trained = last["trained"]
    mixed = "a mixture" if config["data"].get("mixture") else "the built-in corpus"
    yield (
        "model",
        _wrapped(
            f"{last['parameters']:,} parameters"
            + (f", {trained:,} of them trained" if trained < last["parameters"] else "")
            + "; "
            + " ".join(f"{name}={last['model'][name]}" for name in SHAPE)
            + f"; {config['dtype']}, attention by {last['attention']}"
        ),
    )
    yield (
        "data",
        _wrapped(
            f"{last['training_tokens']:,} training tokens of "
            f"{config['data']['path'] or mixed}; "
            f"vocabulary {last['vocab_size']:,} ({last['tokenizer']})"
        ),
    )
    packages = (f"{name} {version}" for name, version in last["packages"].items())
    mesh = " ".join(f"{axis}={size}" for axis, size in last["mesh"].items())
    yield (
        "environment",
        [
            *_wrapped(
                f"{last['devices']} x {last['device_kind']}, mesh {mesh}, "
                f"{last['processes']} process{'es' * (last['processes'] > 1)}"
            ),
            *_wrapped(f"Python {last['python']}, {', '.join(packages)}"),
            *_wrapped(
                "; ".join(
                    [
                        f"revision {last.get('git') or 'unknown'}",
                        *(f"{k}={v}" for k, v in last["variables"].items()),
                    ]
                )
            ),
        ],
    )


def _progress(config: Mapping[str, Any], records: list[dict[str, Any]]) -> Lines:
    steps = config["steps"]
    if not records:
        return [f"nothing written yet, of {steps:,} steps"]
    last = records[-1]
    text = f"step {last['step']:,} of {steps:,} ({last['step'] / steps:.0%})"
    if "tokens" in last:
        text += f", {last['tokens']:,} tokens"
    recent = _recent(records, "step_seconds")
    if recent and last["step"] < steps:
        text += f"; {time_of((steps - last['step']) * recent)} of steps left"
    return _wrapped(text)


def _losses(records: list[dict[str, Any]]) -> Lines:
    names = {"loss", "grad_norm", "learning_rate", "skipped"}
    train = [r for r in records if names <= r.keys()]
    validation = [r for r in records if "val_loss" in r]
    text = []
    if train:
        last = train[-1]
        text.append(
            f"training {last['loss']:.4f} at step {last['step']:,}, gradient norm "
            f"{last['grad_norm']:.3g}, learning rate {last['learning_rate']:.3g}, "
            f"{last['skipped']:.0f} updates skipped"
        )
    if validation:
        last = validation[-1]
        line = f"validation {last['val_loss']:.4f} at step {last['step']:,}"
        if comparable := [r for r in validation if math.isfinite(r["val_loss"])]:
            best = min(comparable, key=lambda r: r["val_loss"])
            line += f", least {best['val_loss']:.4f} at step {best['step']:,}"
        text.append(line)
    return text or ["none yet"]


def _speed(
    config: Mapping[str, Any],
    records: list[dict[str, Any]],
    starts: list[dict[str, Any]],
) -> Lines:
    """Measured beside what is computed, as `preflight` does it."""
    if not starts:
        return ["unknown"]
    last = starts[-1]
    tokens = config["batch_size"] * config["block_size"]
    flops, peak = last["flops_per_token"], last["peak_flops"]
    rate = EXPECTED_MFU * peak / flops
    chip = chip_of(last["device_kind"])
    named = ("step_seconds", "tokens_per_second", "mfu", "data_wait")
    seconds, measured, mfu, wait = (_recent(records, name) for name in named)
    none = "-"
    columns = [
        ("", f"median of {RECENT}", "computed"),
        ("step", none if seconds is None else time_of(seconds), time_of(tokens / rate)),
        ("tokens/s", none if measured is None else f"{measured:,.0f}", f"{rate:,.0f}"),
        ("MFU", none if mfu is None else f"{mfu:.1%}", f"{EXPECTED_MFU:.0%} assumed"),
        ("data wait", none if wait is None else f"{wait:.1%}", none),
    ]
    lines = [f"{name:<10}{ours:>14}{theirs:>14}" for name, ours, theirs in columns]
    lines += _wrapped(
        f"{flops:,} FLOPs a token ({last['flops_formula']}), {flops * tokens:.3g} a "
        f"step; peak {peak / 1e12:.4g} TFLOP/s ({last['peak_source']})"
    )
    for kind in ("device", "host"):
        peaks = [r[key] for r in records if (key := f"{kind}_peak_bytes") in r]
        if peaks:
            of = f" of {size_of(chip.memory)}" if chip and kind == "device" else ""
            lines.append(f"{kind} memory, at most {size_of(max(peaks))}{of}")
    return lines


def _checkpoints(folder: Path, records: list[dict[str, Any]]) -> Lines:
    evaluated = {r["step"]: r for r in records if "val_loss" in r}
    try:
        steps = saved_steps(folder)
    except (ValueError, OSError) as error:
        return [str(error)]
    compared = {s: evaluated[s]["val_loss"] for s in steps if s in evaluated}
    best = min(finite(compared), key=compared.__getitem__, default=None)
    lines = []
    for step in steps:
        files = (p for p in (folder / str(step)).rglob("*") if p.is_file())
        loss = ""
        if step in evaluated:
            loss = f"  validation {evaluated[step]['val_loss']:.4f}"
        size = size_of(sum(p.stat().st_size for p in files))
        mended = lacks_its_index(folder / str(step) / "state")
        note = "  lacks its index, which is made when it is read" * mended
        lines.append(f"{step:>9,}{size:>12}{loss}{'  best' * (step == best)}{note}")
    aside = folder.parent / "damaged"
    for path in sorted(aside.iterdir()) if aside.is_dir() else []:
        if lacks_its_index(path / "state"):
            lines.append(f"{path} can be read now: move it back to {folder}")
    return lines or ["none yet"]


def _sample(samples: list[dict[str, Any]]) -> Lines:
    if not samples:
        return ["none: eval.sample_tokens asks for one at each evaluation"]
    last = samples[-1]
    lines = [
        part
        for line in last["sample"].splitlines() or [""]
        for part in textwrap.wrap(line, WIDTH - LABEL) or [""]
    ]
    more = ["..."] if len(lines) > SAMPLE_LINES else []
    return [f"of step {last['step']:,}:", *lines[:SAMPLE_LINES], *more]


def _recent(records: list[dict[str, Any]], name: str) -> float | None:
    values = [r[name] for r in records if name in r][-RECENT:]
    return statistics.median(values) if values else None
