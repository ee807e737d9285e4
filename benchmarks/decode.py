"""Speed of generation beside other implementations, on one random GPT-2 124M.

python benchmarks/decode.py --peers=PYTHON
python benchmarks/decode.py --peers=PYTHON --nanogpt=FOLDER --rounds=5
python benchmarks/decode.py --peers=PYTHON --only="f32$" --workloads="batch 1"
python benchmarks/decode.py --peers=PYTHON --gpu --bandwidth=4800

PYTHON is an interpreter with absl-py, torch and transformers (these write the
checkpoint) and, of ctranslate2, llama-cpp-python and gguf, those to be measured. FOLDER
holds nanoGPT's model.py, which has no KV cache and another GELU. A contestant that
can't run is left out with a line. llama.cpp is best built for the machine at hand:

CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary=llama-cpp-python llama-cpp-python

A round starts a process a contestant, in turn; a process warms up and takes the median
of three generations, of ids from ids, greedily. Speed is that of a whole generation,
its prefill included; ms is its time, with prefill that until the first token. A ratio
is our speed over theirs at the same width: int8 to int8, bfloat16 to bfloat16 or
float16. "Same" counts the tokens, of 32 after 8 prompts, that transformers draws, too
(in float32, or on a GPU in bfloat16). The machine must be idle otherwise: threads that
wait for one another lose far more than their share of the cores.
"""

import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from absl import app, flags

_OURS = flags.DEFINE_string("ours", sys.executable, "A Python that has gpt2_jax.")
_PEERS = flags.DEFINE_string("peers", sys.executable, "A Python that has the peers.")
_NANOGPT = flags.DEFINE_string("nanogpt", None, "Folder of nanoGPT's model.py.")
_FOLDER = flags.DEFINE_string("folder", "/tmp/bench", "Of checkpoints, kept there.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Processes of each contestant, in turn.")
_THREADS = flags.DEFINE_integer("threads", 2, "Cores and threads of a process.")
_ONLY = flags.DEFINE_string("only", "", "Contestants that match this regex.")
_WORKLOADS = flags.DEFINE_string("workloads", "", "Workloads that match this regex.")
_GPU = flags.DEFINE_bool("gpu", False, "In bfloat16 on a GPU; gpt2 and gpt2-xl.")
_BANDWIDTH = flags.DEFINE_float("bandwidth", None, "Of the GPU's memory, in GB/s.")
_PREPARE = flags.DEFINE_string("prepare", None, "(Internal) writes this shape.")
_WORKER = flags.DEFINE_string("worker", None, "(Internal) runs this contestant.")

Generate = Callable[[list[list[int]], int], list[list[int]]]  # prompts, new tokens

RAGGED = [4, 12, 20, 28, 36, 44, 52, 60]
WORKLOADS = {  # lengths of the prompts, new tokens
    "batch 1": ([32], 128),
    "ragged 8": (RAGGED, 128),
    "prefill 512": ([512], 1),
}
STEPS = 64  # whose mean is a position's time; that of few is lost in the prefill's
POSITIONS = {
    f"position {p} + {n}": ([p - 8], 8 + n) for p in (50, 900) for n in (0, STEPS)
}
GPU_WORKLOADS = {"batch 1": ([32], 128), "batch 64": ([32] * 64, 128)}
GPU_CONTESTANTS = ["ours bf16", "transformers bf16"]
SHAPES = {"gpt2": (12, 12, 768), "gpt2-xl": (48, 25, 1600)}  # layers, heads, width
VOCAB = 50257


# --- Contestants: (folder of the checkpoints, dtype) -> Generate ----------------------


def ours(folder: Path, dtype: str) -> Generate:
    import gpt2_jax

    lm = gpt2_jax.load(folder / "hf", dtype=dtype)
    return lambda prompts, n: lm.generate(
        prompts, max_new_tokens=n, min_new_tokens=n, temperature=0
    )


def transformers(folder: Path, dtype: str) -> Generate:
    import torch
    from transformers import GPT2LMHeadModel

    device, options = "cpu", {}
    if _GPU.value:  # a static cache compiles the model, too
        device, options = "cuda", {"cache_implementation": "static"}
    kind = getattr(torch, dtype)
    model = GPT2LMHeadModel.from_pretrained(folder / "hf", dtype=kind).to(device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], n: int) -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(p)) + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        out = model.generate(
            torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=n,
            do_sample=False,
            **options,
        )
        return out[:, longest:].tolist()

    return generate


def nanogpt(folder: Path, dtype: str) -> Generate:
    import torch
    from safetensors.torch import load_file

    if not _NANOGPT.value:
        raise ValueError("no --nanogpt given")
    sys.path.insert(0, _NANOGPT.value)
    from model import GPT, GPTConfig

    state = load_file(folder / "hf" / "model.safetensors")
    state["lm_head.weight"] = state["transformer.wte.weight"]
    for name in [name for name in state if re.search(r"\.c_\w+\.weight", name)]:
        state[name] = state[name].t()
    model = GPT(GPTConfig(vocab_size=VOCAB, dropout=0.0, bias=True)).eval()
    model.load_state_dict(state)

    def row(prompt: list[int], n: int) -> list[int]:
        ids = torch.tensor([prompt])
        return model.generate(ids, n, top_k=1)[0, len(prompt) :].tolist()

    return lambda prompts, n: [row(prompt, n) for prompt in prompts]


def ctranslate2(folder: Path, dtype: str) -> Generate:
    import ctranslate2

    generator = ctranslate2.Generator(
        str(folder / "ctranslate2"), compute_type=dtype, intra_threads=_THREADS.value
    )

    def generate(prompts: list[list[int]], n: int) -> list[list[int]]:
        results = generator.generate_batch(
            [[str(i) for i in prompt] for prompt in prompts],
            max_length=n,
            min_length=n,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return generate


def llama_cpp(folder: Path, dtype: str) -> Generate:
    import numpy as np
    from llama_cpp import llama_cpp as llama

    path = str(folder / f"{dtype}.gguf").encode()
    model = llama.llama_model_load_from_file(path, llama.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp can't load {folder}/{dtype}.gguf")
    batch = llama.llama_batch_init(1024, 0, 1)
    contexts = {}  # one a batch size

    def open_context(n_rows: int):
        options = llama.llama_context_default_params()
        options.n_ctx = 1024 * n_rows
        options.n_batch = 1024
        options.n_seq_max = n_rows
        options.n_threads = options.n_threads_batch = _THREADS.value
        return llama.llama_init_from_model(model, options)

    def step(context, rows: list[list[int]], starts: list[int]) -> list[list[int]]:
        last = []
        batch.n_tokens = 0
        for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
            for position, token in enumerate(ids, start):
                i = batch.n_tokens
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = position == start + len(ids) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        if llama.llama_decode(context, batch):
            raise ValueError("llama_decode failed")
        logits = (llama.llama_get_logits_ith(context, i) for i in last)
        return [[int(np.ctypeslib.as_array(x, (VOCAB,)).argmax())] for x in logits]

    def generate(prompts: list[list[int]], n: int) -> list[list[int]]:
        if len(prompts) not in contexts:
            contexts[len(prompts)] = open_context(len(prompts))
        context = contexts[len(prompts)]
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        steps = [step(context, prompts, [0] * len(prompts))]
        for i in range(n - 1):
            steps.append(step(context, steps[-1], [len(p) + i for p in prompts]))
        return [[token for (token,) in row] for row in zip(*steps, strict=True)]

    return generate


class Contestant(NamedTuple):
    open: Callable[[Path, str], Generate]
    dtype: str
    bits: int
    package: str
    workloads: str = "batch|ragged|prefill"  # a regex


LLAMA = "llama-cpp-python"
CONTESTANTS = {
    "ours f32": Contestant(ours, "float32", 32, "jax", ""),
    "ours bf16": Contestant(ours, "bfloat16", 16, "jax", ""),
    "ours int8": Contestant(ours, "int8", 8, "jax", ""),
    "transformers f32": Contestant(transformers, "float32", 32, "transformers", ""),
    "transformers bf16": Contestant(transformers, "bfloat16", 16, "transformers", ""),
    "nanoGPT f32": Contestant(nanogpt, "float32", 32, "torch", "batch|prefill"),
    "CTranslate2 f32": Contestant(ctranslate2, "float32", 32, "ctranslate2"),
    "CTranslate2 int8": Contestant(ctranslate2, "int8", 8, "ctranslate2"),
    "llama.cpp f32": Contestant(llama_cpp, "f32", 32, LLAMA),
    "llama.cpp f16": Contestant(llama_cpp, "f16", 16, LLAMA),
    "llama.cpp q8_0": Contestant(llama_cpp, "q8_0", 8, LLAMA),
}


# --- One contestant, in a process of its own ------------------------------------------


def random_prompts(lengths: list[int]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(VOCAB - 1) for _ in range(n)] for n in lengths]


def seconds(generate: Generate, lengths: list[int], n: int) -> float:
    prompts = random_prompts(lengths)

    def once() -> float:
        start = time.perf_counter()
        rows = generate(prompts, n)
        took = time.perf_counter() - start
        if [len(row) for row in rows] != [n] * len(prompts):
            raise ValueError(f"{[len(row) for row in rows]} new tokens, not {n} each")
        return took

    once()  # compiles and allocates
    return statistics.median(once() for _ in range(3))


def work(contestant: Contestant, folder: Path) -> None:
    """Prints the seconds of each workload, and some greedy tokens."""
    if not _GPU.value:  # before a library counts its cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: _THREADS.value])
        os.environ["OMP_NUM_THREADS"] = str(_THREADS.value)
    generate = contestant.open(folder, contestant.dtype)
    times = {}
    for name, (lengths, n) in workloads().items():
        if re.search(contestant.workloads, name) and re.search(_WORKLOADS.value, name):
            times[name] = seconds(generate, lengths, n)
    tokens = generate(random_prompts(RAGGED), 4)
    package = f"{contestant.package} {metadata.version(contestant.package)}"
    print(json.dumps({"times": times, "tokens": tokens, "package": package}))


def workloads() -> dict[str, tuple[list[int], int]]:
    return GPU_WORKLOADS if _GPU.value else WORKLOADS | POSITIONS


# --- The checkpoint, written by the peers' interpreter --------------------------------


def prepare(folder: Path, shape: str) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, n_head, n_embd = SHAPES[shape]
    cfg = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    torch.manual_seed(0)
    GPT2LMHeadModel(cfg).save_pretrained(folder / "hf")
    for write in (write_ctranslate2, write_gguf) if shape == "gpt2" else ():
        with contextlib.suppress(ImportError):
            write(folder)


def write_ctranslate2(folder: Path) -> None:
    """In float32: the reader quantizes."""
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_, **__):
            vocab = {str(i): i for i in range(VOCAB)}
            last = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "50256")
            return SimpleNamespace(get_vocab=lambda: vocab, **last)

    Converter(str(folder / "hf")).convert(str(folder / "ctranslate2"))


def write_gguf(folder: Path) -> None:
    """As llama.cpp's converter does, but with no tokenizer."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    cfg = json.loads((folder / "hf" / "config.json").read_text(encoding="utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, cfg["n_layer"])
    for kind in ("f32", "f16", "q8_0"):
        writer = gguf.GGUFWriter(folder / f"{kind}.gguf", "gpt2")
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(VOCAB)
        writer.add_context_length(cfg["n_positions"])
        writer.add_block_count(cfg["n_layer"])
        writer.add_head_count(cfg["n_head"])
        writer.add_embedding_length(cfg["n_embd"])
        writer.add_feed_forward_length(4 * cfg["n_embd"])
        writer.add_layer_norm_eps(cfg["layer_norm_epsilon"])
        for name, x in load_file(folder / "hf" / "model.safetensors").items():
            kernel = x.ndim == 2 and ".h." in name
            dtype = kind.upper() if kernel or "wte" in name else "F32"
            dtype = gguf.GGMLQuantizationType[dtype]
            x = gguf.quants.quantize(np.ascontiguousarray(x.T if kernel else x), dtype)
            name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(name, x, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


# --- All of them in turn --------------------------------------------------------------


def start(python: str, folder: Path, option: str) -> subprocess.CompletedProcess:
    passed = [f for f in (_THREADS, _WORKLOADS, _GPU, _NANOGPT) if f.value is not None]
    options = [f"--folder={folder}", *(f"--{f.name}={f.value}" for f in passed)]
    command = [python, __file__, option, *options]
    return subprocess.run(command, capture_output=True, text=True)


def reason(done: subprocess.CompletedProcess) -> str:
    errors = re.findall(r"^\w*Error: .*", done.stderr, re.M)
    return errors[-1] if errors else f"exit status {done.returncode}"


def run(folder: Path, names: list[str]) -> dict[str, list[dict]]:
    """What each contestant printed in each round."""
    results: dict[str, list[dict]] = {name: [] for name in names}
    for round_ in range(1, _ROUNDS.value + 1):
        for name in list(results):
            python = _OURS.value if name.startswith("ours") else _PEERS.value
            done = start(python, folder, f"--worker={name}")
            if done.returncode:
                print(f"{name} is left out: {reason(done)}", flush=True)
                del results[name]
                continue
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            times = results[name][-1]["times"].items()
            line = ", ".join(f"{what} {1e3 * t:.1f} ms" for what, t in times)
            print(f"round {round_}: {name}: {line}", flush=True)
    return results


def report(shape: str, results: dict[str, list[dict]]) -> None:
    theirs = next((r[0]["tokens"] for n, r in results.items() if n[:2] == "tr"), [])
    print(f"\n{shape:18} same  package")
    for name, (first, *_) in results.items():
        rows = zip(first["tokens"], theirs, strict=False)
        same = sum(a == b for row in rows for a, b in zip(*row, strict=True))
        print(f"{name:18} {same:4}  {first['package']}")
    for workload in GPU_WORKLOADS if _GPU.value else WORKLOADS:
        if re.search(_WORKLOADS.value, workload):
            print(f"\n{workload:18} tokens/s        ms  ours/theirs by round; median")
        for name, rounds in results.items():
            if workload in rounds[0]["times"]:
                took = statistics.median(r["times"][workload] for r in rounds)
                line = f"{name:18} {speed(shape, workload, took)}"
                print(line + ratios(results, name, workload))
    timed = [n for n, r in results.items() if POSITIONS.keys() <= r[0]["times"].keys()]
    if timed:
        print("\nms of a token         at 50    at 900  900/50 by round; median")
    for name in timed:
        # From what 8 tokens take at each, and STEPS more.
        times = (
            [1e3 * r["times"][x] / STEPS for x in POSITIONS] for r in results[name]
        )
        pairs = [(b - a, d - c) for a, b, c, d in times]
        ratio = by_round([high / low for low, high in pairs])
        low, high = map(statistics.median, zip(*pairs, strict=True))
        print(f"{name:18} {low:8.2f} {high:9.2f}{ratio}")


def speed(shape: str, workload: str, took: float) -> str:
    """In new tokens, where it is prefill in those of the prompt."""
    lengths, n = workloads()[workload]
    n_tokens = n * len(lengths) if n > 1 else sum(lengths)
    line = f"{n_tokens / took:8.1f} {1e3 * took:9.1f}"
    if not _BANDWIDTH.value:
        return line
    # A step reads the parameters and the cache, in bfloat16.
    n_layer, _, n_embd = SHAPES[shape]
    n_cached = sum(length + n / 2 for length in lengths)
    n_read = 12 * n_layer * n_embd**2 + (VOCAB + 2 * n_layer * n_cached) * n_embd
    return line + f"  {2 * n * n_read / took / 1e9 / _BANDWIDTH.value:.0%} of bandwidth"


def ratios(results: dict[str, list[dict]], name: str, workload: str) -> str:
    """Our speed over `name`'s, at its width; empty where there is none."""
    bits = CONTESTANTS[name].bits
    ours_ = [n for n in results if n[:4] == "ours" and CONTESTANTS[n].bits == bits]
    if not ours_ or name in ours_:
        return ""
    pairs = zip(results[name], results[ours_[0]], strict=True)
    return by_round([a["times"][workload] / b["times"][workload] for a, b in pairs])


def by_round(values: list[float]) -> str:
    middle = statistics.median(values)
    return f"  {' '.join(f'{x:.2f}' for x in values)}; {middle:.2f}"


def main(_: list[str]) -> None:
    folder = Path(_FOLDER.value)
    if _PREPARE.value:
        return prepare(folder, _PREPARE.value)
    if _WORKER.value:
        return work(CONTESTANTS[_WORKER.value], folder)
    names = GPU_CONTESTANTS if _GPU.value else CONTESTANTS
    for shape in SHAPES if _GPU.value else ["gpt2"]:
        if not (folder / shape).exists():
            part = folder / f"{shape}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            done = start(_PEERS.value, part, f"--prepare={shape}")
            if done.returncode:
                raise SystemExit(f"no checkpoint: {reason(done)}")
            part.rename(folder / shape)
        asked = [name for name in names if re.search(_ONLY.value, name)]
        report(shape, run(folder / shape, asked))


if __name__ == "__main__":
    app.run(main)
