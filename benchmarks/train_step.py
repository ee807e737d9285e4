"""Time of a training step in the character setting, beside nanoGPT's eager loop.

python benchmarks/train_step.py
python benchmarks/train_step.py --nanogpt=FOLDER --torch=PYTHON --rounds=5

FOLDER holds nanoGPT's model.py, PYTHON is an interpreter that has torch. Both train
configs/shakespeare_char.py's model in float32 on random characters, in a process a
round, in turn: ours by scripts/train.py, whose own metrics give the time (each the
mean of ten steps); nanoGPT by the loop below. A round is the median after warm-up; a
step draws the batch, updates, and fetches the loss.
"""

import json
import random
import statistics
import string
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

_ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes of each kind, in turn.")
_STEPS = flags.DEFINE_integer("steps", 300, "Steps of a process.")
_NANOGPT = flags.DEFINE_string("nanogpt", None, "Folder of nanoGPT's model.py.")
_TORCH = flags.DEFINE_string("torch", sys.executable, "A Python that has torch.")

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 50  # steps
ALPHABET = string.ascii_letters + string.digits + " .\n"

NANOGPT = """
import json, statistics, sys, time
import numpy as np, torch
sys.path.insert(0, sys.argv[1])
from model import GPT, GPTConfig

data = np.random.default_rng(0).integers(0, 65, 900_000).astype(np.uint16)
torch.manual_seed(0)
sizes = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65)
model = GPT(GPTConfig(**sizes, bias=False, dropout=0.0))
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

def batch():
    starts = torch.randint(len(data) - 64, (12,))
    x = torch.stack([torch.from_numpy(data[i : i + 65].astype(int)) for i in starts])
    return x[:, :-1], x[:, 1:].contiguous()

seconds = []
for step in range(int(sys.argv[2])):
    start = time.perf_counter()
    _, loss = model(*batch())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()
    seconds.append(time.perf_counter() - start)
print(json.dumps({"ms": 1e3 * statistics.median(seconds[int(sys.argv[3]):])}))
"""


def ours(text: Path, steps: int) -> float:
    """Milliseconds of a step in a fresh run."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            *(sys.executable, ROOT / "scripts/train.py"),
            f"--config={ROOT}/configs/shakespeare_char.py",
            *(f"--workdir={workdir}", f"--config.data.path={text}"),
            *(f"--config.steps={steps}", f"--config.eval.every={steps}"),
            f"--config.checkpoint.every={steps}",
        ]
        subprocess.run(command, check=True, capture_output=True)
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    timed = [r for r in records if "step_seconds" in r and r["step"] > WARM_UP]
    return 1e3 * statistics.median(r["step_seconds"] for r in timed)


def nanogpt(python: str, folder: str, steps: int) -> float:
    command = [python, "-c", NANOGPT, folder, str(steps), str(WARM_UP)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])["ms"]


def main(_: list[str]) -> None:
    rng = random.Random(0)
    ratios = []
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(rng.choices(ALPHABET, k=1_000_000)))
        file.flush()
        for round_ in range(1, _ROUNDS.value + 1):
            mine = ours(Path(file.name), _STEPS.value)
            line = f"round {round_}: ours {mine:.1f} ms"
            if _NANOGPT.value:
                theirs = nanogpt(_TORCH.value, _NANOGPT.value, _STEPS.value)
                ratios.append(mine / theirs)
                line += f", nanoGPT {theirs:.1f} ms, ratio {ratios[-1]:.2f}"
            print(line, flush=True)
    if ratios:
        print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    app.run(main)
