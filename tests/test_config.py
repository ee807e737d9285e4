import dataclasses

import pytest

from gpt2_jax.config import SIZES, GPT2Config


def test_the_four_sizes_by_name():
    assert list(SIZES) == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]
    for name in SIZES:
        cfg = GPT2Config.named(name)
        assert (cfg.vocab_size, cfg.n_positions, cfg.head_dim) == (50257, 1024, 64)
        assert cfg.mlp_dim == 4 * cfg.n_embd
    assert GPT2Config.named("gpt2-xl", n_positions=2048).n_positions == 2048


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'gpt3' is not one of gpt2, gpt2-medium"):
        GPT2Config.named("gpt3")


def test_frozen_and_hashable():
    cfg = GPT2Config()
    assert hash(cfg) == hash(GPT2Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.n_layer = 1


def test_dict_round_trip_and_unknown_field():
    cfg = GPT2Config(n_inner=100)
    assert GPT2Config.from_dict(dataclasses.asdict(cfg)) == cfg
    assert cfg.mlp_dim == 100
    with pytest.raises(ValueError, match="unknown GPT2Config field 'n_heads'"):
        GPT2Config.from_dict({"n_heads": 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be >= 1"),
        ({"n_positions": -1}, "n_positions=-1 must be >= 1"),
        ({"n_embd": 0}, "n_embd=0 must be >= 1"),
        ({"n_layer": 0}, "n_layer=0 must be >= 1"),
        ({"n_layer": 2.0}, "n_layer=2.0 must be an integer"),
        ({"n_layer": True}, "n_layer=True must be an integer"),
        ({"n_head": 7}, "n_embd=768 is not divisible by n_head=7"),
        ({"n_inner": 0}, "n_inner=0 must be >= 1"),
        ({"bias": 1}, "bias=1 must be True or False"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon=0 must be > 0"),
        (
            {"initializer_range": float("nan")},
            "initializer_range=nan must be a number, finite",
        ),
        ({"layer_norm_epsilon": 1e-50}, "=1e-50, which is 0 in float32, must be > 0"),
        ({"n_layer": 10**6}, "n_layer=1000000 must be <= 10000"),
        ({"attn_pdrop": 1 - 1e-12}, r"which is 1 in float32, must be in \[0, 1\)"),
        ({"embd_pdrop": 1.0}, r"embd_pdrop=1.0 must be in \[0, 1\)"),
        ({"attn_pdrop": -0.1}, r"attn_pdrop=-0.1 must be in \[0, 1\)"),
        ({"resid_pdrop": "0.1"}, "resid_pdrop='0.1' must be a number"),
    ],
)
def test_impossible_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config(**values)
