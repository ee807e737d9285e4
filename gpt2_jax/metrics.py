"""What a run writes down: metrics, throughput, a loss curve."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gpt2_jax.chips import chip_of
from gpt2_jax.config import GPT2Config


def flops_per_token(
    cfg: GPT2Config, n_params: int, block_size: int, *, per_param: int = 6
) -> int:
    """Training FLOPs per token: 6N + 12LDT, or 4N where most of N have no gradient.

    N is the number of parameters without position embeddings, L layers, D width,
    T tokens of context. Source: PaLM, https://arxiv.org/abs/2204.02311, appendix B.
    """
    n = n_params - cfg.n_positions * cfg.n_embd
    return per_param * n + 12 * cfg.n_layer * cfg.n_embd * block_size


def peak_flops(dtype: Any) -> tuple[float, str]:
    """Peak FLOP/s of one device, and where the figure is from.

    The maker's bfloat16 figure for a known accelerator, else the best of a few
    2048 x 2048 matrix products in `dtype` that are measured on the spot.
    """
    kind = jax.devices()[0].device_kind
    if chip := chip_of(kind):
        return chip.peak_flops, f"{kind}, bfloat16, published"
    n = 2048
    x = jnp.ones((n, n), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Devices that share one host, as fake CPU devices do, share this figure too.
    share = jax.local_device_count() if jax.default_backend() == "cpu" else 1
    peak = 2 * n**3 / min(seconds) / share
    return peak, f"{n} x {n} {jnp.dtype(dtype).name} matrix product, measured"


class Writer:
    """Metrics of a run: JSON Lines and TensorBoard events in its folder.

    A resumed run goes on in the same files: what was written for steps after
    `start_step` is taken out first, so that each step stands there once. A run that
    starts at step 0 writes that step itself.
    """

    def __init__(self, workdir: Path, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        end = start_step + 1 if start_step else 0  # of what is kept
        kept = [r for r in read_metrics(path) if r["step"] < end]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        temporary.replace(path)
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=end)

    def write(self, step: int, **values: float) -> None:
        """One record {"step": ..., name: value, ...}."""
        self._lines.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def write_text(self, step: int, name: str, text: str) -> None:
        self._board.add_text(name, text, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics.jsonl; a last line that was cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plot_losses(metrics_path: Path, png_path: Path) -> None:
    """Draws training and validation loss over steps as a PNG."""
    from matplotlib.figure import Figure

    records = read_metrics(metrics_path)
    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, label, style in (
        ("loss", "training", dict(linewidth=1, alpha=0.8)),
        ("val_loss", "validation", dict(linewidth=1.5, marker="o", markersize=3.5)),
    ):
        points = [(r["step"], r[name]) for r in records if name in r]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, label=f"{label} (last {y[-1]:.3f})", **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(png_path)
