"""The tied matrix under its names, whoever wrote the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from foreign import (
    State,
    hf_state,
    nanogpt_state,
    write_bin,
    write_hf,
    write_nanogpt,
    write_sharded,
    write_torch,
)
from gpt2_jax.formats import hf, nanogpt
from gpt2_jax.formats.names import our_path, their_name
from gpt2_jax.formats.tensors import Tensor, same_numbers

HEAD, WTE = "lm_head.weight", "wte.weight"


def as_hf(folder: Path, state: State) -> dict[str, Tensor]:
    return hf.read(write_hf(folder, state))[1]


def as_bin(folder: Path, state: State) -> dict[str, Tensor]:
    write_bin(folder)
    write_torch(folder / "pytorch_model.bin", state)
    return hf.read(folder)[1]


def as_shards(folder: Path, state: State) -> dict[str, Tensor]:
    return hf.read(write_sharded(folder, state))[1]


def as_nanogpt(folder: Path, state: State) -> dict[str, Tensor]:
    folder.mkdir()
    state = {
        name: x.T.copy() if ".c_" in name and x.ndim == 2 else x
        for name, x in state.items()
    }
    return nanogpt.read(write_nanogpt(folder / "ckpt.pt", state))[1]


READERS: list[Callable[[Path, State], dict[str, Tensor]]] = [
    *(as_hf, as_bin, as_shards, as_nanogpt)
]


@pytest.mark.parametrize("prefix", ["", "transformer.", "_orig_mod.transformer."])
@pytest.mark.parametrize("read", READERS)
def test_the_tied_matrix(tmp_path: Path, read: Any, prefix: str):
    state, wte = hf_state(), hf_state()[WTE]
    del state[WTE]
    heads = {HEAD: wte, f"module.{prefix}{HEAD}": wte}  # beside or in the model
    for i, (name, head) in enumerate(heads.items()):
        for also in ({}, {prefix + WTE: wte}):
            tensors = read(tmp_path / f"{i}{len(also)}", {**state, name: head, **also})
            assert HEAD not in tensors
            np.testing.assert_array_equal(tensors["wte/embedding"].read(), wte)
    for i, head in enumerate((wte + 1, wte[:16], np.vstack([wte, wte[:1]]))):
        both = {**state, HEAD: head, prefix + WTE: wte}
        with pytest.raises(ValueError, match=r"lm_head\.weight .* is not wte\.weight"):
            read(tmp_path / f"other{i}", both)


def test_a_module_that_was_compiled_by_itself():
    name = "module._orig_mod.transformer.h.0._orig_mod.attn.c_attn.weight"
    named = {name: Tensor.of(np.ones(2))}
    assert list(hf.by_our_paths(named, "x")) == ["h_0/attn/c_attn/kernel"]


def test_same_numbers_whatever_their_dtype():
    x = np.linspace(-3, 3, 700_000, dtype=np.float32).reshape(70, -1)  # several parts
    x[3, 5] = np.nan
    short = x.astype(ml_dtypes.bfloat16)
    assert same_numbers(Tensor.of(x), Tensor.of(x.copy()))
    assert same_numbers(Tensor.of(short), Tensor.of(short.astype(np.float32)))
    assert not same_numbers(Tensor.of(x), Tensor.of(short))
    assert not same_numbers(Tensor.of(x), Tensor.of(x.T))
    other = x.copy()
    other[-1, -1] += 1
    assert not same_numbers(Tensor.of(x), Tensor.of(other))


def test_names_there_and_back():
    for name in {k.removeprefix("transformer.") for k in nanogpt_state()} - {HEAD}:
        assert their_name(our_path(name, "x")) == name
