"""What a run shows of itself, and that the run is the same for it."""

import dataclasses
import io
import json
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import default
from gpt2_jax.commands.inspect_run import describe
from gpt2_jax.training import metrics
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.records import read_metrics
from gpt2_jax.training.train import train

OBSERVED = {
    "log_every": 1,
    "eval.sample_tokens": 4,
    "eval.sample_prompt": "the ",
    "wandb_project": "test",
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@dataclasses.dataclass
class Fake:
    """What Weights & Biases was told."""

    logged: list[tuple[int, Any]]

    def log(self, values: Any, step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        pass


@dataclasses.dataclass
class Runs:
    """One run in one call, and the same one in two, observed in every way."""

    plain: Path
    observed: Path
    shown: str  # on its terminal
    wandb: list[tuple[int, Any]]


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory) -> Iterator[None]:
    """JAX's cache of programs, for the three runs here."""
    names = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def runs(text, compile_once, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("observed")

    def run(name: str, steps: int, profiled: range = range(0), **values: Any) -> None:
        c = default.get_config()
        c.update_from_flattened_dict(
            {
                **{"steps": steps, "batch_size": 8, "block_size": 16, "log_every": 5},
                **{"data.path": str(text), "data.tokenizer": "bytes"},
                **{"data.vocab_size": 0, "model.n_layer": 1, "model.n_embd": 32},
                **{"optim.schedule": "constant", "optim.warmup_steps": 1},
                **{"optim.learning_rate": 0.1, "mesh.data": 4, "mesh.fsdp": 2},
                **{"eval.every": 3, "eval.examples": 8, "checkpoint.every": 3},
                **values,
            }
        )
        cfg = TrainConfig.from_dict(c.to_dict())
        train(cfg, folder / name, profiled=profiled)

    with pytest.MonkeyPatch.context() as patch:
        fake, terminal = Fake([]), Terminal()
        wandb: Any = types.ModuleType("wandb")
        wandb.init, wandb.Html, wandb.Error = lambda **_: fake, str, RuntimeError
        patch.setitem(sys.modules, "wandb", wandb)
        patch.setattr(metrics, "peak_flops", lambda _: (1e12, "assumed"))
        run("plain", 6)
        run("observed", 3, **OBSERVED)
        patch.setattr(sys, "stderr", terminal)
        patch.setattr(sys, "stdout", terminal)
        run("observed", 6, range(4, 6), **OBSERVED)
    return Runs(folder / "plain", folder / "observed", terminal.getvalue(), fake.logged)


def values(path: Path, name: str) -> list[tuple[int, Any]]:
    return [(r["step"], r[name]) for r in read_metrics(path) if name in r]


def test_the_run_is_the_same_in_all_bits(runs):
    def of(workdir: Path) -> Any:
        meta = json.loads((workdir / "checkpoints/6/meta/metadata").read_text())
        return meta["checksums"], values(workdir / "metrics.jsonl", "val_loss")

    assert of(runs.observed) == of(runs.plain)
    # the plain one logs the fifth and the last
    losses = dict(values(runs.observed / "metrics.jsonl", "loss"))
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert values(runs.plain / "metrics.jsonl", "loss") == [
        (step, losses[step]) for step in (5, 6)
    ]


def test_there_is_a_sample_of_each_evaluation(runs):
    samples = values(runs.observed / "samples.jsonl", "sample")
    assert [step for step, _ in samples] == [0, 3, 6]
    assert all(text.startswith("the ") for _, text in samples)
    assert len({text for _, text in samples}) > 1
    [*events] = (runs.observed / "tensorboard").iterdir()
    assert any(b"sample/text_summary" in path.read_bytes() for path in events)
    assert not read_metrics(runs.plain / "samples.jsonl")


def test_tokens_and_memory_stand_in_the_metrics(runs):
    records = read_metrics(runs.observed / "metrics.jsonl")
    assert all(r["tokens"] == r["step"] * 8 * 16 for r in records)
    peaks = [r["host_peak_bytes"] for r in records if "loss" in r]
    assert len(peaks) == 6
    assert min(peaks) > 50 * 2**20


def test_weights_and_biases_has_them_too(runs):
    seen = {step: value["loss"] for step, value in runs.wandb if "loss" in value}
    assert list(seen.items()) == values(runs.observed / "metrics.jsonl", "loss")
    assert sum("sample" in value for _, value in runs.wandb) == 3
    steps = [step for step, _ in runs.wandb]
    assert steps == sorted(steps)  # W&B takes no step that lies behind


def test_the_bar_of_a_terminal(runs):
    shown = re.split("[\r\n]", runs.shown)
    last = [line for line in shown if "6/6" in line][-1]
    for name in ("loss=", "val=", "tokens/s=", "MFU="):
        assert name in last, shown
    assert any(line.startswith("step 6: trace in ") for line in shown)
    assert not any(line.startswith("step 6/6: loss") for line in shown)


def test_the_trace_reads_by_layer(runs):
    [path] = (runs.observed / "profile").rglob("*.xplane.pb")
    content = path.read_bytes()
    layer = b"h_0/jit(layer)/Block/"
    for name in (layer + b"attn/c_attn", layer + b"mlp/c_fc", b"ln_f", b"optimizer"):
        assert name in content


def test_steps_that_never_come_are_not_profiled(tmp_path):
    cfg = TrainConfig.from_dict(default.get_config().to_dict())
    with pytest.raises(ValueError, match="profile_steps=1000:1001 begins after steps="):
        train(cfg, tmp_path, profiled=range(1000, 1001))
    assert not list(tmp_path.iterdir())


def test_each_start_is_noted(runs):
    first, second = read_metrics(runs.observed / "environment.jsonl")
    assert (first["step"], second["step"]) == (0, 3)
    assert second["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert second["tokenizer"] == "bytes"
    assert second["model"]["n_embd"] == 32
    # one layer of 12 D^2 + 13 D, ln_f, wte of 257 and wpe of 16 rows
    assert second["parameters"] == 12 * 32**2 + 13 * 32 + 64 + (257 + 16) * 32


@pytest.fixture
def line(runs) -> Callable[[str], str]:
    """Of what is printed of the observed run, the one with a text."""
    said = describe(runs.observed, default.get_config().to_dict())
    assert len(said.splitlines()) < 50
    return lambda text: next(x for x in said.splitlines() if text in x)


def test_the_run_on_one_screen(runs, line):
    assert line("run  ").endswith(str(runs.observed))
    assert "at step 0, 3;" in line("started")
    assert "batch_size=8  block_size=16" in line("config  ")
    assert "21,504 parameters; n_layer=1 n_head=4 n_embd=32" in line("model  ")
    assert "8 x cpu, mesh data=4 fsdp=2 tensor=1, 1 process" in line("environment")
    assert "step 6 of 6 (100%), 768 tokens" in line("progress")
    [*_, (_, loss)] = values(runs.observed / "metrics.jsonl", "loss")
    assert f"training {loss:.4f} at step 6," in line("losses")
    losses = values(runs.observed / "metrics.jsonl", "val_loss")
    best = min(loss for step, loss in losses if step)
    for step, loss in losses[1:]:
        end = f"MiB  validation {loss:.4f}{'  best' * (loss == best)}"
        assert line(end).endswith(end)
        assert line(end).split()[-6 if loss == best else -5] == str(step)
    assert line("sample  ").endswith("of step 6:")
    assert line("   the ")
