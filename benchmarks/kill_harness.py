"""Runs that are killed or stopped at random moments, beside ones that go through.

python benchmarks/kill_harness.py
python benchmarks/kill_harness.py --trials=10 --processes=2 --seed=1

A trial starts the training program, sends SIGKILL, SIGTERM or SIGINT at a random
moment, and starts the same command again until it is done. Then all that the run left
must be as it is where nothing interrupted it: each record (training and validation
loss, gradient norm, learning rate, tokens, updates skipped), each sample, the steps of
the checkpoints, which of them is the best, and every bit of the last one. The exit
status is 1 where something differs. Every second run ends by `eval.patience`. With two
processes one of them, the other or both get the signal. "saving" counts the signals
that hit an unfinished save.
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
from typing import Any

from absl import app, flags

_TRIALS = flags.DEFINE_integer("trials", 30, "Runs that get a signal.", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 1, "Of the job.", lower_bound=1)
_KILLS = flags.DEFINE_integer("kills", 1, "Signals of each run.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 150, "Of a run.", lower_bound=120)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")

EVERY = 7  # steps between evaluations; saves lie 10 apart
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE = {
    "by steps": [],
    # a rate at which the loss soon stops to fall
    "by patience": ["--config.eval.patience=3", "--config.optim.learning_rate=0.1"],
}
RECORDED = ("step", "tokens", "loss", "val_loss", "grad_norm", "learning_rate")
RECORDED += ("skipped", "skipped_in_row")

ROOT = Path(__file__).resolve().parents[1]


def command(workdir: Path, text: Path, ends: str, process: int, port: int) -> list[str]:
    words = [
        *(sys.executable, str(ROOT / "scripts/train.py")),
        *(f"--config={ROOT}/configs/default.py", f"--workdir={workdir}"),
        *(f"--config.data.path={text}", f"--config.steps={_STEPS.value}"),
        *("--config.batch_size=4", "--config.block_size=16", "--config.log_every=1"),
        *("--config.model.n_positions=32", "--config.model.n_embd=64"),
        *("--config.model.n_layer=2", "--config.model.n_head=2"),
        *("--config.model.resid_pdrop=0.1", "--config.optim.warmup_steps=5"),
        *("--config.data.tokenizer=bytes", "--config.data.vocab_size=0"),
        *(f"--config.eval.every={EVERY}", "--config.eval.examples=16"),
        "--config.eval.sample_tokens=5",
        *("--config.checkpoint.every=10", *PATIENCE[ends]),
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


def start(workdir: Path, text: Path, ends: str) -> list[subprocess.Popen]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    programs = str(workdir.parent / "programs")  # compiled once
    environ = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    environ["JAX_COMPILATION_CACHE_DIR"] = programs
    return [
        subprocess.Popen(
            command(workdir, text, ends, i, port),
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=(workdir.parent / f"{workdir.name}-{i}.log").open("a"),
        )
        for i in range(_PROCESSES.value)
    ]


def finish(workdir: Path, text: Path, ends: str) -> int:
    """Starts the run until it is done; the number of starts that it took."""
    for attempt in range(1, 6):
        statuses = [process.wait(1800) for process in start(workdir, text, ends)]
        if statuses == [0] * len(statuses):
            return attempt
    log = workdir.parent / f"{workdir.name}-0.log"
    last = log.read_text().splitlines()[-1:]
    raise RuntimeError(f"{workdir} does not get done: statuses {statuses}, {last}")


def records(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def left(workdir: Path) -> dict[str, Any]:
    """What a run that is done left, without what clocks have a part in."""
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    metas = {
        step: json.loads((workdir / f"checkpoints/{step}/meta/metadata").read_text())
        for step in steps
    }
    losses = {s: m["metrics"].get("val_loss", float("inf")) for s, m in metas.items()}
    last = metas[steps[-1]]
    return {
        "metrics": [
            {name: record[name] for name in RECORDED if name in record}
            for record in records(workdir / "metrics.jsonl")
        ],
        "samples": records(workdir / "samples.jsonl"),
        "checkpoints": steps,
        "validation": losses,
        "best": min(steps, key=losses.__getitem__),
        "contract": {k: last[k] for k in ("best", "examples", "due", "interim")},
        "bits": last["checksums"],
    }


def last_step(workdir: Path) -> int:
    return max((r["step"] for r in records(workdir / "metrics.jsonl")), default=0)


def wait(
    workdir: Path,
    process: subprocess.Popen,
    steps: int,
    seconds: float,
    rng: random.Random,
) -> None:
    """Until a random moment: of the life, in or about a step, or at an evaluation."""
    kind = rng.random()
    if kind < 0.2:
        time.sleep(rng.uniform(0, seconds))
        return
    step = rng.randrange(steps)
    at_evaluation = kind < 0.6
    if at_evaluation:
        step = rng.choice([*range(0, steps, EVERY), steps])

    def is_there() -> bool:
        found = records(workdir / "metrics.jsonl")
        if at_evaluation:
            return any(r["step"] >= step and "val_loss" in r for r in found)
        return any(r["step"] >= step for r in found)

    while not is_there() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.02 if at_evaluation else 0.1))


def trial(
    workdir: Path,
    text: Path,
    ends: str,
    steps: int,
    seconds: float,
    rng: random.Random,
) -> tuple[list[str], int, int]:
    """Stops and finishes a run: steps and signals, those in a save, starts."""
    hit, saving = [], 0
    for _ in range(_KILLS.value):
        processes = start(workdir, text, ends)
        wait(workdir, processes[0], steps, seconds, rng)
        victims = rng.sample(processes, rng.randint(1, len(processes)))
        number = rng.choice(SIGNALS)
        saving += any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp*"))
        for process in victims:
            process.send_signal(number)
        for process in processes:
            process.wait(1800)
        hit.append(f"{number.name[3:]} {last_step(workdir)}")
    return hit, saving, finish(workdir, text, ends)


def main(_: list[str]) -> None:
    rng = random.Random(_SEED.value)
    same = 0
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        lines = ("".join(rng.choices("the quick brown fox ", k=50)) for _ in range(300))
        text.write_text("\n".join(lines))
        expected, seconds = {}, 0.0
        for ends in PATIENCE:
            whole = Path(folder) / ends.replace(" ", "-")
            began = time.monotonic()
            finish(whole, text, ends)
            seconds = max(seconds, time.monotonic() - began)
            expected[ends] = left(whole)
            skipped = expected[ends]["metrics"][-2]["skipped"]
            steps = expected[ends]["checkpoints"]
            print(
                f"ends {ends}: checkpoints {steps}, best {expected[ends]['best']}, "
                f"{len(expected[ends]['metrics'])} records, {skipped:.0f} skipped"
            )
        print(
            f"processes {_PROCESSES.value}, seed {_SEED.value}, at most "
            f"{seconds:.1f} s a run\n\n"
            "trial  ends         signal, step  saving  starts  result",
            flush=True,
        )
        for number in range(1, _TRIALS.value + 1):
            workdir = Path(folder) / f"run-{number}"
            ends = list(PATIENCE)[number % 2]
            steps = expected[ends]["checkpoints"][-1]
            hit, saving, starts = trial(workdir, text, ends, steps, seconds, rng)
            found = left(workdir)
            differ = [k for k, value in expected[ends].items() if found[k] != value]
            same += not differ
            result = f"DIFFERENT: {', '.join(differ)}" if differ else "equal"
            print(
                f"{number:5}  {ends:11}  {', '.join(hit):>12}  {saving:6}  "
                f"{starts:6}  {result}",
                flush=True,
            )
    print(f"\n{same} of {_TRIALS.value} equal in all records, samples and bits")
    sys.exit(same != _TRIALS.value)


if __name__ == "__main__":
    app.run(main)
