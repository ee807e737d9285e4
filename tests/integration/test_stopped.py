"""A run that is stopped at the worst moments leaves what one leaves that is not."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from configs import default
from gpt2_jax.checkpoints import checkpoint
from gpt2_jax.training import metrics, milestones, plot, samples
from gpt2_jax.training import train as train_module
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.loop import Result
from gpt2_jax.training.records import read_metrics
from gpt2_jax.training.stop import StopSignals
from gpt2_jax.training.train import train
from test_observed import compile_once as compile_once  # the fixture

RECORDED = ("step", "tokens", "loss", "val_loss", "grad_norm", "learning_rate")
RECORDED += ("skipped", "skipped_in_row")


class StopAt(StopSignals):
    """Stops a run at the `at`-th time that it asks."""

    at = math.inf

    def requested(self) -> bool:
        self._asked += 1
        if self._asked == self.at:
            self.received = signal.SIGTERM
        return self.received is not None


def left(workdir: Path) -> dict[str, Any]:
    steps = checkpoint.check_steps(workdir / "checkpoints")
    last = json.loads((workdir / f"checkpoints/{steps[-1]}/meta/metadata").read_text())
    records = read_metrics(workdir / "metrics.jsonl")
    return {
        "records": [{k: r[k] for k in RECORDED if k in r} for r in records],
        "samples": read_metrics(workdir / "samples.jsonl"),
        "steps": steps,
        "best": checkpoint.find_step(workdir, "best").name,
        "last": {k: x for k, x in last.items() if k not in ("run", "sha256")},
    }


@pytest.fixture
def run(text, compile_once, tmp_path, monkeypatch):
    c = default.get_config()
    c.update_from_flattened_dict(
        {
            **{"steps": 6, "batch_size": 8, "block_size": 16, "log_every": 1},
            **{"data.path": str(text), "data.tokenizer": "bytes"},
            **{"data.vocab_size": 0, "model.n_layer": 1, "model.n_embd": 32},
            **{"optim.schedule": "constant", "optim.warmup_steps": 1},
            **{"eval.every": 2, "eval.examples": 8, "eval.patience": 9},
            **{"eval.sample_tokens": 2, "checkpoint.every": 3},
        }
    )
    monkeypatch.setattr(train_module, "StopSignals", StopAt)
    monkeypatch.setattr(metrics, "peak_flops", lambda _: (1e12, "assumed"))
    monkeypatch.setattr(plot, "draw_curves", lambda *_: None)

    def run(name: str, stop_at: float = math.inf, **values: Any) -> Result:
        monkeypatch.setattr(StopAt, "at", stop_at)
        changed = c.copy_and_resolve_references()
        changed.update_from_flattened_dict(values)
        return train(TrainConfig.from_dict(changed.to_dict()), tmp_path / name)

    return run


def test_stopped_at_evaluations_and_at_the_end(run, tmp_path, monkeypatch, capfd):
    whole = run("whole")
    expected = left(tmp_path / "whole")
    assert [r["step"] for r in expected["samples"]] == [0, 2, 4, 6]
    # it asks after each step, at each batch of an evaluation, and before a sample
    stops = [(3, 2, "within the evaluation"), (2, 4, "at it"), (2, 6, "at the last")]
    for at, step, _ in stops:
        result = run("run", stop_at=at)
        assert (result.step, result.signal) == (step, signal.SIGTERM)
        assert checkpoint.find_step(tmp_path / "run").name == str(step)

    def die(*_, **__):
        raise SystemExit  # when the loss is recorded and the checkpoint can't say so

    with monkeypatch.context() as patch:
        patch.setattr(samples, "sample_text", die)
        with pytest.raises(SystemExit):
            run("run")
    assert run("run") == whole
    assert left(tmp_path / "run") == expected
    assert "Traceback" not in capfd.readouterr().err

    # an evaluation that is done again after its sample was given up counts once
    assert run("again", stop_at=4).step == 2
    assert checkpoint.latest_contract(tmp_path / "again/checkpoints").best["step"] == 0
    assert run("again") == whole
    assert left(tmp_path / "again") == expected

    # and what only shows a run ends none
    def fail(*_, **__):
        raise RuntimeError("no\nroom")

    monkeypatch.setattr(samples, "sample_text", fail)
    monkeypatch.setattr(plot, "draw_curves", fail)
    assert run("blind") == whole
    assert left(tmp_path / "blind")["last"] == expected["last"]
    notes = [x for x in capfd.readouterr().err.splitlines() if "goes on" in x]
    assert notes == [
        "note: the run goes on without its sample: no room",
        "note: the run goes on without its plot: no room",
    ]


def test_what_an_evaluation_runs_into_costs_no_step(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the memory")

    run("run", steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(milestones, "evaluate", fail)
        with pytest.raises(RuntimeError, match="the memory"):
            run("run")
    contract = checkpoint.latest_contract(tmp_path / "run/checkpoints")
    assert (contract.step, contract.due, contract.interim) == (4, True, True)


def test_no_sound_checkpoint_goes_while_updates_are_skipped(run, tmp_path):
    run("run", **{"checkpoint.every": 2})
    best = checkpoint.find_step(tmp_path / "run", "best").name
    wild = {"optim.learning_rate": 1e30, "optim.max_skipped": 99, "eval.every": 3}
    saves = {"checkpoint.every": 1, "checkpoint.keep_last": 1}
    run("run", steps=14, **wild, **saves)
    losses = [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in r]
    assert losses[-1]["skipped_in_row"] > 2
    assert checkpoint.find_step(tmp_path / "run", "best").name == best
    steps = checkpoint.check_steps(tmp_path / "run/checkpoints")
    assert {6, 14} <= set(steps)
    assert checkpoint.read_contract(tmp_path / "run/checkpoints/14").interim


def test_a_batch_of_another_size_goes_on_and_a_block_does_not(run, tmp_path):
    run("run", steps=3)
    run("run", batch_size=16, steps=5)
    records = read_metrics(tmp_path / "run/metrics.jsonl")
    tokens = [r["tokens"] for r in records if "loss" in r]
    assert tokens == [16 * n for n in (8, 16, 24, 40, 56)]
    with pytest.raises(ValueError, match="has block_size=16, the config 8: a run cou"):
        run("run", block_size=8, **{"model.n_positions": 16})
