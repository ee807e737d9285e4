"""Whole runs through the scripts, as a user starts them."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt2_jax import load
from gpt2_jax.checkpoints import checkpoint
from gpt2_jax.runtime.lock import Lock
from gpt2_jax.training.records import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 24
TINY_RUN = [
    f"--config={ROOT}/configs/default.py",
    f"--config.steps={STEPS}",
    "--config.batch_size=4",
    "--config.block_size=16",
    "--config.log_every=1",
    "--config.model.n_positions=32",
    "--config.model.n_embd=16",
    "--config.model.n_layer=1",
    "--config.model.n_head=2",
    "--config.model.resid_pdrop=0.1",
    "--config.data.tokenizer=bytes",
    "--config.data.vocab_size=0",
    "--config.optim.warmup_steps=5",
    "--config.eval.every=8",
    "--config.eval.examples=8",
    "--config.checkpoint.every=5",
    "--config.checkpoint.keep_last=9",
]


def environment(devices: int = 1) -> dict[str, str]:
    """What a program is started with that sees so many devices, compiled as here."""
    count = "--xla_force_host_platform_device_count"
    flags = os.environ["XLA_FLAGS"].replace(f"{count}=8", f"{count}={devices}")
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def start(script: str, *args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "error", ROOT / "scripts" / script, *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def run(script: str, *args: str) -> str:
    process = start(script, *args)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == "" or err.startswith("note: ")
    return out


def train(workdir: Path, text: Path, *args: str) -> str:
    return run("train.py", *arguments(workdir, text), *args)


def arguments(workdir: Path, text: Path) -> list[str]:
    return [*TINY_RUN, f"--workdir={workdir}", f"--config.data.path={text}"]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Path:
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    out = train(workdir, text)
    assert f"done: step {STEPS}" in out
    return workdir


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        records = read_metrics(workdir / "metrics.jsonl")
        if any(r["step"] >= step for r in records):
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} was not reached")


def losses(workdir: Path) -> dict[int, float]:
    records = read_metrics(workdir / "metrics.jsonl")
    found = [(r["step"], r["loss"]) for r in records if "loss" in r]
    assert len(dict(found)) == len(found)  # each step once
    return dict(found)


def arrays(workdir: Path) -> dict[str, int]:
    """The checksums of the last checkpoint's arrays, after they were verified."""
    lm = load(workdir)
    assert lm.step == STEPS
    meta = json.loads((workdir / f"checkpoints/{STEPS}/meta/metadata").read_text())
    return meta["checksums"]


def test_the_run_leaves_what_it_promises(whole):
    records = read_metrics(whole / "metrics.jsonl")
    assert list(losses(whole)) == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if "val_loss" in r] == [0, 8, 16, 24]
    first, last = (next(r["loss"] for r in records if r["step"] == s) for s in (1, 24))
    assert abs(first - np.log(257)) < 0.1
    assert last < first - 0.2
    named = next(r for r in records if r["step"] == 10)
    assert set(named) == {
        "step",
        "tokens",
        "loss",
        "grad_norm",
        "skipped",
        "skipped_in_row",
        "learning_rate",
        "data_wait",
        "step_seconds",
        "tokens_per_second",
        "mfu",
        "host_peak_bytes",
    }
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((whole / "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads((whole / "config.json").read_text())["steps"] == STEPS
    assert checkpoint.check_steps(whole / "checkpoints") == [5, 10, 15, 20, 24]


def test_killed_and_started_again_it_ends_in_the_same_bits(whole, text, tmp_path):
    step = random.SystemRandom().randint(6, STEPS - 2)
    checkpoints = tmp_path / "checkpoints"
    process = start("train.py", *arguments(tmp_path, text))
    wait_for_step(process, tmp_path, step)
    while process.poll() is None and not checkpoint.check_steps(checkpoints):
        time.sleep(0.002)  # the first save is still being written
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    out = train(tmp_path, text)
    resumed = int(re.search(r"resumed at step (\d+)", out).group(1))
    assert 5 <= resumed < STEPS, f"killed at {step}"
    assert losses(tmp_path) == losses(whole), f"killed at {step}"
    assert arrays(tmp_path) == arrays(whole), f"killed at {step}"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_says_how_to_resume(whole, text, tmp_path, number):
    process = start("train.py", *arguments(tmp_path, text))
    wait_for_step(process, tmp_path, 7)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == "stopping after this step ...\n"
    name = signal.Signals(number).name
    found = re.search(rf"{name}: stopped at step (\d+) of 24, .*To resume: (.*)", out)
    assert 7 <= int(found.group(1)) < STEPS
    assert f"--workdir={tmp_path}" in found.group(2)
    assert f"resumed at step {found.group(1)}" in train(tmp_path, text)
    assert losses(tmp_path) == losses(whole)
    assert arrays(tmp_path) == arrays(whole)


def test_plot_and_inspect_by_script(whole, tmp_path):
    out = tmp_path / "curves.png"
    flags = [f"--workdirs={whole}", f"--out={out}", "--x=tokens"]
    assert run("plot.py", *flags) == f"{out}\n"
    assert out.read_bytes()[:4] == b"\x89PNG"
    with Lock(whole / ".lock", "training"):  # whoever only reads needs none
        screen = run("inspect_run.py", f"--workdir={whole}")
    last = losses(whole)[STEPS]
    assert f"training {last:.4f} at step {STEPS}" in screen
    assert f"--workdir={whole}" in screen  # the command
    assert "model.n_embd=16" in screen  # what differs from the default
    assert "optim.b1" not in screen


def test_generate_and_evaluate_by_script(whole):
    flags = [f"--workdir={whole}", "--prompt=the quick", "--max_new_tokens=9"]
    with Lock(whole / ".lock", "training"):
        out = run("generate.py", *flags, "--temperature=0")
    assert out.startswith("the quick")
    lm = load(whole)
    greedy = lm.generate("the quick", max_new_tokens=9, temperature=0)
    assert out == "the quick" + greedy + "\n"
    assert run("generate.py", *flags, "--seed=1") == run(
        "generate.py", *flags, "--seed=1"
    )

    with Lock(whole / ".lock", "training"):
        out = run("evaluate.py", f"--workdir={whole}", "--split=test")
    loss, perplexity, count = map(
        float,
        re.match(
            r"test loss (\S+) perplexity (\S+) over (\d+) tokens \(step 24, ", out
        ).groups(),
    )
    tokens = np.fromfile(whole / "data/test-00000.bin", "<u2").astype(np.int32)
    assert count == len(tokens) - 1
    nll = []
    for at in range(0, len(tokens) - 1, 16):
        window = tokens[at : at + 17]
        logp = jax.nn.log_softmax(lm.logits(window[None, :-1]))[0]
        nll += (-logp[np.arange(len(window) - 1), window[1:]]).tolist()
    assert len(nll) == count
    assert loss == pytest.approx(np.mean(nll), abs=1e-4)
    assert perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-3)

    out = run("evaluate.py", f"--workdir={whole}", "--split=test", "--dtype=int8")
    assert "int8" in out
    rounded = float(out.split()[2])
    assert float(out.split()[4]) != perplexity  # which has more digits
    assert rounded == pytest.approx(loss, abs=0.02)


def test_another_number_of_devices_goes_on_with_the_same_run(whole, text, tmp_path):
    """Saved on one device, resumed on four: the same data, losses within 1e-5."""
    stopped = start("train.py", *arguments(tmp_path, text))
    wait_for_step(stopped, tmp_path, 6)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=60)
    process = subprocess.run(
        [sys.executable, ROOT / "scripts/train.py", *arguments(tmp_path, text)],
        env=environment(devices=4),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "mesh {'data': 4, 'fsdp': 1, 'tensor': 1}" in process.stdout
    for step, loss in losses(whole).items():
        assert losses(tmp_path)[step] == pytest.approx(loss, abs=1e-5)


LONGER = ["--config.steps=3000", "--config.checkpoint.every=1000"]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(workdir, text, *LONGER)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(10))
def test_of_two_at_once_one_goes_on(alone, text, tmp_path, trial):
    """The one that is refused changes nothing in the other."""
    impatient = (
        "import runpy, sys; from gpt2_jax.runtime import lock; lock.PATIENCE = 1;"
        "sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    )

    def begin():
        command = [sys.executable, "-c", impatient, ROOT / "scripts/train.py"]
        return subprocess.Popen(
            [*command, *arguments(tmp_path, text), *LONGER],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    first = begin()
    time.sleep(random.Random(trial).choice([0, 0.01, 0.1, 1, 3]))
    both = [first, begin()]
    ends = [process.communicate(timeout=300) for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], ends
    winner = both[codes.index(0)]
    [line] = ends[codes.index(2)][1].splitlines()
    assert re.fullmatch(
        rf"error: another process is training in {tmp_path}: process {winner.pid} on "
        rf"\S+, started \S+, has locked {tmp_path}/.lock",
        line,
    )
    assert losses(tmp_path) == losses(alone)
    ours, theirs = (
        json.loads((folder / "checkpoints/3000/meta/metadata").read_text())["checksums"]
        for folder in (tmp_path, alone)
    )
    assert ours == theirs
    assert not (tmp_path / ".lock").exists()
