"""Runs that are killed at random moments, beside one that nothing interrupts.

python benchmarks/kill_harness.py
python benchmarks/kill_harness.py --trials=10 --processes=2 --seed=1

A trial starts the training program, sends SIGKILL at a random moment, and starts the
same command again until it is done. Then every loss that was recorded, of training and
validation, and every bit of the last checkpoint must be those of the whole run; the
exit status is 1 where one is not. With two processes, one of them, the other or both
are killed. "saving" counts the kills that hit an unfinished save.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

_TRIALS = flags.DEFINE_integer("trials", 30, "Runs that are killed.", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 1, "Of the job.", lower_bound=1)
_KILLS = flags.DEFINE_integer("kills", 1, "Of each run.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 300, "Of a run.", lower_bound=10)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")

ROOT = Path(__file__).resolve().parents[1]


def command(workdir: Path, text: Path, process: int, port: int) -> list[str]:
    words = [
        *(sys.executable, str(ROOT / "scripts/train.py")),
        *(f"--config={ROOT}/configs/default.py", f"--workdir={workdir}"),
        *(f"--config.data.path={text}", f"--config.steps={_STEPS.value}"),
        *("--config.batch_size=4", "--config.block_size=16", "--config.log_every=1"),
        *("--config.model.n_positions=32", "--config.model.n_embd=64"),
        *("--config.model.n_layer=2", "--config.model.n_head=2"),
        *("--config.model.resid_pdrop=0.1", "--config.optim.warmup_steps=5"),
        *("--config.data.tokenizer=bytes", "--config.data.vocab_size=0"),
        *("--config.eval.every=25", "--config.eval.examples=8"),
        "--config.checkpoint.every=10",
    ]
    if _PROCESSES.value > 1:
        words += [
            *(f"--coordinator_address=127.0.0.1:{port}", f"--process_id={process}"),
            *(
                f"--num_processes={_PROCESSES.value}",
                "--peer_timeout=20",
                "--start_timeout=60",
            ),
        ]
    return words


def start(workdir: Path, text: Path) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environ = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return [
        subprocess.Popen(
            command(workdir, text, i, port),
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=(workdir.parent / f"{workdir.name}-{i}.log").open("a"),
        )
        for i in range(_PROCESSES.value)
    ]


def finish(workdir: Path, text: Path) -> int:
    """Starts the run until it is done; the number of starts that it took."""
    for attempt in range(1, 6):
        statuses = [process.wait(300) for process in start(workdir, text)]
        if statuses == [0] * len(statuses):
            return attempt
    log = workdir.parent / f"{workdir.name}-0.log"
    last = log.read_text().splitlines()[-1:]
    raise RuntimeError(f"{workdir} does not get done: statuses {statuses}, {last}")


def losses(workdir: Path) -> list[tuple[int, str, float]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        (record["step"], name, record[name])
        for record in map(json.loads, lines)
        for name in ("loss", "val_loss", "grad_norm")
        if name in record
    ]


def checksums(workdir: Path) -> dict[str, int]:
    path = workdir / f"checkpoints/{_STEPS.value}/meta/metadata"
    return json.loads(path.read_text())["checksums"]


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(x)["step"] for x in lines if x.endswith("}")), default=0)


def wait(
    workdir: Path, process: subprocess.Popen, seconds: float, rng: random.Random
) -> None:
    """Until a random moment: in one case of five of the life, else of the steps."""
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, seconds))
        return
    step = rng.randrange(_STEPS.value)
    while last_step(workdir) < step and process.poll() is None:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.1))


def trial(
    workdir: Path, text: Path, seconds: float, rng: random.Random
) -> tuple[list[int], int, int]:
    """Kills and finishes a run: steps at the kills, kills in a save, starts."""
    steps, saving = [], 0
    for _ in range(_KILLS.value):
        processes = start(workdir, text)
        wait(workdir, processes[0], seconds, rng)
        victims = rng.sample(processes, rng.randint(1, len(processes)))
        saving += any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))
        for process in victims:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait(300)
        steps.append(last_step(workdir))
    return steps, saving, finish(workdir, text)


def main(_: list[str]) -> None:
    rng = random.Random(_SEED.value)
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        lines = ("".join(rng.choices("the quick brown fox ", k=50)) for _ in range(300))
        text.write_text("\n".join(lines))
        whole = Path(folder) / "whole"
        began = time.monotonic()
        finish(whole, text)
        seconds = time.monotonic() - began
        print(
            f"{_STEPS.value} steps in {seconds:.1f} s, processes {_PROCESSES.value}, "
            f"a save every 10 steps\n\ntrial  killed at step  saving  starts  result",
            flush=True,
        )
        for number in range(1, _TRIALS.value + 1):
            workdir = Path(folder) / f"run-{number}"
            steps, saving, starts = trial(workdir, text, seconds, rng)
            equal = losses(workdir) == losses(whole)
            bits = checksums(workdir) == checksums(whole)
            same += equal and bits
            result = "bit-equal" if equal and bits else "DIFFERENT"
            at = ", ".join(map(str, steps))
            print(f"{number:5}  {at:>14}  {saving:6}  {starts:6}  {result}", flush=True)
    print(f"\n{same} of {_TRIALS.value} bit-equal")
    sys.exit(same != _TRIALS.value)


if __name__ == "__main__":
    app.run(main)
