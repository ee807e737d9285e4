"""Peak memory and time of loading a model of an official shape.

python benchmarks/load_memory.py --size=gpt2-xl

Writes random weights of that shape as a temporary Hugging Face folder (6.2 GB for XL in
float32), loads them in a fresh process and prints its peak resident memory, less what
it held before the load, over the size of the parameters. With several devices
(XLA_FLAGS=--xla_force_host_platform_device_count=8 on a CPU) they are spread over all.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags

_SIZE = flags.DEFINE_string("size", "gpt2-xl", "One of the four official sizes.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Of the file and of the parameters.")

LOAD = """
import json, re, sys, time
import jax
import gpt2_jax
from gpt2_jax.runtime.sharding import make_mesh
jax.block_until_ready(jax.numpy.zeros(3) + 1)
# Not ru_maxrss, which a child takes over from its parent.
status = lambda: open("/proc/self/status").read()
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", status())[1]) * 1024
before, start = peak(), time.perf_counter()
mesh = make_mesh(1, -1, 1) if jax.device_count() > 1 else None
lm = gpt2_jax.load(sys.argv[1], dtype=sys.argv[2], mesh=mesh)
jax.block_until_ready(lm.params)
size = sum(x.nbytes for x in jax.tree.leaves(lm.params))
print(json.dumps({
    "seconds": time.perf_counter() - start, "peak": peak() - before, "size": size
}))
"""


def write(folder: Path, size: str, dtype: str) -> None:
    from gpt2_jax.config import GPT2Config
    from gpt2_jax.formats.hf import config_values, write_safetensors
    from gpt2_jax.formats.names import their_name
    from gpt2_jax.formats.params import matrix_shapes
    from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer

    cfg = GPT2Config.named(size)
    rng = np.random.default_rng(0)
    numbers = rng.normal(0, 0.02, 1 << 20).astype(dtype)  # repeated: drawing is slow
    tensors = (
        (f"transformer.{their_name(path)}", np.resize(numbers, shape))
        for path, shape in matrix_shapes(cfg)
    )
    tokenizer = NoTokenizer(cfg.vocab_size, 50256, "random weights have none")
    values = config_values(cfg, tokenizer, dtype)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    write_safetensors(folder, tensors, 10**9)


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), _SIZE.value, _DTYPE.value)
        command = [sys.executable, "-c", LOAD, name, _DTYPE.value]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    found = json.loads(out)
    print(
        f"{_SIZE.value} {_DTYPE.value}: {found['size'] / 1e9:.2f} GB of parameters, "
        f"peak {found['peak'] / 1e9:.2f} GB, ratio "
        f"{found['peak'] / found['size']:.3f}, {found['seconds']:.1f} s"
    )


if __name__ == "__main__":
    app.run(main)
