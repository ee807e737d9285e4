"""Tensors to parameters: each number to its shard, and nothing that isn't whole."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import gpt2_jax
from foreign import (
    SMALL,
    assert_same,
    expected,
    flat,
    hf_state,
    write_hf,
    write_llmc,
    write_nanogpt,
)
from gpt2_jax.formats.params import load_params, matrices, matrix_shapes
from gpt2_jax.formats.tensors import Tensor
from gpt2_jax.model import abstract_params
from gpt2_jax.runtime.sharding import make_mesh, tree_shardings
from shapes import random_params

EVEN = dataclasses.replace(SMALL, vocab_size=24)


def tensors_of(params):
    return {path: Tensor.of(x) for path, x in matrices(params)}


@pytest.mark.parametrize(
    "changes", [{}, {"bias": False}, {"n_inner": 40, "n_layer": 1, "n_head": 1}]
)
def test_matrix_shapes(changes):
    cfg = dataclasses.replace(SMALL, **changes)
    params = random_params(cfg, 1.0)
    found = {path: x.shape for path, x in matrices(params)}
    assert dict(matrix_shapes(cfg)) == found
    assert found["h_0/attn/c_attn/kernel"] == (8, 24)
    assert found["h_0/attn/c_proj/kernel"] == (8, 8)
    assert_same(load_params(cfg, tensors_of(params), dtype="float32"), flat(params))


def test_on_a_mesh():
    params = random_params(EVEN, 1.0)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = tree_shardings(abstract_params(EVEN), mesh)
    loaded = load_params(
        EVEN, tensors_of(params), dtype=jnp.float32, shardings=shardings
    )
    assert_same(loaded, flat(params))
    for x, wanted, place in zip(
        *map(jax.tree.leaves, (loaded, params, shardings)), strict=True
    ):
        assert x.sharding == place
        assert len(x.addressable_shards) == 8
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(wanted)[shard.index])
    wte = loaded["wte"]["embedding"]
    assert {shard.data.shape for shard in wte.addressable_shards} == {(12, 4)}
    kernel = loaded["h_1"]["attn"]["c_attn"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(4, 3, 1, 4)}


@pytest.mark.parametrize("write", [write_hf, write_nanogpt, write_llmc])
def test_load_with_a_mesh(tmp_path, write):
    path = write(tmp_path / "model.pt")
    lm = gpt2_jax.load(path, mesh=make_mesh(data=2, fsdp=4))
    assert_same(lm.params, expected(hf_state()))
    kernel = lm.params["h_1"]["mlp"]["c_fc"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 32)}
    one = gpt2_jax.load(path)
    assert one.params["wte"]["embedding"].devices() == {jax.devices()[0]}
    ids = [[1, 2, 3]]
    # the same sums in another order, logits of size 5
    np.testing.assert_allclose(lm.logits(ids), one.logits(ids), atol=2e-5)


def test_a_mesh_that_does_not_fit(tmp_path):
    path = write_hf(tmp_path / "model")
    message = "wte/embedding has a dimension of 17, which mesh axis tensor=2"
    with pytest.raises(ValueError, match=message):
        gpt2_jax.load(path, mesh=make_mesh(tensor=2))


@pytest.mark.parametrize("source", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_dtypes(source):
    params = jax.tree.map(
        lambda x: np.asarray(x).astype(source), random_params(SMALL, 1)
    )
    for dtype in (jnp.float32, jnp.bfloat16):
        loaded = load_params(SMALL, tensors_of(params), dtype=dtype)
        wanted = {path: x.astype(dtype) for path, x in flat(params).items()}
        assert_same(loaded, wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", ["wte/embedding", "h_1/mlp/c_proj/bias", "ln_f/scale"])
def test_numbers_that_are_not_finite(path, value):
    arrays = dict(matrices(random_params(SMALL, 1.0)))
    arrays[path] = arrays[path].copy()
    arrays[path].flat[-1] = value
    tensors = {name: Tensor.of(x) for name, x in arrays.items()}
    with pytest.raises(ValueError, match=f"^x.bin: {path} holds NaN or infinity$"):
        load_params(SMALL, tensors, dtype=jnp.float32, where="x.bin")


def test_a_number_too_large_for_the_dtype():
    tensors = tensors_of(random_params(SMALL, 1.0))
    tensors["ln_f/bias"] = Tensor.of(np.full(8, 1e300))
    with pytest.raises(ValueError, match="ln_f/bias holds NaN or infinity"):
        load_params(SMALL, tensors, dtype=jnp.float32)


def refuse_to_read():
    raise AssertionError("read before all was checked")


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("h_1/ln_2/bias", None, "x.bin has no tensor for h_1/ln_2/bias"),
        (
            "h_2/ln_2/bias",
            Tensor.of(np.zeros(8)),
            "x.bin has h_2/ln_2/bias too",
        ),
        (
            "h_1/attn/c_attn/kernel",
            Tensor.of(np.zeros((24, 8))),
            "x.bin: h_1/attn/c_attn/kernel has shape [24, 8], the config needs [8, 24]",
        ),
        (
            "ln_f/scale",
            Tensor.of(np.zeros(8, np.int32)),
            "x.bin: ln_f/scale has dtype int32",
        ),
    ],
)
def test_all_is_checked_before_anything_is_read(name, tensor, message):
    tensors = {
        path: Tensor(shape, np.dtype(np.float32), refuse_to_read)
        for path, shape in matrix_shapes(SMALL)
    }
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(ValueError, match=re.escape(message)):
        load_params(SMALL, tensors, dtype=jnp.float32, where="x.bin")


@pytest.mark.parametrize("field", ["n_layer", "n_embd", "vocab_size", "n_positions"])
def test_a_config_that_lies_costs_nothing(field):
    cfg = dataclasses.replace(SMALL, **{field: 10_000})
    tensors = tensors_of(random_params(SMALL, 1.0))
    with pytest.raises(ValueError, match=r"no tensor for h_2|the config needs"):
        load_params(cfg, tensors, dtype=jnp.float32)


def test_a_tensor_in_a_file(tmp_path):
    path = tmp_path / "numbers"
    numbers = np.arange(12, dtype="<f4").reshape(3, 4)
    path.write_bytes(b"odd" + numbers.tobytes())
    tensor = Tensor.in_file(path, 3, (3, 4), np.dtype("<f4"))
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((3, 4), "<f4", 48)
    np.testing.assert_array_equal(tensor.read(), numbers)
    np.testing.assert_array_equal(tensor.transposed().read(), numbers.T)
    assert tensor.transposed().shape == (4, 3)
    np.testing.assert_array_equal(tensor.reshaped(2, 6).read(), numbers.reshape(2, 6))
    half = tensor.then((3, 2), lambda x: x[:, ::2])
    np.testing.assert_array_equal(half.transposed().read(), [[0, 4, 8], [2, 6, 10]])
    for part in (tensor, tensor.transposed(), tensor.reshaped(2, 6), half):
        assert not part.read().flags.owndata  # mapped
    with pytest.raises(ValueError, match="numbers is cut: 51 bytes, its header needs"):
        Tensor.in_file(path, 4, (3, 4), np.dtype("<f4"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="numbers"):
        tensor.read()
