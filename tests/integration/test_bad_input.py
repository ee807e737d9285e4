"""Bad input: one clear line, an exit status, no traceback, and nothing lost."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_jax.checkpoints import checkpoint
from test_run import ROOT, TINY_RUN, arguments, environment, start, train


def refused(script: str, *args: object, status: int = 2) -> str:
    process = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *map(str, args)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert process.returncode == status, process.stderr
    assert "Traceback" not in process.stderr
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(workdir, text, "--config.steps=6")
    return workdir


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.data.path=/no/such/file.txt"], "/no/such/file.txt"),
        (["--config.nope=1"], "config key does not exist: \"'nope'\""),
        (["--config.batch_size=many"], "--config.batch_size=many"),
        (["--config.dtype=float17"], "dtype='float17' is not one of float32, bfloat16"),
        (["--config.model.vocab_size=100"], "less than the tokenizer's vocab_size=257"),
        (["--config.mesh.data=3"], "mesh data=3, fsdp=1, tensor=1 does not fit the 1"),
        (["--config.data.splits=(0.9, 0.9, 0.1)"], "splits"),
        (["--workdir=/proc/run"], "/proc/run"),
        (["--no_such_flag"], "Unknown command line flag 'no_such_flag'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config=no_such_config.py"], "no such config file: no_such_config.py"),
    ],
)
def test_bad_training_flags(text, tmp_path, flags, message):
    error = refused("train.py", *arguments(tmp_path / "run", text), *flags)
    assert message in error
    assert not (tmp_path / "run/checkpoints").exists()


def test_an_empty_corpus(tmp_path):
    (tmp_path / "empty.txt").touch()
    error = refused("train.py", *arguments(tmp_path / "run", tmp_path / "empty.txt"))
    assert "empty" in error


def test_missing_flags(tmp_path):
    error = refused("train.py", "--config=no_such.py", f"--workdir={tmp_path}")
    assert error == "error: no such config file: no_such.py"
    assert "--workdir" in refused("train.py", TINY_RUN[0])
    assert "--config" in refused("train.py", f"--workdir={tmp_path}")


def test_a_prompt_longer_than_the_context(finished):
    error = refused("generate.py", f"--workdir={finished}", f"--prompt={'x' * 40}")
    assert "prompt 0: a prompt of 40 tokens + max_new_tokens=100 exceeds" in error
    assert "n_positions=32" in error


def test_no_checkpoint(tmp_path):
    error = refused("generate.py", f"--workdir={tmp_path}")
    assert "holds no model: expected a run's folder, a Hugging Face folder" in error
    (tmp_path / "metrics.jsonl").touch()
    assert "no checkpoint in" in refused("generate.py", f"--workdir={tmp_path}")
    assert "no such folder" in refused("evaluate.py", f"--workdir={tmp_path}/none")


def test_no_run_to_plot_or_inspect(tmp_path):
    error = refused("inspect_run.py", f"--workdir={tmp_path}")
    assert f"{tmp_path} is no run's folder: no config.json" in error
    flags = [f"--workdirs={tmp_path}/none", f"--out={tmp_path}/a.png"]
    assert "none is no run's folder: no metrics.jsonl" in refused("plot.py", *flags)
    assert not list(tmp_path.iterdir())


def test_another_model_or_tokenizer_in_the_same_workdir(finished, text, tmp_path):
    before = sorted(finished.rglob("*"))
    error = refused("train.py", *arguments(finished, text), "--config.model.n_embd=32")
    assert "has model.n_embd=16, the config 32" in error
    error = refused(
        "train.py", *arguments(finished, text), "--config.data.tokenizer=char"
    )
    assert "tokenizer=bytes, this run asks for char" in error
    error = refused(
        "train.py",
        *arguments(finished, text),
        "--config.steps=5",
        "--config.optim.warmup_steps=1",
    )
    assert "is past steps=5" in error
    assert sorted(finished.rglob("*")) == before


def test_a_damaged_checkpoint_is_named_and_left_as_it_is(finished, text, tmp_path):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    step = checkpoint.find_step(workdir)
    for data in (step / "state").glob("**/d/*"):
        data.write_bytes(data.read_bytes()[:100])
    before = {p: p.stat().st_size for p in workdir.rglob("*") if p.is_file()}
    for script, flags in [
        ("generate.py", [f"--workdir={workdir}", "--max_new_tokens=3"]),
        ("evaluate.py", [f"--workdir={workdir}"]),
    ]:
        assert f"checkpoint {step} is damaged" in refused(script, *flags)
    assert {p: p.stat().st_size for p in workdir.rglob("*") if p.is_file()} == before
    # training, which may write there, goes on from the one before
    out, err = start("train.py", *arguments(workdir, text)).communicate(timeout=120)
    assert f"note: checkpoint {step} is damaged" in err
    assert f"it is now {workdir / 'damaged' / step.name}" in err
    assert "resumed at step" in out
    # and where there is none, it says so
    for path in (workdir / "checkpoints").iterdir():
        shutil.rmtree(path)
    said = refused("train.py", *arguments(workdir, text))
    assert f"no sound checkpoint is left in {workdir / 'checkpoints'}" in said


def test_the_traceback_flag_shows_it(tmp_path):
    process = subprocess.run(
        [
            sys.executable,
            ROOT / "scripts/generate.py",
            f"--workdir={tmp_path}",
            "--traceback",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert "FileNotFoundError" in process.stderr
    assert "holds no model" in process.stderr
