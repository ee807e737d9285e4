import dataclasses
import json
import math
import re
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from gpt2_jax.config import GPT2Config
from gpt2_jax.training import metrics
from gpt2_jax.training.metrics import (
    Writer,
    flops_per_token,
    log_line,
    memory_in_use,
    peak_flops,
)
from gpt2_jax.training.records import LINE_BYTES, append_record, read_metrics


def test_flops_by_hand():
    # 6 (124,439,808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(GPT2Config(), 124_439_808, 1024) == 855_166_464


def test_peak_of_an_unknown_device_is_measured():
    peak, source = peak_flops(jnp.float32)
    assert 1e8 < peak < 1e14
    assert source == "1024 x 1024 float32 matrix product, measured"


def test_a_resumed_run_writes_each_step_once(tmp_path):
    first = Writer(tmp_path, 0)
    for step in range(1, 6):
        first.write(step, loss=float(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6, "lo')  # killed while writing
    second = Writer(tmp_path, 3)
    second.write(4, loss=40.0)
    second.close()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in records] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_an_evaluation_that_is_still_to_come_is_taken_out(tmp_path):
    first = Writer(tmp_path, 0)
    for step in (0, 3):
        if step:
            first.write(step, loss=5.0)
        first.write(step, val_loss=6.0)
        first.write_text(step, "sample", "a")
    first.close()
    for start, due, steps in ((3, True, [0, 3]), (0, False, [0]), (0, True, [])):
        Writer(tmp_path, start, due=due).close()
        records = read_metrics(tmp_path / "metrics.jsonl")
        assert [r["step"] for r in records] == steps
        assert all("val_loss" in r or r["step"] == 3 for r in records)
        samples = read_metrics(tmp_path / "samples.jsonl")
        assert [r["step"] for r in samples] == [s for s in steps if s < 3]


def events(path):
    """The last (step, value) of each name in a file of TensorBoard's."""
    content, values = path.read_bytes(), {}
    while content:  # length (8), its checksum (4), event, its checksum (4)
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        values |= {v.tag: (event.step, v) for v in event.summary.value}
        content = content[16 + size :]
    return values


def test_tensorboard_events_hold_the_values(tmp_path):
    writer = Writer(tmp_path, 0)
    writer.write(7, loss=1.5, mfu=0.25)
    writer.write_text(7, "sample", "once upon")
    writer.close()
    [path] = (tmp_path / "tensorboard").iterdir()
    values = events(path)
    assert values["loss"][0] == 7
    assert values["loss"][1].simple_value == 1.5
    assert values["mfu"][1].simple_value == 0.25
    assert "sample/text_summary" in values


def test_texts_are_kept_as_metrics_are(tmp_path):
    first = Writer(tmp_path, 0)
    for step in (0, 5, 10):
        first.write_text(step, "sample", f"a\n{step}\u2028b")
    first.close()
    Writer(tmp_path, 5).close()
    assert read_metrics(tmp_path / "samples.jsonl") == [
        {"step": 0, "sample": "a\n0\u2028b"},
        {"step": 5, "sample": "a\n5\u2028b"},
    ]


class FakeWandb(types.ModuleType):
    """As much of the package as is called, which keeps what it is told."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0
        self.Html = lambda text: ("html", text)

    def init(self, **kwargs):
        self.inits.append(kwargs)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_weights_and_biases_has_the_same(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 2):
        writer = Writer(tmp_path, start, wandb_project="gpt", config={"steps": 9})
        writer.write(start + 1, loss=1.5)
        writer.write_text(start + 1, "sample", "<a> & b")
        writer.close()
    assert wandb.finished == 2
    assert wandb.logged[:2] == [
        (1, {"loss": 1.5}),
        (1, {"sample": ("html", "<pre>&lt;a&gt; &amp; b</pre>")}),
    ]
    first, second = wandb.inits
    assert first == second  # with the same id: it goes on
    assert first["id"] == (tmp_path / "wandb_id").read_text()
    said = {name: first[name] for name in ("project", "name", "config", "resume")}
    assert said == {
        "project": "gpt",
        "name": tmp_path.name,
        "config": {"steps": 9},
        "resume": "allow",
    }
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]


def test_weights_and_biases_that_is_missing_or_refuses_is_one_line(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"'gpt' needs the package wandb: pip install"):
        Writer(tmp_path, 0, wandb_project="gpt")
    wandb = FakeWandb()

    def refuse(**_):
        raise wandb.Error("no API key")

    wandb.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ValueError, match="wandb_project='gpt': no API key"):
        Writer(tmp_path, 0, wandb_project="gpt")
    assert not (tmp_path / "metrics.jsonl").exists()


@dataclasses.dataclass
class FakeDevice:
    stats: dict[str, int] | None

    def memory_stats(self):
        return self.stats


def test_memory_is_that_of_the_fullest_device_or_else_of_the_process(monkeypatch):
    kind, peak = memory_in_use()
    assert kind == "host_peak_bytes"
    assert 50 * 2**20 < peak < 100 * 2**30  # an interpreter with JAX in it
    devices = [FakeDevice({"peak_bytes_in_use": n}) for n in (3, 7)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_in_use() == ("device_peak_bytes", 7)


def test_the_line_of_a_step():
    values = {
        **{"loss": 4.5, "grad_norm": 0.25, "learning_rate": 1e-3, "skipped": 0.0},
        "host_peak_bytes": 3 * 2**29,
    }
    expected = "step 1/9: loss 4.5000, gradient norm 0.25, learning rate 0.001"
    assert log_line(1, 9, values, "") == f"{expected}, host 1.50 GiB"
    values |= {"step_seconds": 0.125, "tokens_per_second": 12345.6, "mfu": 0.3}
    values |= {"data_wait": 0.01, "skipped": 2.0}
    assert log_line(1, 9, values, "00:30") == (
        f"{expected}, 2 skipped, 125 ms, 12,346 tokens/s, MFU 30.0%, data wait 1.0%, "
        "host 1.50 GiB, 00:30 left"
    )


BAD_LINES = [
    (b"\xff\xfe\n", "not UTF-8"),
    (b"\0\0\0\n", "not JSON"),
    (b"[1]\n", r"\[1\] is not an object"),
    (b"5\n", "5 is not an object"),
    (b"null\n", "None is not an object"),
    (b'{"step": 2, "lo\n', "not JSON"),
    (b'{"loss": 1.0}\n', "step=None is not a number of updates"),
    (b'{"step": "2"}\n', "step='2' is not a number of updates"),
    (b'{"step": true}\n', "step=True is not a number of updates"),
    (b'{"step": -1}\n', "step=-1 is not a number of updates"),
    (b'{"step": 2, "loss": "low"}\n', "'loss' is 'low', no number"),
    (b'{"step": 2, "loss": null}\n', "'loss' is None, no number"),
    (b'{"step": 2, "loss": ' + b"9" * 400 + b"}\n", "'loss' is an integer of .* bits"),
    (b"[" * 100_000 + b"\n", "nested too deep"),
    (b'"' + b"x" * LINE_BYTES + b"\n", "longer than 16,777,216 bytes"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_a_bad_line_costs_nothing_but_itself(tmp_path, capsys, line, why):
    good = [{"step": 1, "loss": 1.5}, {"step": 3, "loss": math.inf}, {"step": 4}]
    lines = [json.dumps(r).encode() + b"\n" for r in good]
    path = tmp_path / "metrics.jsonl"
    before = lines[0] + line + lines[1] + b"\0\0" + lines[2].strip()
    path.write_bytes(before)
    assert read_metrics(path) == good
    [note] = capsys.readouterr().err.splitlines()
    assert re.match(rf"note: left out {re.escape(str(path))}, line 2: .*{why}", note)
    assert len(note) < 500
    Writer(tmp_path, 3).close()
    [note] = capsys.readouterr().err.splitlines()
    aside = tmp_path / "metrics.jsonl.damaged"
    assert note.endswith(f"; {aside} is the file as it was")
    assert aside.read_bytes() == before
    assert path.read_bytes() == lines[0] + lines[1]
    assert read_metrics(path) == good[:2]
    assert capsys.readouterr().err == ""


def test_what_follows_a_line_that_was_cut_is_kept(tmp_path):
    path = tmp_path / "environment.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 5, "comm')
    append_record(path, {"step": 9, "fresh": True})
    append_record(path, {"step": 12})
    assert [r["step"] for r in read_metrics(path)] == [0, 9, 12]


@pytest.mark.parametrize("days", [-30, 30])
def test_a_clock_that_jumps_delays_nothing(tmp_path, monkeypatch, days):
    """In a thread of its own: what waits for ever would stop the tests."""
    real = time.time

    def write():
        writer = Writer(tmp_path, 0)
        writer.write(1, loss=1.0)
        monkeypatch.setattr(time, "time", lambda: real() + 86400 * days)
        for step in range(2, 60):
            writer.write(step, loss=1.0, mfu=0.5)
        writer.close()
        Writer(tmp_path, 40).close()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    assert events(first)["mfu"][0] == 59
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        *range(1, 41)
    ]
    # TensorBoard goes by the names: the later file hides what the first has too much
    assert events(second) == {}


def test_records_that_cannot_be_written_end_no_training(tmp_path, capsys, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(metrics, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(wandb, "finish", threading.Event().wait)  # for ever
    writer = Writer(tmp_path, 0, wandb_project="gpt")
    monkeypatch.setattr(wandb, "log", None)
    for step in (1, 2):
        writer.write(step, loss=1.0)
    monkeypatch.setattr(wandb, "log", lambda *_, **__: None)
    writer.close()
    [note] = capsys.readouterr().err.splitlines()
    assert "goes on without all of its records: WeightsAndBiases: " in note
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    writer = Writer(tmp_path, 2, wandb_project="gpt")
    writer.close()
    [note] = capsys.readouterr().err.splitlines()
    assert "no answer in 0.1 seconds: `wandb sync` sends the rest" in note
