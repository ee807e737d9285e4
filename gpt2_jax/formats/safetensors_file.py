"""Files of safetensors, read so that none costs more than its size allows.

Such a file is the length of its header (uint64), the header, a JSON object of
name -> {dtype, shape, data_offsets}, and the numbers, without gaps
(https://github.com/huggingface/safetensors#format). The library of that name reads
the header again for each tensor and takes no limit; it writes our files.
"""

import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt2_jax.checks import shown
from gpt2_jax.formats.names import BUFFER, bare_name
from gpt2_jax.formats.tensors import Tensor
from gpt2_jax.runtime.budget import Budget
from gpt2_jax.runtime.files import check_regular, parse_json

DTYPES = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SUFFIX = ".safetensors"
MAX_NDIM = 32
MAX_HEADER = 100_000_000  # bytes, as of the library


def is_safetensors(path: Path) -> bool:
    """Whether a file begins like one: with a length that it has, and an object."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length <= path.stat().st_size - 8


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, but for causal masks that are no floats.

    Raises:
      ValueError: on a damaged file, and on a tensor of another dtype than float32,
        float16 and bfloat16, naming it.
    """
    check_regular(path)
    size = path.stat().st_size
    budget = Budget(size)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{path} is damaged: a header of {length:,} bytes in a file of {size:,}"
            )
        text = file.read(length)
    header = parse_json(text, f"{path}: its header", budget=budget)
    if not isinstance(header, dict):
        raise ValueError(f"{path} is damaged: its header is no object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        budget.draw(1000, steps=10)
        try:
            dtype, shape, begin, end = _entry(entry)
            spans.append((begin, end))
            if dtype not in DTYPES:
                if BUFFER.fullmatch(bare_name(name)):
                    continue
                raise ValueError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
            tensor = Tensor.in_file(path, 8 + length + begin, shape, DTYPES[dtype])
            if tensor.nbytes != end - begin:
                raise ValueError(f"{end - begin:,} bytes for shape {shown([*shape])}")
        except ValueError as error:
            raise ValueError(f"{path}: tensor {shown(name)}: {error}") from None
        tensors[name] = tensor
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if [begin for begin, _ in spans] != ends[:-1] or 8 + length + ends[-1] != size:
        raise ValueError(f"{path} is damaged: its tensors overlap, or leave gaps")
    return tensors


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape, begin and end of a tensor."""
    if not isinstance(entry, dict):
        raise ValueError(f"{shown(entry)} is no object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or not re.fullmatch(r"[A-Z0-9_]{1,16}", dtype):
        raise ValueError(f"dtype {shown(dtype)}")
    shape, span = _sizes(entry, "shape"), _sizes(entry, "data_offsets")
    if len(shape) > MAX_NDIM or math.prod(shape) >= 2**62:
        raise ValueError(f"shape {shown(shape)}")
    if len(span) != 2 or span[0] > span[1]:
        raise ValueError(f"data_offsets {shown(span)}")
    return dtype, tuple(shape), span[0], span[1]


def _sizes(entry: dict[str, Any], name: str) -> list[int]:
    sizes = entry.get(name)
    if not isinstance(sizes, list) or any(
        type(n) is not int or not 0 <= n < 2**62 for n in sizes
    ):
        raise ValueError(f"{name} {shown(sizes)}")
    return sizes
