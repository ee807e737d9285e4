import dataclasses
import signal

import jax
import numpy as np
import pytest

from configs import default
from gpt2_jax.data.loader import TokenDataset, train_batch
from gpt2_jax.data.prepare import prepare
from gpt2_jax.sharding import make_mesh
from gpt2_jax.tokenizer import ByteTokenizer
from gpt2_jax.train import (
    StopSignals,
    TrainConfig,
    changes,
    global_batch,
    make_model,
    make_writable,
    plain,
)


def config(**values) -> TrainConfig:
    c = default.get_config()
    for key, value in values.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return TrainConfig.from_dict(c.to_dict())


def test_default_py_declares_just_the_keys_that_there_are():
    cfg = config()
    declared = default.get_config().to_dict()
    assert set(declared) == {f.name for f in dataclasses.fields(cfg)}
    for name in ("data", "optim", "mesh", "eval", "checkpoint"):
        section = getattr(cfg, name)
        assert set(declared[name]) == {f.name for f in dataclasses.fields(section)}


@pytest.mark.parametrize("name", ["quickstart", "shakespeare_char", "gpt2_124m"])
def test_each_config_is_a_valid_run(name):
    module = __import__(f"configs.{name}", fromlist=["get_config"])
    cfg = TrainConfig.from_dict(module.get_config().to_dict())
    assert make_model(cfg, ByteTokenizer()).cfg.n_layer == cfg.model["n_layer"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps=0 must be >= 1"),
        ({"batch_size": 0}, "batch_size=0 must be >= 1"),
        ({"accumulation": 0}, "accumulation=0 must be >= 1"),
        ({"log_every": 0}, "log_every=0 must be >= 1"),
        ({"seed": -1}, "seed=-1 must be >= 0"),
        ({"eval__every": 0}, "eval.every=0 must be >= 1"),
        ({"eval__batches": -1}, "eval.batches=-1 must be >= 0"),
        ({"checkpoint__every": 0}, "checkpoint.every=0 must be >= 1"),
        ({"checkpoint__keep_last": 0}, "checkpoint.keep_last=0 must be >= 1"),
        ({"accumulation": 3}, "batch_size=16 does not divide by accumulation=3"),
        ({"block_size": 512}, "block_size=512 exceeds model.n_positions=256"),
        ({"dtype": "fp16"}, "dtype 'fp16' is not one of float32, bfloat16"),
        ({"attention": "flash"}, "attention 'flash' is not one of auto, xla, cudnn"),
        ({"remat": "all"}, "remat 'all' is not one of none, dots, block"),
        ({"optim__b1": 1.5}, "optim.b1=1.5 must be < 1"),
        ({"optim__warmup_steps": 1000}, "optim.warmup_steps=1000 must be less than"),
    ],
)
def test_impossible_values_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_a_vocabulary_that_does_not_fit_the_tokenizer_is_refused():
    model = make_model(config(), ByteTokenizer())
    assert model.cfg.vocab_size == 257
    padded = make_model(config(model__vocab_size=384), ByteTokenizer())
    assert padded.cfg.vocab_size == 384
    with pytest.raises(ValueError, match=r"model.vocab_size=256 is less than .*=257"):
        make_model(config(model__vocab_size=256), ByteTokenizer())


def test_attention_that_cannot_run_here_is_refused():
    with pytest.raises(ValueError, match="'cudnn' cannot run: it needs an NVIDIA GPU"):
        make_model(config(attention="cudnn"), ByteTokenizer())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_global_batch_is_the_loaders_whatever_the_mesh(tmp_path, accumulation):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(5000)))
    prepare(text, tmp_path / "data", ByteTokenizer())
    dataset = TokenDataset(tmp_path / "data", "train")
    cfg = config(batch_size=16, block_size=32, accumulation=accumulation)
    expected = train_batch(dataset, seed=0, step=5, batch_size=16, block_size=32)
    for devices in (1, 4, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        batch = global_batch(dataset, cfg, mesh, step=5)
        assert batch.shape == (accumulation, 16 // accumulation, 33)
        np.testing.assert_array_equal(np.asarray(batch).reshape(16, 33), expected)
        assert len(batch.sharding.device_set) == devices


def test_changes_are_named_by_their_path():
    old, new = plain(config()), plain(config(steps=7, optim__warmup_steps=2))
    assert changes(old, old) == {}
    assert changes(old, new) == {"steps": (1000, 7), "optim.warmup_steps": (100, 2)}


def test_signals_are_noted_once_and_then_left_to_python(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.received is None
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before
    assert "stopping after this step" in capfd.readouterr().err


def test_a_folder_that_can_not_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_writable(tmp_path / "file" / "run")
