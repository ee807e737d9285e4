"""Of folders that lack parts; a whole one is in tests/integration/test_observed.py."""

import json
import re

import pytest

from gpt2_jax.commands.inspect_run import describe
from gpt2_jax.training.metrics import EXPECTED_MFU

CONFIG = {
    "steps": 100,
    "batch_size": 4,
    "block_size": 8,
    "dtype": "bfloat16",
    "data": {"path": ""},
    "optim": {"learning_rate": 1e-3},
}
START = {
    "started": "2026-01-01T00:00:00+00:00",
    "step": 0,
    "command": ["python", "train.py", "--config=a b"],
    "git": None,
    "python": "3.12.1",
    "packages": {"jax": "0.11.2"},
    "variables": {},
    "processes": 2,
    "devices": 16,
    "device_kind": "TPU v4",
    "mesh": {"data": 16, "fsdp": 1, "tensor": 1},
    "attention": "pallas",
    "parameters": 1000,
    "trained": 10,
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 4, "n_positions": 8},
    "training_tokens": 12345,
    "vocab_size": 99,
    "tokenizer": "char",
    "flops_per_token": 275 * 10**9,
    "flops_formula": "4N + 12LDT",
    "peak_flops": 16 * 275e12,
    "peak_source": "TPU v4, bfloat16, published",
}


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_a_run_that_only_has_a_config(workdir):
    text = describe(workdir, CONFIG | {"optim": {"learning_rate": 6e-4}})
    assert text.splitlines() == [
        f"run          {workdir}",
        "config       optim.learning_rate=0.001",
        "progress     nothing written yet, of 100 steps",
        "losses       none yet",
        "speed        unknown",
        "checkpoints  none yet",
        "sample       none: eval.sample_tokens asks for one at each evaluation",
    ]
    assert "config       the default" in describe(workdir, CONFIG)


def test_a_run_in_its_midst(workdir):
    write(workdir / "environment.jsonl", START, {**START, "step": 40})
    train = {"grad_norm": 0.5, "learning_rate": 1e-3, "skipped": 1.0}
    speed = {"tokens_per_second": 5.0, "mfu": 0.2, "data_wait": 0.01}
    write(
        workdir / "metrics.jsonl",
        {"step": 40, "tokens": 1280, "val_loss": 3.0},
        {"step": 41, "loss": 2.5, "step_seconds": 9.0, **train, **speed},
        {"step": 42, "loss": 2.5, "step_seconds": 2.0, **train, **speed},
        {"step": 50, "loss": 2.25, "step_seconds": 1.0, **train, **speed},
        {"step": 50, "tokens": 1600, "val_loss": float("nan"), "device_peak_bytes": 1},
    )
    for step, size in ((40, 1000), (50, 2**20)):
        folder = workdir / f"checkpoints/{step}/state"
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(size * b"x")
    text = describe(workdir, CONFIG)
    # 40% of 16 x 275 TFLOP/s by 275 GFLOP a token
    rate = EXPECTED_MFU * 16 * 1000
    for pattern in (
        r"started at step 0, 40; last at 2026-01-01T00:00:00\+00:00 by",
        r"python train.py '--config=a b'",
        r"model        1,000 parameters, 10 of them trained; n_layer=1 n_head=2",
        r"12,345 training tokens of the built-in corpus",
        r"16 x TPU v4, mesh data=16 fsdp=1 tensor=1, 2 processes$",
        r"Python 3.12.1, jax 0.11.2$",
        r"revision unknown$",
        r"step 50 of 100 \(50%\), 1,600 tokens; 100 s of steps left$",
        r"training 2.2500 at step 50, .* 1 updates skipped$",
        r"validation nan at step 50, least 3.0000 at step 40$",
        rf"step +2 s +{1000 * 32 / rate:.3g} ms$",
        rf"tokens/s +5 +{rate:,.0f}$",
        r"MFU +20.0% +40% assumed$",
        r"275,000,000,000 FLOPs a token \(4N \+ 12LDT\), 8.8e\+12 a step",
        r"peak 4400 TFLOP/s",
        r"device memory, at most 0.00 MiB of 32.00 GiB$",
        r" 40 +0.00 MiB  validation 3.0000  best$",
        r" 50 +1.00 MiB  validation nan$",
    ):
        assert re.search(pattern, text, re.M), (pattern, text)


def test_what_is_not_finite_is_never_the_least(workdir):
    write(workdir / "metrics.jsonl", {"step": 5, "val_loss": float("-inf")})
    (workdir / "checkpoints/5").mkdir(parents=True)
    text = describe(workdir, CONFIG)
    assert "validation -inf at step 5\n" in text
    assert "best" not in text


def test_long_samples_are_cut(workdir):
    write(workdir / "samples.jsonl", {"step": 3, "sample": "a line\n" * 30})
    lines = describe(workdir, CONFIG).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("sample"))
    assert lines[at] == "sample       of step 3:"
    assert [line.strip() for line in lines[at + 1 :]] == 8 * ["a line"] + ["..."]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder: .*none"):
        describe(tmp_path / "none", {})
    with pytest.raises(FileNotFoundError, match=r"is no run's folder: no config.json"):
        describe(tmp_path, {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not JSON "):
        describe(tmp_path, {})
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(
        ValueError, match=r"config.json is damaged: \[1\] is not an obj"
    ):
        describe(tmp_path, {})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"steps": "9"}))
    with pytest.raises(ValueError, match=r"config.json is damaged: steps='9'"):
        describe(tmp_path, {})


def test_damaged_lines_are_named_and_the_rest_is_shown(workdir, capsys):
    write(workdir / "environment.jsonl", START, {"step": 7}, [1], START | {"step": 9})
    write(workdir / "samples.jsonl", {"step": 5, "sample": "a b"}, {"step": 6})
    (workdir / "metrics.jsonl").write_bytes(
        b'\xff\n{"step": 40, "loss": 1.0}\n{"step": 50, "val_loss": 2.0}\n{"ste'
    )
    said = describe(workdir, CONFIG)
    assert "started at step 0, 9;" in said
    assert "validation 2.0000 at step 50" in said
    assert "of step 5:" in said
    first, second = capsys.readouterr().err.splitlines()
    assert f"left out {workdir}/metrics.jsonl, line 1: not UTF-8" in first
    assert first.endswith(", and 1 more lines")
    assert f"left out {workdir}/environment.jsonl, line 3: [1] is not" in second


def test_what_files_hold_moves_no_cursor(workdir):
    data = {"path": "a\x1b]0;owned\x07\u202e"}
    (workdir / "config.json").write_text(json.dumps(CONFIG | {"data": data}))
    write(workdir / "samples.jsonl", {"step": 1, "sample": "\x1b[2J\x9b1A\u202eok"})
    text = describe(workdir, CONFIG)
    assert r"data.path='a\x1b]0;owned\x07\u202e'" in text
    assert text.endswith(r"\x1b[2J\x9b1A\u202eok")
