import json
import re
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest

from gpt2_jax.training.plot import _running_median, draw_curves, legend


def run(folder: Path, losses, config=None, **more) -> Path:
    """A run's folder with a loss a step, and a validation loss each ten."""
    folder.mkdir(parents=True)
    records = [
        {"step": i, "tokens": 512 * i, "loss": loss, "learning_rate": 1e-3, **more}
        for i, loss in enumerate(losses, 1)
    ]
    records += [
        {"step": i, "tokens": 512 * i, "val_loss": losses[i - 1] + 1}
        for i in range(10, len(losses) + 1, 10)
    ]
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


@pytest.fixture
def figure(monkeypatch):
    """The figure that is saved last."""
    saved = []
    save = matplotlib.figure.Figure.savefig

    def savefig(self, *args, **kwargs):
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return lambda: saved[-1]


def test_one_run(tmp_path, figure):
    losses = np.linspace(5, 3, 40)
    draw_curves([run(tmp_path / "mine", losses)], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    top, bottom = figure().axes
    assert figure().get_suptitle() == "mine"
    train, validation = top.lines
    np.testing.assert_array_equal(train.get_ydata(), losses)
    np.testing.assert_array_equal(validation.get_xdata(), [10, 20, 30, 40])
    np.testing.assert_array_equal(validation.get_ydata(), losses[9::10] + 1)
    np.testing.assert_array_equal(bottom.lines[0].get_ydata(), 40 * [1e-3])
    assert top.get_ylabel() == "loss (nats per token)"
    assert bottom.get_ylabel() == "learning rate"
    assert bottom.get_xlabel() == "step (updates)"
    said = [text.get_text() for text in top.get_legend().get_texts()]
    assert said == ["training: 3.000", "validation: 4.000"]


def test_several_runs_are_told_apart_by_what_differs(tmp_path, figure):
    shared = {"steps": 40, "data": {"path": "x"}}
    slow = shared | {"optim": {"learning_rate": 1e-3, "name": "adamw"}}
    fast = shared | {"optim": {"learning_rate": 2e-3, "name": "adamw"}}
    runs = [
        run(tmp_path / "slow", np.linspace(5, 3, 40), slow),
        run(tmp_path / "fast", np.concatenate([np.linspace(5, 1, 30), 10 * [2]]), fast),
    ]
    draw_curves(runs, tmp_path / "a.png", x="tokens")
    top, bottom = figure().axes
    assert bottom.get_xlabel() == "tokens seen in training"
    np.testing.assert_array_equal(top.lines[1].get_xdata(), [5120, 10240, 15360, 20480])
    [below] = figure().legends
    assert [text.get_text() for text in below.get_texts()] == [
        "slow: optim.learning_rate=0.001; validation: 4.000",
        "fast: optim.learning_rate=0.002; validation: 3.000, least 2.000",
    ]
    colors = [handle.get_color() for handle in below.legend_handles]
    assert [line.get_color() for line in top.lines[1::2]] == colors
    assert [line.get_color() for line in bottom.lines] == colors


def test_what_is_not_finite_is_left_out(tmp_path, figure):
    losses = np.linspace(5, 3, 40)
    losses[[9, 25, 29]] = np.nan, np.nan, -np.inf  # at 10 and 30 there is validation
    draw_curves([run(tmp_path / "mine", losses)], tmp_path / "a.png")
    train, validation = figure().axes[0].lines
    np.testing.assert_array_equal(train.get_ydata(), losses[np.isfinite(losses)])
    np.testing.assert_array_equal(validation.get_xdata(), [20, 40])
    said = figure().axes[0].get_legend().get_texts()[1].get_text()
    assert said == "validation: 4.000"


def test_names_where_much_or_nothing_differs(tmp_path):
    many = [{k: f"{i}{'x' * 50}" for k in "abcde"} for i in range(2)]
    runs = [run(tmp_path / f"{i}/same", [1.0], c) for i, c in enumerate(many)]
    said = legend(runs)[0]
    assert said.startswith(f"{runs[0]}: a=…xxx")
    assert said.endswith("xxx, and 2 more")
    assert legend([run(tmp_path / n, [1.0]) for n in ("a", "b")]) == ["a", "b"]
    with pytest.raises(ValueError, match="a run is given twice"):
        legend([tmp_path / "a", tmp_path / "b/../a"])


def test_the_end_of_a_long_run_is_not_a_flat_line(tmp_path, figure):
    losses = 3 + 8 * 0.9 ** np.arange(1000)
    losses[700] = 100  # a spike
    draw_curves([run(tmp_path / "a", losses)], tmp_path / "a.png")
    top, _ = figure().axes
    low, high = top.get_ylim()
    assert 2.9 < low < 3.0
    assert 3.9 < high < 5  # validation is one above
    assert top.get_title("left") == "↑ up to 100"
    said = top.get_legend().get_texts()[0].get_text()
    assert said == "training, median of 21 records: 3.000"


def test_the_running_median():
    x = np.arange(300.0)
    y = x.copy()
    _, median, n = _running_median(x, y)
    assert n == 1 + 2 * (300 // 100)
    # mirrored at the ends: of 0, 1, 1, 2, 2, 3, 3, and of their like
    assert median[0] == 2
    assert median[-1] == 297
    np.testing.assert_array_equal(median[3:-3], x[3:-3])
    assert _running_median(x[:99], x[:99])[2] == 1


def test_what_can_not_be_drawn(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"is no run's folder: no metrics.jsonl"
    ):
        draw_curves([tmp_path], tmp_path / "a.png")
    (tmp_path / "metrics.jsonl").touch()
    draw_curves([tmp_path], tmp_path / "empty.png")  # of a run that just began
    assert (tmp_path / "empty.png").exists()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    draw_curves([tmp_path], tmp_path / "nan.png")
    message = f"{tmp_path}/metrics.jsonl does not tell the tokens of each record"
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_curves([tmp_path], tmp_path / "a.png", x="tokens")
    with pytest.raises(ValueError, match="11 runs are more than 10"):
        draw_curves(11 * [tmp_path], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_names_are_shown_as_they_are(tmp_path, figure):
    """No formulas, no warnings of missing glyphs, no lines of their own."""
    names = ["a$x_1$ b^2", "_$1 run", "\u65e5\u672c \\frac%s{0}", "two\nlines\x1b[2J"]
    runs = [run(tmp_path / name, [3.0] * 12, {"key$": name}) for name in names]
    draw_curves(runs, tmp_path / "a.png")
    legend = figure().legends[0].get_texts()
    assert [text.get_text().split(": ")[0] for text in legend] == [
        "a$x_1$ b^2",
        " _$1 run",
        "\u65e5\u672c \\frac%s{0}",
        "two lines\\x1b[2J",
    ]
    assert not any(text.get_parse_math() for text in legend)
    for path in runs:
        draw_curves([path], tmp_path / "b.png")
        assert not figure()._suptitle.get_parse_math()
