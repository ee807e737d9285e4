"""llm.c's model files: a header of 256 int32, then all numbers in one row."""

import math
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.formats.params import matrices
from gpt2_jax.formats.tensors import Tensor
from gpt2_jax.layout import Params
from gpt2_jax.runtime.files import check_regular

MAGIC = 20240326
HEADER = 256  # int32, little-endian
VERSIONS = {3: np.dtype("<f4"), 5: np.dtype(ml_dtypes.bfloat16)}


def is_llmc_file(path: Path) -> bool:
    """Whether a file begins as llm.c's models do."""
    with path.open("rb") as file:
        return file.read(4) == np.int32(MAGIC).astype("<i4").tobytes()


def read(path: Path) -> tuple[GPT2Config, dict[str, Tensor]]:
    """The config, and the tensors by our paths in matrix form, without the padding.

    Raises:
      ValueError: on another magic number or version, and on a file whose size isn't
        what its header says.
    """
    check_regular(path)
    header = np.fromfile(path, "<i4", HEADER)
    if len(header) < HEADER or header[0] != MAGIC:
        raise ValueError(f"{path} is no llm.c model: no magic number {MAGIC}")
    version, positions, vocab, layers, heads, width, padded = header[1:8].tolist()
    if version not in VERSIONS:
        raise ValueError(f"{path} has version {version}, only 3 and 5 can be read")
    try:
        cfg = GPT2Config(
            vocab_size=vocab,
            n_positions=positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if padded < vocab:
        raise ValueError(f"{path}: padded vocabulary {padded} < vocabulary {vocab}")
    dtype = VERSIONS[version]
    size = 4 * HEADER + dtype.itemsize * sum(
        n * math.prod(shape) for _, n, shape in _layout(cfg, padded)
    )
    if (found := path.stat().st_size) != size:
        raise ValueError(f"{path} has {found} bytes, its header needs {size}")
    tensors = {}
    at = 4 * HEADER
    for name, count, shape in _layout(cfg, padded):
        for i in range(count):
            tensor = Tensor.in_file(path, at, shape, dtype)
            at += tensor.nbytes
            if name == "wte/embedding":
                tensor = tensor.then((vocab, width), lambda x: x[:vocab])
            elif name.endswith("/kernel"):
                tensor = tensor.transposed()
            tensors[name.format(i)] = tensor
    return cfg, tensors


def _layout(cfg: GPT2Config, padded: int) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """(our path, how many of them, shape there) in the file's order."""
    n, d, f = cfg.n_layer, cfg.n_embd, 4 * cfg.n_embd
    yield "wte/embedding", 1, (padded, d)
    yield "wpe/embedding", 1, (cfg.n_positions, d)
    for name, out, into in (
        ("h_{}/ln_1", 0, d),
        ("h_{}/attn/c_attn", 3 * d, d),
        ("h_{}/attn/c_proj", d, d),
        ("h_{}/ln_2", 0, d),
        ("h_{}/mlp/c_fc", f, d),
        ("h_{}/mlp/c_proj", d, f),
    ):
        yield (f"{name}/kernel", n, (out, into)) if out else (f"{name}/scale", n, (d,))
        yield f"{name}/bias", n, (out or d,)
    yield "ln_f/scale", 1, (d,)
    yield "ln_f/bias", 1, (d,)


def write(path: Path, cfg: GPT2Config, params: Params, *, dtype: str) -> None:
    """Writes version 3 (float32) or 5 (bfloat16), the vocabulary padded to 128s.

    Raises:
      ValueError: when llm.c has no such model, naming the field.
    """
    for name, only in (
        ("bias", (True,)),
        ("activation_function", ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")),
        ("scale_attn_weights", (True,)),
        ("scale_attn_by_inverse_layer_idx", (False,)),
        ("layer_norm_epsilon", (1e-5,)),
        ("n_inner", (None, 4 * cfg.n_embd)),
    ):
        if getattr(cfg, name) not in only:
            raise ValueError(
                f"llm.c's format has no {name}={getattr(cfg, name)}, only {only[0]}"
            )
    version = {"float32": 3, "bfloat16": 5}[dtype]
    padded = -(-cfg.vocab_size // 128) * 128
    header = np.zeros(HEADER, "<i4")
    header[:8] = (
        *(MAGIC, version, cfg.n_positions, cfg.vocab_size),
        *(cfg.n_layer, cfg.n_head, cfg.n_embd, padded),
    )
    arrays = dict(matrices(params))
    with path.open("wb") as file:
        file.write(header.tobytes())
        for name, count, shape in _layout(cfg, padded):
            for i in range(count):
                x = arrays[name.format(i)]
                if name == "wte/embedding":
                    x = x[: cfg.vocab_size]
                    x = np.pad(x, ((0, padded - cfg.vocab_size), (0, 0)))
                elif name.endswith("/kernel"):
                    x = x.T
                assert x.shape == shape, (name, x.shape, shape)
                file.write(np.ascontiguousarray(x, VERSIONS[version]).tobytes())
