"""llm.c's model files: of a writer of the tests, and of our own."""

import dataclasses
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import gpt2_jax
from foreign import SMALL, assert_same, expected, flat, hf_state, write_llmc
from gpt2_jax.formats import llmc
from gpt2_jax.formats.params import load_params


def rounded(state):
    return {name: x.astype(ml_dtypes.bfloat16) for name, x in state.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_llmc(tmp_path / "model.bin")


def change(path: Path, at: int, value: int) -> None:
    header = np.memmap(path, "<i4", "r+", shape=(256,))
    header[at] = value
    header.flush()


@pytest.mark.parametrize("padded", [17, 128])
def test_load_float32(tmp_path, padded):
    lm = gpt2_jax.load(write_llmc(tmp_path / "model.bin", padded=padded))
    assert lm.config == SMALL
    assert_same(lm.params, expected(hf_state()))


def test_load_bfloat16(tmp_path):
    path = write_llmc(tmp_path / "model.bin", version=5)
    wanted = expected(rounded(hf_state()))
    assert_same(gpt2_jax.load(path, dtype="bfloat16").params, wanted)
    exact = {name: x.astype(np.float32) for name, x in wanted.items()}
    assert_same(gpt2_jax.load(path).params, exact)


def test_the_head_axes(path):
    kernel = gpt2_jax.load(path).params["h_1"]["attn"]["c_attn"]["kernel"]
    # the row of v (the third of q, k, v), head 1, component 2 in a file of [3D, D]
    row = hf_state()["h.1.attn.c_attn.weight"].T[2 * 8 + 1 * 4 + 2]
    np.testing.assert_array_equal(kernel[:, 2, 1, 2], row)


def test_it_generates(path):
    lm = gpt2_jax.load(path)
    ids = lm.generate([1, 2, 3], max_new_tokens=5, temperature=0)
    logits = lm.logits([[1, 2, 3]])
    assert len(ids) == 5
    assert ids[0] == int(logits[0, -1].argmax())


@pytest.mark.parametrize(("dtype", "version"), [("float32", 3), ("bfloat16", 5)])
def test_write(tmp_path, path, dtype, version):
    written = tmp_path / "written.bin"
    params = gpt2_jax.load(path).params
    llmc.write(written, SMALL, params, dtype=dtype)
    by_hand = write_llmc(tmp_path / "by_hand.bin", version=version)
    assert written.read_bytes() == by_hand.read_bytes()
    cfg, tensors = llmc.read(written)
    assert cfg == SMALL
    state = hf_state() if version == 3 else rounded(hf_state())
    assert_same(load_params(cfg, tensors, dtype=dtype), expected(state))


@pytest.mark.parametrize(
    ("size", "padded"), [(1, 128), (128, 128), (129, 256), (50257, 50304)]
)
def test_the_vocabulary_is_padded_to_128s(tmp_path, path, size, padded):
    cfg = dataclasses.replace(SMALL, vocab_size=size)
    params = dict(gpt2_jax.load(path).params)
    params["wte"] = {"embedding": np.ones((size, 8), np.float32)}
    llmc.write(path, cfg, params, dtype="float32")
    assert np.fromfile(path, "<i4", 8).tolist() == [
        *(20240326, 3, 8, size, 2, 2, 8, padded)
    ]
    wte = np.fromfile(path, "<f4", padded * 8, offset=1024).reshape(padded, 8)
    assert (wte.sum(), wte[size:].any()) == (size * 8, False)
    assert flat(gpt2_jax.load(path).params)["wte/embedding"].shape == (size, 8)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (1, 1, "has version 1, only 3 and 5 can be read"),
        (1, 4, "has version 4, only 3 and 5 can be read"),
        (2, 0, "n_positions=0 must be >= 1"),
        (2, 9, "has 12416 bytes, its header needs 12448"),
        (3, -1, "vocab_size=-1 must be >= 1"),
        (3, 129, "padded vocabulary 128 < vocabulary 129"),
        (4, 2**31 - 1, "n_layer=2147483647 must be <= 10000"),
        (4, 10**4, "has 12416 bytes, its header needs 34885440"),
        (5, 3, "n_embd=8 is not divisible by n_head=3"),
        (5, 0, "n_head=0 must be >= 1"),
        (6, 16, "has 12416 bytes, its header needs"),
        (7, 0, "padded vocabulary 0 < vocabulary 17"),
        (7, 2**31 - 1, "has 12416 bytes, its header needs 68719"),
    ],
)
def test_bad_headers(path, at, value, message):
    change(path, at, value)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        gpt2_jax.load(path)
    assert str(path) in str(error.value)


def test_a_version_of_the_other_size(path):
    change(path, 1, 5)
    with pytest.raises(ValueError, match=r"has \d+ bytes, its header needs \d+"):
        gpt2_jax.load(path)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, "is no model: expected"),
        (3, "is no model: expected"),
        (4, "is no llm.c model"),
        (1023, "is no llm.c model"),
        (1024, "has 1024 bytes, its header needs 12416"),
        (12415, "has 12415 bytes, its header needs 12416"),
        (12417, "has 12417 bytes, its header needs 12416"),
        (20000, "has 20000 bytes, its header needs 12416"),
    ],
)
def test_short_and_long_files(path, size, message):
    path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        gpt2_jax.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": False}, "bias=False, only True"),
        ({"activation_function": "gelu"}, "activation_function=gelu, only gelu_new"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False, only True"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True, only False",
        ),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06, only 1e-05"),
        ({"n_inner": 16}, "n_inner=16, only None"),
    ],
)
def test_what_llmc_cannot_hold(tmp_path, changes, message):
    cfg = dataclasses.replace(SMALL, **changes)
    path = tmp_path / "model.bin"
    with pytest.raises(ValueError, match=f"llm.c's format has no {message}"):
        llmc.write(path, cfg, {}, dtype="float32")
    assert not path.exists()


def test_the_other_names_of_its_config_are_written(tmp_path, path):
    cfg = dataclasses.replace(SMALL, n_inner=32, activation_function="gelu_fast")
    params = jax.tree.map(np.asarray, gpt2_jax.load(path).params)
    llmc.write(tmp_path / "written.bin", cfg, params, dtype="float32")
    assert (tmp_path / "written.bin").read_bytes() == path.read_bytes()
