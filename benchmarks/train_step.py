"""Time of a training step beside nanoGPT's, eager and compiled.

python benchmarks/train_step.py
python benchmarks/train_step.py --nanogpt=FOLDER --torch=PYTHON --rounds=5
python benchmarks/train_step.py --nanogpt=FOLDER --torch=PYTHON --only=char
python benchmarks/train_step.py --nanogpt=FOLDER --torch=PYTHON --gpu

FOLDER holds nanoGPT's model.py, PYTHON is an interpreter that has torch. A round starts
a process a contestant, in turn, on random characters: ours by scripts/train.py, whose
own metrics give the time, and nanoGPT's model in the loop below. Time is the median of
steps after warm-up; a step draws the batch, updates, and fetches the loss. A ratio is
our time over the better one of theirs in that round.

On CPUs all is float32, in nanoGPT's character setting and as GPT-2 124M. With --gpu it
is bfloat16, GPT-2 at T = 1024, nanoGPT compiled, with flash attention. Each has the
largest batch that fits: one that does not is halved. MFU is (6N + 12LDT) tokens/s over
the speed of an 8192 x 8192 product of random numbers measured there.
"""

import json
import os
import random
import re
import signal
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from gpt2_jax.training.records import read_metrics

_ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes of each kind, in turn.")
_ONLY = flags.DEFINE_string("only", "", "Settings that match this regex.")
_NANOGPT = flags.DEFINE_string("nanogpt", None, "Folder of nanoGPT's model.py.")
_TORCH = flags.DEFINE_string("torch", sys.executable, "A Python that has torch.")
_GPU = flags.DEFINE_bool("gpu", False, "In bfloat16 on a GPU, the largest batches.")

ROOT = Path(__file__).resolve().parents[1]
ALPHABET = string.ascii_letters + string.digits + " .\n"  # and an end of text


class Setting(NamedTuple):
    name: str
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    n_positions: int
    batch_size: int
    block_size: int
    steps: int
    bias: bool = True
    remat: str = "none"
    most: int = 0  # of nanoGPT's rows on a GPU: what its first trial has

    @property
    def warm_up(self) -> int:
        return self.steps // 3


GPT2 = (12, 12, 768, 50257, 1024)
SETTINGS = [
    Setting("char, 12 x 64", 4, 4, 128, 66, 64, 12, 64, 300, bias=False),
    Setting("124M, 1 x 512", *GPT2, 1, 512, 9),
    Setting("124M, 4 x 64", *GPT2, 4, 64, 12),
]
# Ours and nanoGPT begin with the largest power of 2 that 80 GB hold.
GPU_SETTINGS = [
    Setting("124M", 12, 12, 768, 50304, 1024, 128, 1024, 30, most=64),
    Setting("355M", 24, 16, 1024, 50304, 1024, 64, 1024, 15, most=32),
    Setting("1558M", 48, 25, 1600, 50304, 1024, 32, 1024, 9, remat="dots", most=8),
]

NANOGPT = """
import json, statistics, sys, time
import numpy as np, torch
folder, how, gpu, s = sys.argv[1], sys.argv[2], sys.argv[3] == "True", json.loads(
    sys.argv[4])
sys.path.insert(0, folder)
from model import GPT, GPTConfig

device = "cuda" if gpu else "cpu"
torch.set_float32_matmul_precision("high" if gpu else "highest")
data = np.random.default_rng(0).integers(0, 65, 900_000).astype(np.uint16)
torch.manual_seed(0)
sizes = {k: s[k] for k in ("n_layer", "n_head", "n_embd", "vocab_size", "bias")}
model = GPT(GPTConfig(**sizes, block_size=s["n_positions"], dropout=0.0)).to(device)
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
if how == "compiled":
    model = torch.compile(model)
B, T = s["batch_size"], s["block_size"]
half = torch.autocast(device, torch.bfloat16, enabled=gpu)

def batch():
    starts = torch.randint(len(data) - T, (B,))
    x = torch.stack([torch.from_numpy(data[i : i + T + 1].astype(int)) for i in starts])
    if gpu:
        x = x.pin_memory().to(device, non_blocking=True)
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()

seconds, xy = [], batch()
for step in range(s["steps"]):
    start = time.perf_counter()
    with half:
        _, loss = model(*xy)
    xy = batch()  # while a GPU is at it
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()
    seconds.append(time.perf_counter() - start)
print(json.dumps(1e3 * statistics.median(seconds[s["steps"] // 3:])))
"""

PEAK = """
import jax, jax.numpy as jnp, time
x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
f = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.bfloat16))
f(x).block_until_ready()
best = 1e9
for _ in range(20):
    start = time.perf_counter()
    f(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
print(2 * 8192**3 / best)
"""


def run(command: list[str]) -> str | None:
    """What it prints, or None when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return failed(command, done.stderr) if done.returncode else done.stdout


def failed(command: list[str], log: str) -> None:
    """Prints the error, or the last line, of a log."""
    lines = [line for line in log.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if re.search("Error|RESOURCE_EXHAUSTED", line)]
    print(
        f"  {Path(command[0]).name} failed: {[*lines, *errors][-1][:150]}", flush=True
    )


def ours(text: Path, s: Setting, how: str) -> float | None:
    """Milliseconds of a step in a fresh run, which is killed after its last one."""
    with tempfile.TemporaryDirectory() as workdir:
        model = {
            name: getattr(s, name)
            for name in ("n_layer", "n_head", "n_embd", "n_positions", "bias")
        }
        model["vocab_size"] = s.vocab_size
        dtype = "bfloat16" if _GPU.value else "float32"
        command = [
            *(sys.executable, str(ROOT / "scripts/train.py")),
            f"--config={ROOT}/configs/shakespeare_char.py",
            *(f"--workdir={workdir}", f"--config.data.path={text}"),
            "--config.data.splits=(1.0, 0.0, 0.0)",
            *(f"--config.model.{name}={value}" for name, value in model.items()),
            *(f"--config.batch_size={s.batch_size}", f"--config.dtype={dtype}"),
            *(f"--config.block_size={s.block_size}", f"--config.remat={s.remat}"),
            # A run of small steps is not one that writes a record after each of them.
            f"--config.log_every={max(1, s.steps // 30)}",
            "--config.optim.warmup_steps=2",
        ]
        log = Path(workdir) / "log"
        with log.open("w", encoding="utf-8") as file:
            environ = {"XLA_CLIENT_MEM_FRACTION": "0.95", **os.environ}
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environ)
        metrics = Path(workdir) / "metrics.jsonl"
        records: list[dict] = []
        while process.poll() is None and (not records or records[-1]["step"] < s.steps):
            time.sleep(0.2)
            records = read_metrics(metrics)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            return failed(command, log.read_text(encoding="utf-8"))
    timed = [r for r in records if "step_seconds" in r and r["step"] > s.warm_up]
    return 1e3 * statistics.median(r["step_seconds"] for r in timed)


def nanogpt(text: Path, s: Setting, how: str) -> float | None:
    words = [_NANOGPT.value, how, str(_GPU.value), json.dumps(s._asdict())]
    out = run([_TORCH.value, "-c", NANOGPT, *words])
    return None if out is None else json.loads(out.splitlines()[-1])


def contestants() -> dict[str, tuple]:
    mine = {"ours": (ours, "")}
    if not _NANOGPT.value:
        return mine
    theirs = {"nanoGPT compiled": (nanogpt, "compiled")}
    if not _GPU.value:
        theirs["nanoGPT eager"] = (nanogpt, "eager")
    return mine | theirs


def largest(time_of, text: Path, s: Setting, how: str) -> tuple[float, int]:
    """Tokens a second of the largest batch that fits, and that batch."""
    while s.batch_size:
        if ms := time_of(text, s, how):
            return 1e3 * s.batch_size * s.block_size / ms, s.batch_size
        s = s._replace(batch_size=s.batch_size // 2)
    return 0.0, 0


def on_gpu(text: Path, settings: list[Setting]) -> None:
    peak = float(str(run([sys.executable, "-c", PEAK])).splitlines()[-1])
    print(f"peak of a product here: {peak / 1e12:.0f} TFLOP/s in bfloat16")
    for s in settings:
        n_params = s.vocab_size * s.n_embd + s.n_layer * 12 * s.n_embd**2
        flops = 6 * n_params + 12 * s.n_layer * s.n_embd * s.block_size
        found: dict[str, list[float]] = {}
        for round_ in range(1, _ROUNDS.value + 1):
            for name, (time_of, how) in contestants().items():
                first = s._replace(batch_size=s.most) if how else s
                rate, batch = largest(time_of, text, first, how)
                found.setdefault(name, []).append(rate)
                print(
                    f"{s.name}, round {round_}: {name} {rate:,.0f} tokens/s with "
                    f"{batch} x {s.block_size}, MFU {rate * flops / peak:.1%}",
                    flush=True,
                )
        mine, *theirs = (statistics.median(rates) for rates in found.values())
        if theirs:
            print(f"{s.name}: {mine / theirs[0]:.2f} times as fast", flush=True)


def on_cpu(text: Path, settings: list[Setting]) -> None:
    for s in settings:
        ratios = []
        for round_ in range(1, _ROUNDS.value + 1):
            times = {
                name: time_of(text, s, how)
                for name, (time_of, how) in contestants().items()
            }
            said = [f"{k} {ms:.1f} ms" for k, ms in times.items() if ms is not None]
            mine, *theirs = times.values()
            theirs = [ms for ms in theirs if ms is not None]
            if mine is not None and theirs:
                ratios.append(mine / min(theirs))
                said.append(f"ratio {ratios[-1]:.2f}")
            print(f"{s.name}, round {round_}: {', '.join(said)}", flush=True)
        if ratios:
            print(f"{s.name}: median ratio {statistics.median(ratios):.2f}", flush=True)


def main(_: list[str]) -> None:
    rng = random.Random(0)
    settings = GPU_SETTINGS if _GPU.value else SETTINGS
    settings = [s for s in settings if re.search(_ONLY.value, s.name)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("".join(rng.choices(ALPHABET, k=1_000_000)))
        file.flush()
        (on_gpu if _GPU.value else on_cpu)(Path(file.name), settings)


if __name__ == "__main__":
    app.run(main)
