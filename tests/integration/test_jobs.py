"""Runs of several processes on one machine, as several hosts would run them."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt2_jax import load
from gpt2_jax.training.records import read_metrics
from test_run import (
    ROOT,
    arguments,
    arrays,
    environment,
    losses,
    start,
    train,
    wait_for_step,
)

MORE = ["--config.steps=400", "--config.eval.every=1000", "--config.checkpoint.every=7"]


@contextmanager
def job(n: int, workdir: Path, *args: str) -> Iterator[list[subprocess.Popen]]:
    """The processes of a training job; those that are left over are killed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    workdir.parent.mkdir(parents=True, exist_ok=True)
    processes = []
    for i in range(n):
        words = [f"--coordinator_address={address}", f"--num_processes={n}"]
        # stderr in a file: XLA's own lines on a lost peer would fill a pipe
        with (workdir.parent / f"{workdir.name}-{i}.err").open("w") as err:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-W", "error", ROOT / "scripts/train.py"),
                    *(*args, *words, f"--process_id={i}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                env=environment(),
            )
        processes.append(process)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def stderr_of(workdir: Path, i: int) -> str:
    return (workdir.parent / f"{workdir.name}-{i}.err").read_text()


def error_of(workdir: Path, i: int) -> str:
    lines = stderr_of(workdir, i).splitlines()
    return next((line for line in reversed(lines) if "error: " in line), "")


def val_losses(workdir: Path) -> list[float]:
    records = read_metrics(workdir / "metrics.jsonl")
    return [r["val_loss"] for r in records if "val_loss" in r]


def trainer_of(process: subprocess.Popen) -> int:
    """The process that trains: the only child of the one that was started."""
    command = ["pgrep", "-P", str(process.pid)]
    return int(subprocess.run(command, capture_output=True, text=True).stdout)


def ends(processes: list[subprocess.Popen], seconds: float = 120) -> list[int]:
    deadline = time.monotonic() + seconds
    return [p.wait(max(1, deadline - time.monotonic())) for p in processes]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory) -> Path:
    """The run in one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    train(workdir, text)
    return workdir


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_as_one_and_one_goes_on_from_them(alone, text, tmp_path, n):
    workdir = tmp_path / "run"
    args = [*arguments(workdir, text), "--config.eval.sample_tokens=3"]
    with job(n, workdir, *args) as processes:
        outs = [p.communicate(timeout=120)[0] for p in processes]
        assert ends(processes) == [0] * n
    samples = read_metrics(workdir / "samples.jsonl")
    assert [r["step"] for r in samples] == [0, 8, 16, 24]
    assert f"mesh {{'data': {n}, 'fsdp': 1, 'tensor': 1}}" in outs[0]
    # the first alone speaks, and Gloo
    lines = [line for out in outs[1:] for line in out.splitlines()]
    assert all(line.startswith("[Gloo]") for line in lines)
    expected = losses(alone)
    assert losses(workdir).keys() == expected.keys()
    for step, loss in losses(workdir).items():
        assert loss == pytest.approx(expected[step], rel=1e-5)
    # their checkpoint is one of a single process, on one device and on several
    for path in (workdir / "checkpoints").iterdir():
        if int(path.name) > 15:
            shutil.rmtree(path)
    for devices in (1,) if n == 2 else (1, n):
        copy = shutil.copytree(workdir, tmp_path / f"on-{devices}")
        process = subprocess.run(
            [sys.executable, ROOT / "scripts/train.py", *arguments(copy, text)],
            env=environment(devices),
            capture_output=True,
            text=True,
            check=True,
        )
        assert "resumed at step 15 of 24" in process.stdout
        for step, loss in losses(copy).items():
            assert loss == pytest.approx(expected[step], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "documents"])
def test_processes_adapt_as_one(alone, text, tmp_path, kind):
    """Adapters, examples or packed documents: each process reads its own rows."""
    path = tmp_path / "examples.jsonl"
    lines = [
        {"prompt": f"{i}: ", "completion": "ab" * (i % 6 + 1), "text": f"{i} " * 9}
        for i in range(99)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    key = "kind" if kind == "sft" else "packing"
    args = [f"--config.data.{key}={kind}", f"--config.init_from={alone}"]
    args += ["--config.lora.rank=2", "--config.data.tokenizer="]
    args += ["--config.optim.learning_rate=0.01"]
    for name, n in (("one", 1), ("two", 2)):
        workdir = tmp_path / name
        with job(n, workdir, *arguments(workdir, path), *args) as processes:
            assert ends(processes) == [0] * n, error_of(workdir, 0)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 24
    assert one.keys() == two.keys()
    for step, loss in two.items():
        assert loss == pytest.approx(one[step], rel=1e-5)
    found = [
        [
            r["val_loss"]
            for r in read_metrics(tmp_path / name / "metrics.jsonl")
            if "val_loss" in r
        ]
        for name in ("one", "two")
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][-1] < found[0][0]


@pytest.mark.slow
def test_one_that_is_asked_to_stop_stops_all_at_one_step(text, tmp_path):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    with job(2, whole, *arguments(whole, text)) as processes:
        assert ends(processes) == [0, 0]
    with job(2, workdir, *arguments(workdir, text)) as processes:
        wait_for_step(processes[0], workdir, 2)
        processes[1].send_signal(signal.SIGTERM)
        out, _ = processes[0].communicate(timeout=120)
        statuses = ends(processes)
    # the notice takes a second: the run may end before it
    assert statuses in ([143, 143], [0, 0])
    if statuses[0]:
        step = int(re.search(r"SIGTERM: stopped at step (\d+) of 24", out).group(1))
        assert (workdir / f"checkpoints/{step}").is_dir()
        with job(2, workdir, *arguments(workdir, text)) as processes:
            out, _ = processes[0].communicate(timeout=120)
            assert ends(processes) == [0, 0]
        assert step == 24 or f"resumed at step {step}" in out
    assert losses(workdir) == losses(whole)
    assert arrays(workdir) == arrays(whole)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_host_that_dies_ends_the_others_by_name(text, tmp_path, victim):
    workdir = tmp_path / "run"
    # a collective fails at once; a barrier of a checkpoint after peer_timeout
    args = [*arguments(workdir, text), *MORE, "--peer_timeout=10"]
    with job(2, workdir, *args) as processes:
        wait_for_step(processes[0], workdir, 20)
        processes[victim].kill()
        began = time.monotonic()
        assert processes[1 - victim].wait(60) == 75, stderr_of(workdir, 1 - victim)
        assert time.monotonic() - began < 30  # seconds
    lost = "error: another process of the job is gone or does not answer"
    assert error_of(workdir, 1 - victim).startswith(lost)
    assert any((workdir / "checkpoints").iterdir())


@pytest.mark.parametrize("i", [0, 1])
def test_a_host_that_never_starts_is_a_named_time_out(text, tmp_path, i):
    command = [
        *(sys.executable, ROOT / "scripts/train.py", *arguments(tmp_path, text)),
        *("--coordinator_address=127.0.0.1:47999", "--num_processes=2"),
        *(f"--process_id={i}", "--start_timeout=3"),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 75
    assert (
        "not all processes had come to 127.0.0.1:47999 after start_timeout=3 seconds"
        in process.stderr.splitlines()[-1]
    )


@pytest.mark.slow
def test_a_host_that_hangs_is_taken_for_dead(text, tmp_path):
    workdir = tmp_path / "run"
    args = [*arguments(workdir, text), *MORE, "--config.steps=4000"]
    with job(2, workdir, *args, "--peer_timeout=10") as processes:
        wait_for_step(processes[0], workdir, 20)
        os.kill(trainer_of(processes[1]), signal.SIGSTOP)
        assert processes[0].wait(60) == 75
    assert "gone or does not answer" in error_of(workdir, 0)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_save_that_fails_in_one_process_ends_all_in_its_words(text, tmp_path, victim):
    workdir = tmp_path / "run"
    args = [*arguments(workdir, text), *MORE, "--config.model.n_embd=64"]
    with job(2, workdir, *args) as processes:
        wait_for_step(processes[0], workdir, 8)
        # More than a file of records needs, less than the arrays of the next save.
        limits = (32 << 10, 32 << 10)  # bytes
        trainer = trainer_of(processes[victim])
        resource.prlimit(trainer, resource.RLIMIT_FSIZE, limits)
        began = time.monotonic()
        assert ends(processes) == [2, 2], [stderr_of(workdir, i) for i in (0, 1)]
        assert time.monotonic() - began < 60  # seconds
    [line] = stderr_of(workdir, victim).splitlines()
    assert line.endswith("checkpoints/14 could not be saved: File too large")
    said = line.replace("error:", f"error: process {victim}:")
    assert stderr_of(workdir, 1 - victim).splitlines() == [said]
    assert load(workdir).step >= 7


def test_bad_input_is_said_by_all_and_ends_all(text, tmp_path):
    workdir = tmp_path / "run"
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with job(2, workdir, *arguments(workdir, text)) as processes:
        assert ends(processes) == [2, 2]
    assert error_of(workdir, 0).startswith("error: ")
    assert error_of(workdir, 0).split(": ")[-1] in error_of(workdir, 1)


def test_losses_that_are_not_numbers_stop_the_run_by_name(text, tmp_path):
    workdir = tmp_path / "run"
    wild = ["--config.optim.learning_rate=1e30", "--config.optim.max_skipped=3"]
    args = [*arguments(workdir, text), *wild, "--config.checkpoint.every=1"]
    process = start("train.py", *args)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert re.search(
        r"error: step (\d+): 4 updates in a row were skipped \(loss nan, .*\), more "
        r"than optim.max_skipped=3; the last checkpoint is of step \d+",
        err.splitlines()[-1],
    )
    assert "the update was skipped (loss nan" in out
    lm = load(workdir)
    assert lm.step >= 1  # nothing is saved while updates are skipped
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(lm.params))
