from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_optim import CFG

from gpt2_jax.config import GPT2Config
from gpt2_jax.model import GPT2, abstract_params
from gpt2_jax.runtime.sharding import (
    _over_slices,
    batch_sharding,
    make_mesh,
    n_batch_shards,
    tree_shardings,
)
from gpt2_jax.training.optim import make_optimizer
from gpt2_jax.training.step import abstract_state
from shapes import TINY


def test_mesh_axes_and_what_is_left():
    assert dict(make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(2, -1, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    one = make_mesh(devices=jax.devices()[:1])
    assert dict(one.shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("shape", [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (2, 2, 1)])
def test_a_mesh_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="does not fit the 8 devices"):
        make_mesh(*shape)


@pytest.mark.parametrize("shape", [(-1, -1, 1), (0, 1, 1), (-2, 1, 1)])
def test_impossible_axes_are_refused(shape):
    with pytest.raises(ValueError, match="axes are >= 1, and at most one is -1"):
        make_mesh(*shape)


def test_only_the_data_axis_goes_across_slices():
    """Each slice of the data axis is one slice of the hardware."""
    devices = [
        SimpleNamespace(
            id=i, slice_index=i // 4, process_index=0, platform="cpu", device_kind="cpu"
        )
        for i in range(8)
    ]
    found = _over_slices((4, 2, 1), 2, devices)
    slices = np.vectorize(lambda d: d.slice_index)(found)
    assert slices.tolist() == [[[0], [0]], [[0], [0]], [[1], [1]], [[1], [1]]]
    assert sorted(d.id for d in found.flat) == list(range(8))
    with pytest.raises(ValueError, match=r"mesh.data=1 .* by the 2 slices"):
        _over_slices((1, 8, 1), 2, devices)


def test_each_parameter_has_one_rule_and_moments_follow():
    cfg = TINY.from_dict({**TINY.__dict__, "vocab_size": 64})
    mesh = make_mesh(2, 2, 2)
    state = abstract_state(GPT2(cfg), make_optimizer(CFG, 100), mesh)
    assert state.step.sharding.spec == P()
    specs = jax.tree.map(lambda x: x.sharding.spec, state.params)
    assert specs["wte"]["embedding"] == P("tensor", "fsdp")
    assert specs["h_0"]["attn"]["c_attn"]["kernel"] == P("fsdp", None, "tensor", None)
    assert specs["h_2"]["mlp"]["c_proj"]["kernel"] == P("tensor", "fsdp")
    assert specs["h_1"]["ln_1"]["scale"] == P()
    by_path = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    moments = [p for p in by_path if p.endswith("h_1/mlp/c_fc/kernel")]
    assert len(moments) == 2
    for path in moments:
        assert by_path[path].sharding.spec == P("fsdp", "tensor")


def test_stacked_layers_follow_the_same_rules():
    cfg = TINY.from_dict({**TINY.__dict__, "vocab_size": 64})
    model = GPT2(cfg, scan_layers=True)
    state = abstract_state(model, make_optimizer(CFG, 100), make_mesh(2, 2, 2))
    attn = state.params["h"]["attn"]
    assert attn["c_attn"]["kernel"].shape == (3, 32, 3, 4, 8)
    specs = jax.tree.map(lambda x: x.sharding.spec, attn)
    assert specs["c_attn"]["kernel"] == P(None, "fsdp", None, "tensor", None)
    assert specs["c_proj"]["kernel"] == P(None, "tensor", None, "fsdp")
    assert specs["c_proj"]["bias"] == P(None)
    assert state.params["wte"]["embedding"].sharding.spec == P("tensor", "fsdp")


def test_a_parameter_that_no_rule_or_two_match_is_refused(monkeypatch):
    mesh = make_mesh()
    with pytest.raises(ValueError, match="0 partition rules match the parameter 'w/k'"):
        tree_shardings({"w": {"k": jnp.zeros((2, 2))}}, mesh)
    from gpt2_jax.runtime import sharding

    monkeypatch.setattr(sharding, "RULES", sharding.RULES * 2)
    with pytest.raises(ValueError, match="2 partition rules match"):
        tree_shardings(abstract_params(TINY), mesh)


def test_an_axis_that_does_not_divide_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match="wte/embedding has a dimension of 61") as e:
        tree_shardings(abstract_params(TINY), make_mesh(4, 1, 2))
    assert "so would model.vocab_size=128" in str(e.value)
    xl = GPT2Config.named("gpt2-xl", n_layer=1, vocab_size=50304)
    message = r"c_attn/kernel .* of 25, which mesh axis tensor=2 .* tensor=1, 5 would$"
    with pytest.raises(ValueError, match=message):
        tree_shardings(abstract_params(xl), make_mesh(4, 1, 2))


def test_batches_spread_over_data_and_fsdp():
    mesh = make_mesh(2, 2, 2)
    assert n_batch_shards(mesh) == 4
    assert batch_sharding(mesh, 3, 1).spec == P(None, ("data", "fsdp"), None)
