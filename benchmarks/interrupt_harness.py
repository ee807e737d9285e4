"""Programs that get Ctrl-C at moments from their first line to their end.

python benchmarks/interrupt_harness.py
python benchmarks/interrupt_harness.py --programs=generate --trials=10

A trial starts a program with nothing compiled before, sends SIGINT to its process group
at one of --trials moments, evenly spread over the time that it takes undisturbed, and
looks at how it ended. Right are the statuses 130 and -2 (ended by the signal), 0 where
it was done, and at most one line on stderr, with no traceback in it. Then the same
command must end with status 0; training in the bits of an undisturbed run. The exit
status is 1 where something is not right.

Moments count from the first line of the program. Python's own start comes before, in
which its KeyboardInterrupt shows a traceback; how long it takes stands in the table's
head. That is read from /proc, so this is for Linux.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import kill_harness as kill
from absl import app, flags

PROGRAMS = (
    *("train", "generate", "evaluate", "explain", "convert", "prepare_data"),
    *("train_tokenizer", "plot", "inspect_run", "preflight", "verify"),
)
_PROGRAMS = flags.DEFINE_list("programs", ["train", "generate"], f"Of {PROGRAMS}.")


def commands(folder: Path, text: Path) -> dict[str, Callable[[Path], list[str]]]:
    """For each program, its command, given where it is to write."""
    run, script = folder / "whole", kill.ROOT / "scripts"
    words: dict[str, Callable[[Path], list[str]]] = {
        "generate": lambda _: [
            *(f"--workdir={run}", "--prompt=the quick", "--max_new_tokens=20"),
            *("--num_return_sequences=20", "--seed=0"),
        ],
        "evaluate": lambda _: [f"--workdir={run}", "--split=test"],
        "explain": lambda to: [f"--workdir={run}", "--prompt=the", f"--out={to}.html"],
        "convert": lambda to: [f"--model={run}", "--to=hf", f"--out={to}"],
        "prepare_data": lambda to: (
            [f"--path={text}", f"--out={to}"]
            + ["--vocab_size=300", "--splits=0.8,0.1,0.1"]
        ),
        "train_tokenizer": lambda to: (
            [f"--path={text}", f"--out={to}"] + ["--vocab_size=300"]
        ),
        "plot": lambda to: [f"--workdirs={run}", f"--out={to}.png"],
        "inspect_run": lambda _: [f"--workdir={run}"],
        "preflight": lambda _: (
            [f"--config={kill.ROOT}/configs/quickstart.py"] + ["--n_devices=1"]
        ),
        "verify": lambda _: [],
    }
    small = ["--config.steps=40", "--config.model.n_layer=1", "--config.eval.every=15"]
    small += ["--config.eval.sample_tokens=0"]  # generate.py is tried by itself
    return {"train": lambda to: [*kill.command(to, text, "by steps", 0, 0), *small]} | {
        name: lambda to, name=name, words=words: [
            *(sys.executable, f"{script}/{name}.py"),
            *words(to),
        ]
        for name, words in words.items()
    }


def environ(programs: Path | None) -> dict[str, str]:
    """Variables for a program that compiles all it runs, or finds it in `programs`."""
    found = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    found.pop("JAX_COMPILATION_CACHE_DIR", None)
    return found | ({"JAX_COMPILATION_CACHE_DIR": str(programs)} if programs else {})


def start(command: list[str]) -> tuple[subprocess.Popen, float]:
    """The program as it runs its first line, and the seconds until then."""
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environ(None),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        # what starts this in the background may have Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not takes_sigint(process.pid):  # Python's handler is set
        time.sleep(0.001)
    while takes_sigint(process.pid) and process.poll() is None:  # and ours instead
        time.sleep(0.001)
    return process, time.monotonic() - began


def takes_sigint(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGINT - 1) & 1)


def undisturbed(command: list[str]) -> tuple[float, float]:
    """Seconds of Python's own start, and from there to the end."""
    process, own = start(command)
    began = time.monotonic()
    _, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command}: status {process.returncode}: {err[-1000:]}")
    return own, time.monotonic() - began


def judge(status: int, err: str) -> str:
    """What is wrong with how a program ended; nothing where all is right."""
    wrong = []
    if status not in (0, 128 + signal.SIGINT, -signal.SIGINT):
        wrong.append(f"status {status}")
    if len(err.splitlines()) > 1:
        wrong.append(f"{len(err.splitlines())} lines")
    wrong += [x for x in ("Traceback", "Exception ignored", "Fatal") if x in err]
    return ", ".join(wrong)


def same_run(out: Path, whole: Path) -> bool:
    return kill.left(out) == kill.left(whole)


def same_files(out: Path, whole: Path) -> bool:
    def files(of: Path) -> dict[str, bytes]:
        found = [p for p in of.parent.glob(f"{of.name}/**/*") if p.is_file()]
        return {str(p.relative_to(of)): p.read_bytes() for p in found}

    return files(out) == files(whole)


def try_program(
    name: str, command: Callable[[Path], list[str]], folder: Path, trials: int
) -> int:
    """How many trials went wrong; a line of the table for each."""
    whole = folder / ("whole" if name == "train" else f"{name}-whole")
    writes = str(whole) in " ".join(command(whole))
    own, seconds = undisturbed(command(whole))
    owns, statuses, failures = [own], [], 0
    print(
        f"\n{name}: {seconds:.1f} s undisturbed\ntrial  after s  status  lines  result"
    )
    for number in range(trials):
        out = folder / f"{name}-{number}"
        process, own = start(command(out))
        owns.append(own)
        moment = seconds * (number + 0.5) / trials
        time.sleep(moment)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate()
        wrong = judge(process.returncode, err)
        if writes:
            again = subprocess.run(
                command(out),
                env=environ(folder / "programs"),
                capture_output=True,
                text=True,
            )
            if again.returncode and "exists already" not in again.stderr:
                wrong += f" then status {again.returncode}: {again.stderr[-200:]}"
            elif not (same_run if name == "train" else same_files)(out, whole):
                wrong += " then other bits"
        failures += bool(wrong)
        statuses.append(process.returncode)
        print(
            f"{number + 1:5}  {moment:7.2f}  {process.returncode:6}  "
            f"{len(err.splitlines()):5}  {wrong or 'right'}",
            flush=True,
        )
    counts = ", ".join(f"{statuses.count(s)} of {s}" for s in sorted(set(statuses)))
    print(
        f"{name}: {trials - failures} of {trials} right (statuses: {counts}); "
        f"Python's own start {1000 * statistics.median(owns):.0f} ms"
    )
    return failures


def main(_: list[str]) -> None:
    rng = random.Random(flags.FLAGS.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = folder / "text.txt"
        lines = ("".join(rng.choices("the quick brown fox ", k=50)) for _ in range(300))
        text.write_text("\n".join(lines), encoding="utf-8")
        programs = commands(folder, text)
        if "train" not in _PROGRAMS.value:
            undisturbed(programs["train"](folder / "whole"))
        failures = sum(
            try_program(name, programs[name], folder, flags.FLAGS.trials)
            for name in _PROGRAMS.value
        )
    sys.exit(bool(failures))


if __name__ == "__main__":
    flags.FLAGS.set_default("trials", 40)
    app.run(main)
