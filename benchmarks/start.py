"""Seconds from the start of Python to the end of the first update, cold and warm.

python benchmarks/start.py
python benchmarks/start.py --layers=12,48 --n_embd=64 --scan --rounds=3

Cold: nothing is compiled yet. Warm: the same command once more, with the programs that
the first one left in JAX's persistent compilation cache. A process imports gpt2_jax,
makes parameters and optimizer state, and updates them once, as the trainer does; data
and checkpoints are left out. Beside all of it stands what came after the imports
(jitting: to trace, lower, compile and run), and what of that went into compiling, or
into reading what was compiled. --scan takes the form that accelerators get, on a CPU
too.
"""

import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from gpt2_jax.commands import cli
from gpt2_jax.runtime import sharding
from gpt2_jax.runtime.platform import traced_for
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.training import optim
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.setup import make_model
from gpt2_jax.training.step import init_state, jit_step

DEFAULT = Path(__file__).resolve().parents[1] / "configs/default.py"

_LAYERS = flags.DEFINE_list("layers", ["12", "48"], "Depths, measured in turn.")
_N_EMBD = flags.DEFINE_integer("n_embd", 64, "A head has 64 of it.")
_VOCAB = flags.DEFINE_integer("vocab_size", 512, "Of the model.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "A step has one text of so many.")
_SCAN = flags.DEFINE_bool("scan", False, "Layers are scanned, also on a CPU.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each depth.")
_WORKER = flags.DEFINE_integer("worker", None, "(Internal) starts this depth.")


class Start(NamedTuple):
    """Seconds."""

    all: float
    jitting: float  # after all imports
    compiling: float


def work(n_layer: int) -> None:
    import jax  # which gpt2_jax has imported, as in the scripts

    begun, compiling = time.time(), []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith("/backend_compile_duration"):
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    T, n_embd = _TOKENS.value, _N_EMBD.value
    c = runpy.run_path(str(DEFAULT))["get_config"]()
    c.update(batch_size=1, block_size=T)
    c.model.update(n_layer=n_layer, n_embd=n_embd, n_head=max(1, n_embd // 64))
    cfg = TrainConfig.from_dict(c.to_dict())
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    model = make_model(cfg, NoTokenizer(_VOCAB.value, None, "none is needed"), mesh)
    model = model.clone(scan_layers=model.scan_layers or _SCAN.value)
    optimizer = optim.make_optimizer(cfg.optim, cfg.steps)
    with traced_for("tpu") if _SCAN.value else nullcontext():
        state = init_state(model, optimizer, mesh, seed=0)
        step = jit_step(cfg, model, optimizer, state, mesh, _VOCAB.value)
        jax.block_until_ready(step(state, np.zeros((1, 1, T + 1), np.int32)))
    ended = time.time()
    print(json.dumps([ended, ended - begun, sum(compiling)]))


def start(n_layer: int, cache: str) -> Start:
    environ = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    # Modules are compiled once, not at each start.
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    begun = time.time()
    printed = subprocess.run(
        [sys.executable, *sys.argv, f"--worker={n_layer}", "--verbosity=-1"],
        env=environ,
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    ended, *parts = json.loads(printed)
    return Start(ended - begun, *parts)


def main(_: list[str]) -> None:
    if _WORKER.value is not None:
        return work(_WORKER.value)
    found: dict[int, list[tuple[Start, Start]]] = {int(n): [] for n in _LAYERS.value}
    for _round in range(_ROUNDS.value):
        for n_layer, pairs in found.items():
            with tempfile.TemporaryDirectory() as cache:
                pairs.append((start(n_layer, cache), start(n_layer, cache)))
    print(f"{'layers':>6} {'of it':9} {'cold':>7} {'warm':>7}  ratio")
    for n_layer, pairs in found.items():
        for i, name in enumerate(Start._fields):
            colds, warms = (
                [s[i] for s in starts] for starts in zip(*pairs, strict=True)
            )
            ratio = statistics.median(w / c for c, w in zip(colds, warms, strict=True))
            cold, warm = statistics.median(colds), statistics.median(warms)
            print(f"{n_layer:6} {name:9} {cold:7.2f} {warm:7.2f}  {ratio:5.2f}")


if __name__ == "__main__":
    cli.run(main)
