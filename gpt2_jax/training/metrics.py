"""What a run writes down: metrics, throughput, memory, samples."""

import html
import json
import resource
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from gpt2_jax.checks import one_line
from gpt2_jax.config import GPT2Config
from gpt2_jax.runtime.chips import chip_of
from gpt2_jax.training.records import cut_records

EXPECTED_MFU = 0.4  # where it is not measured
FLUSH_SECONDS = 10  # until TensorBoard sees an event, at most
CLOSE_SECONDS = 30  # in which W&B must have taken what is left


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
    1024 x 1024 matrix products in `dtype` that are measured on the spot.
    """
    kind = jax.devices()[0].device_kind
    if chip := chip_of(kind):
        return chip.peak_flops, f"{kind}, bfloat16, published"
    n = 1024
    x = jnp.ones((n, n), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    # Devices that share one host, as fake CPU devices do, share this figure too.
    share = jax.local_device_count() if jax.default_backend() == "cpu" else 1
    peak = 2 * n**3 / min(seconds) / share
    return peak, f"{n} x {n} {jnp.dtype(dtype).name} matrix product, measured"


def memory_in_use() -> tuple[str, int]:
    """The most that was ever in use here, in bytes, and what it is.

    - device_peak_bytes: what JAX allocated on a local device, the fullest of them;
      without what its pool keeps in reserve.
    - host_peak_bytes: the resident set of this process, where devices do not say.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return "device_peak_bytes", max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "host_peak_bytes", unit * peak


class Sink(Protocol):
    """A place where a run's numbers and texts go, steps ascending."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def write_text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl, and texts in samples.jsonl: {"step": ..., name: value, ...}."""

    def __init__(self, workdir: Path, start_step: int, *, due: bool) -> None:
        def is_kept(record: Mapping[str, Any]) -> bool:
            is_training = "loss" in record
            return record["step"] < start_step + (is_training or not due)

        paths = workdir / "metrics.jsonl", workdir / "samples.jsonl"
        for path in paths:
            cut_records(path, is_kept)
        self._metrics, self._texts = (
            path.open("a", buffering=1, encoding="utf-8") for path in paths
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")

    def write_text(self, step: int, name: str, text: str) -> None:
        self._texts.write(json.dumps({"step": step, name: text}) + "\n")

    def close(self) -> None:
        self._metrics.close()
        self._texts.close()


class TensorBoard:
    """Event files in the folder `tensorboard`.

    They are written by the thread that calls, with no queue between: nothing is lost
    or waits for ever when a thread of a library has ended.
    """

    def __init__(self, workdir: Path, end: int) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        folder = (workdir / "tensorboard").absolute()
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of these numbers, which must go on where
        # the clock was set back.
        numbers = (path.name.split(".")[3:4] for path in folder.glob("events.out.*"))
        last = max(
            (int(n) for [n] in numbers if n.isascii() and n.isdigit()), default=0
        )
        number = max(int(time.time()), last + 1)
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}"
        self._event, self._summary = Event, summary
        self._file = RecordWriter(str(folder / name))
        self._flushed = time.monotonic()
        self._add(end, file_version="brain.Event:2")
        # It hides what earlier files hold of these steps.
        self._add(end, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step: int, **content: Any) -> None:
        event = self._event(wall_time=time.time(), step=step, **content)
        self._file.write(event.SerializeToString())
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(step, summary=self._summary.scalar(name, value))

    def write_text(self, step: int, name: str, text: str) -> None:
        # TensorBoard shows Markdown: indented, a text stays as it is.
        lines = text.splitlines() or [""]
        text = "\n".join(f"    {x}" for x in lines)
        self._add(step, summary=self._summary.text(name, text))

    def close(self) -> None:
        self._file.flush()
        self._file.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a call of `train` that resumes goes on with.

    It drops what is written for steps that it has: as they are computed again to the
    same bits, nothing is lost. Mode, entity and server are as WANDB_* say.

    Raises:
      ValueError: without the package, or where W&B refuses.
    """

    def __init__(self, workdir: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError(
                f"wandb_project={project!r} needs the package wandb: "
                "pip install 'gpt2-jax[wandb]'"
            ) from None
        path = workdir / "wandb_id"
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self._html = wandb.Html
        try:
            self._run = wandb.init(
                project=project,
                id=path.read_text(encoding="utf-8"),
                name=workdir.name,
                dir=workdir,
                config=dict(config),
                resume="allow",
            )
        except wandb.Error as error:
            raise ValueError(f"wandb_project={project!r}: {error}") from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def write_text(self, step: int, name: str, text: str) -> None:
        page = self._html(f"<pre>{html.escape(text)}</pre>")
        self._run.log({name: page}, step=step)

    def close(self) -> None:
        # It waits for a server, and without end for one that does not answer.
        thread = _Finishing(self._run.finish)
        thread.start()
        thread.join(CLOSE_SECONDS)
        if thread.error is not None:
            raise thread.error
        if thread.is_alive():
            raise TimeoutError(
                f"no answer in {CLOSE_SECONDS} seconds: `wandb sync` sends the rest"
            )


class _Finishing(threading.Thread):
    """A call that may never return."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:  # raised again by who waits for it
            self.error = error


class Writer:
    """Metrics and samples of a run: in its folder, and on Weights & Biases if asked.

    A resumed run goes on in the same files: what was written for steps after
    `start_step` is taken out first, so that each step stands there once. What can't be
    written is said once, and ends no training.

    Args:
      due: whether the evaluation of `start_step` is still to come; what there is of one
        is taken out too.
      wandb_project: of Weights & Biases; "": none.
      config: what it shows as the run's.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        *,
        due: bool = False,
        wandb_project: str = "",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        end = start_step + (start_step > 0 or not due)  # of what TensorBoard keeps
        self._sinks: list[Sink] = []
        self._noted: list[Sink] = []  # those of which it was said that they failed
        if wandb_project:
            self._sinks.append(WeightsAndBiases(workdir, wandb_project, config or {}))
        self._sinks += [
            JsonLines(workdir, start_step, due=due),
            TensorBoard(workdir, end),
        ]

    def write(self, step: int, **values: float) -> None:
        self._each(lambda sink: sink.write(step, values))

    def write_text(self, step: int, name: str, text: str) -> None:
        self._each(lambda sink: sink.write_text(step, name, text))

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            try:
                call(sink)
            except Exception as error:  # those of W&B have no base in common
                if sink not in self._noted:
                    self._noted.append(sink)
                    what = f"{type(sink).__name__}: {one_line(error)}"
                    text = f"note: the run goes on without all of its records: {what}"
                    print(text, file=sys.stderr, flush=True)


def log_line(step: int, steps: int, values: Mapping[str, float], left: str) -> str:
    """What a log says of a step: the metrics of it, and how long the rest takes."""
    parts = [
        f"loss {values['loss']:.4f}",
        f"gradient norm {values['grad_norm']:.3g}",
        f"learning rate {values['learning_rate']:.3g}",
    ]
    if values["skipped"]:
        parts.append(f"{values['skipped']:.0f} skipped")
    if "mfu" in values:
        parts += [
            f"{1000 * values['step_seconds']:.3g} ms",
            f"{values['tokens_per_second']:,.0f} tokens/s",
            f"MFU {values['mfu']:.1%}",
            f"data wait {values['data_wait']:.1%}",
        ]
    for name in ("device", "host"):
        if peak := values.get(f"{name}_peak_bytes"):
            parts.append(f"{name} {peak / 2**30:.2f} GiB")
    if left:
        parts.append(f"{left} left")
    return f"step {step}/{steps}: " + ", ".join(parts)
