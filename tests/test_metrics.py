import json

import jax.numpy as jnp
from tensorboardX.proto.event_pb2 import Event

from gpt2_jax.config import GPT2Config
from gpt2_jax.metrics import (
    Writer,
    flops_per_token,
    peak_flops,
    plot_losses,
    read_metrics,
)


def test_flops_by_hand():
    # 6 (124,439,808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(GPT2Config(), 124_439_808, 1024) == 855_166_464


def test_peak_of_an_unknown_device_is_measured():
    peak, source = peak_flops(jnp.float32)
    assert 1e8 < peak < 1e14
    assert source == "2048 x 2048 float32 matrix product, measured"


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


def test_tensorboard_events_hold_the_values(tmp_path):
    writer = Writer(tmp_path, 0)
    writer.write(7, loss=1.5, mfu=0.25)
    writer.write_text(7, "sample", "once upon")
    writer.close()
    [path] = (tmp_path / "tensorboard").iterdir()
    content, values = path.read_bytes(), {}
    while content:  # length (8), its checksum (4), event, its checksum (4)
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        values |= {v.tag: (event.step, v) for v in event.summary.value}
        content = content[16 + size :]
    assert values["loss"][0] == 7
    assert values["loss"][1].simple_value == 1.5
    assert values["mfu"][1].simple_value == 0.25
    assert "sample/text_summary" in values


def test_the_curve_is_a_png_of_both_losses(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    records = [{"step": i, "loss": 5 / (i + 1)} for i in range(20)]
    records += [{"step": 10, "val_loss": 1.0}]
    metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    plot_losses(metrics, tmp_path / "with.png")
    metrics.write_text("")
    plot_losses(metrics, tmp_path / "without.png")
    drawn, empty = (tmp_path / n for n in ("with.png", "without.png"))
    assert drawn.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert drawn.stat().st_size > empty.stat().st_size + 1000
