import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import default
from gpt2_jax.checkpoints.checkpoint import Contract
from gpt2_jax.data.loader import TextExamples, train_examples
from gpt2_jax.data.prepare import prepare
from gpt2_jax.model import abstract_params
from gpt2_jax.runtime.lock import Lock
from gpt2_jax.runtime.platform import traced_for
from gpt2_jax.runtime.sharding import make_mesh, tree_shardings
from gpt2_jax.tokenizers.plain import ByteTokenizer
from gpt2_jax.training import setup
from gpt2_jax.training.batches import global_batch
from gpt2_jax.training.config import Position, TrainConfig, changes, plain
from gpt2_jax.training.early_stopping import Best, EarlyStopping
from gpt2_jax.training.resume import position
from gpt2_jax.training.setup import make_model, scans_layers
from gpt2_jax.training.train import make_writable, train

CONFIGS = sorted(path.stem for path in Path(default.__file__).parent.glob("*.py"))


def named(name: str) -> TrainConfig:
    module = __import__(f"configs.{name}", fromlist=["get_config"])
    return TrainConfig.from_dict(module.get_config().to_dict())


def config(**values) -> TrainConfig:
    c = default.get_config()
    for key, value in values.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return TrainConfig.from_dict(c.to_dict())


def test_default_py_declares_just_the_keys_that_there_are():
    cfg = config()
    declared = default.get_config().to_dict()
    assert set(declared) == {f.name for f in dataclasses.fields(cfg)}
    for name in ("data", "optim", "lora", "mesh", "eval", "checkpoint"):
        section = getattr(cfg, name)
        assert set(declared[name]) == {f.name for f in dataclasses.fields(section)}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_is_a_valid_run(name):
    cfg = named(name)
    assert make_model(cfg, ByteTokenizer()).cfg.n_layer == cfg.model["n_layer"]


@pytest.mark.parametrize(
    ("name", "millions", "examples"),
    [
        ("gpt2_124m", 124, 8),
        ("gpt2_124m_muon", 124, 8),
        ("gpt2_355m", 355, 8),
        ("gpt2_774m", 774, 4),
        ("gpt2_1558m", 1558, 2),
    ],
)
def test_recipes_are_of_their_size_and_fit_eight_devices(name, millions, examples):
    cfg = named(name)
    mesh = make_mesh(**dataclasses.asdict(cfg.mesh))
    cut = cfg.microbatches(cfg.batch_size, mesh)
    assert cfg.batch_size // cut == 8 * examples
    params = abstract_params(make_model(cfg, ByteTokenizer()).cfg)
    n_params = sum(x.size for x in jax.tree.leaves(params))
    assert n_params == pytest.approx(millions * 1e6, rel=0.005)
    shards = tree_shardings(params, mesh)["h_0"]["mlp"]["c_fc"]["kernel"]
    assert shards.is_fully_replicated == (millions < 700)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps=0 must be >= 1"),
        ({"batch_size": 0}, "batch_size=0 must be >= 1"),
        ({"device_batch_size": -1}, "device_batch_size=-1 must be >= 0"),
        ({"batch_warmup": ((9, 32),)}, r"batch_warmup=\(\(9, 32\),\) must be pairs"),
        ({"batch_warmup": ((9, 4), (9, 8))}, "must be pairs of tokens and batch size"),
        ({"batch_warmup": ((9, 8), (20, 4))}, "that rise to batch_size=16"),
        ({"log_every": 0}, "log_every=0 must be >= 1"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 4294967295\]"),
        ({"eval__every": 0}, "eval.every=0 must be >= 1"),
        ({"eval__examples": -1}, "eval.examples=-1 must be >= 0"),
        ({"checkpoint__every": 0}, "checkpoint.every=0 must be >= 1"),
        ({"checkpoint__keep_last": 0}, "checkpoint.keep_last=0 must be >= 1"),
        (
            {"block_size": 512, "model__n_positions": 256},
            "block_size=512 exceeds model.n_positions=256",
        ),
        ({"dtype": "fp16"}, "dtype='fp16' is not one of float32, bfloat16"),
        ({"attention": "flash"}, "attention='flash' is not one of auto, xla, cudnn"),
        ({"remat": "all"}, "remat='all' is not one of none, dots, block"),
        ({"optim__b1": 1.5}, "optim.b1=1.5 must be in"),
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


@pytest.mark.parametrize("device_batch_size", [0, 1, 4])
def test_a_global_batch_is_the_same_on_every_mesh(tmp_path, device_batch_size):
    """However many devices there are, and however little each of them takes."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 26) for i in range(5000)))
    prepare(text, tmp_path / "data", ByteTokenizer())
    source = TextExamples([tmp_path / "data"], "train", block_size=32)
    dataset = source.parts[0]
    cfg = config(batch_size=16, block_size=32, device_batch_size=device_batch_size)
    expected = train_examples(dataset, np.arange(80, 96), seed=0, block_size=32)
    for devices in (1, 4, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        batch, mask, segments = global_batch(source, cfg, mesh, step=5)
        assert mask is None
        assert segments is None
        cut = (
            1 if device_batch_size == 0 else max(1, 16 // devices // device_batch_size)
        )
        assert batch.shape == (cut, 16 // cut, 33)
        np.testing.assert_array_equal(np.asarray(batch).reshape(16, 33), expected)
        assert len(batch.sharding.device_set) == devices


def test_microbatches_are_the_fewest_that_fit():
    mesh = make_mesh(2, 2, 2)  # examples are spread over four
    for size, limit, expected in [
        (16, 0, 1),
        (16, 4, 1),
        (16, 3, 2),
        (24, 4, 2),
        (24, 5, 2),
        (28, 3, 7),
        (4, 9, 1),
    ]:
        cfg = config(batch_size=size, device_batch_size=limit)
        assert cfg.microbatches(size, mesh) == expected
    with pytest.raises(ValueError, match=r"batch of 6 examples .* by the 4 devices"):
        config().microbatches(6, mesh)


def test_the_batch_grows_by_tokens_and_leaves_no_example_out():
    cfg = config(batch_size=16, block_size=10, batch_warmup=((100, 4), (400, 8)))
    batches = [cfg.batch(step) for step in range(12)]
    # 3 x 4 examples are the first to hold 100 tokens, 4 x 8 more to reach 400
    assert [len(b) for b in batches] == [4] * 3 + [8] * 4 + [16] * 5
    assert [i for b in batches for i in b] == list(range(3 * 4 + 4 * 8 + 5 * 16))
    assert config(batch_size=6).batch(7) == range(42, 48)


@pytest.mark.parametrize(
    ("platform", "scanned"), [("cpu", []), ("gpu", [25, 48]), ("tpu", [1, 24, 25, 48])]
)
def test_layers_are_scanned_where_that_pays(platform, scanned):
    depths = [1, 24, 25, 48]
    with traced_for(platform):
        assert [n for n in depths if scans_layers(n, "none")] == scanned
        # without a scan XLA:GPU would keep what is to be computed again
        with_remat = [n for n in depths if scans_layers(n, "dots")]
    assert with_remat == ([] if platform == "cpu" else depths)


@pytest.mark.slow
def test_layers_may_be_scanned_or_not_from_one_call_of_a_run_to_the_next(
    tmp_path, monkeypatch
):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 99)

    def run(workdir, steps, scan_layers):
        def make(*args, **kwargs):
            return make_model(*args, **kwargs).clone(scan_layers=scan_layers)

        monkeypatch.setattr(setup, "make_model", make)
        cfg = config(
            **{"steps": steps, "batch_size": 8, "block_size": 16},
            **{"data__path": str(text), "data__tokenizer": "bytes"},
            **{"data__vocab_size": 0, "model__n_layer": 2, "model__n_embd": 32},
            **{"optim__schedule": "constant", "optim__warmup_steps": 1},
            **{"optim__ema_decay": 0.5, "eval__sample_tokens": 2},
        )
        return train(cfg, tmp_path / workdir).val_loss

    expected = run("loop", 6, False)
    assert run("both", 2, True) > expected + 0.1
    run("both", 4, False)
    # the same sums in another order
    assert run("both", 6, True) == pytest.approx(expected, rel=1e-4)


def test_changes_are_named_by_their_path():
    old, new = plain(config()), plain(config(steps=7, optim__warmup_steps=2))
    assert changes(old, old) == {}
    assert changes(old, new) == {"steps": (1000, 7), "optim.warmup_steps": (100, 2)}


def test_a_folder_that_can_not_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_writable(tmp_path / "file" / "run")


def test_sizes_of_batches_may_change_and_no_example_comes_twice():
    """A position counts examples: what is left of the warmup is the same from there."""
    warmup = config(batch_size=16, block_size=10, batch_warmup=((100, 4), (400, 8)))
    whole = [warmup.batch(step) for step in range(12)]
    for at in range(12):
        since = Position(at, whole[at].start)
        assert [warmup.batch(step, since) for step in range(at, 12)] == whole[at:]
    seen = [i for step in range(6) for i in config(batch_size=4).batch(step)]
    since = Position(6, 24)
    for size in (2, 32):
        seen += config(batch_size=size).batch(6, since)
        since = Position(6, len(seen))
    assert seen == list(range(24 + 2 + 32))


def test_where_a_checkpoint_stands_that_does_not_say():
    run = {"batch_size": 4, "batch_warmup": [[160, 2]], "block_size": 16}
    contract = Contract(9, make_model(config(), ByteTokenizer()).cfg, run, None, {}, {})
    expected = 5 * 2 + 4 * 4  # 160 tokens are 10 examples, by two
    cfg = config(batch_size=8, block_size=16)
    assert position(cfg, contract) == Position(9, expected)
    newer = dataclasses.replace(contract, examples=7)
    assert position(cfg, newer) == Position(9, 7)


def test_what_is_not_finite_is_never_the_best():
    best = None
    for step, loss in enumerate((math.nan, 3.0, math.nan, -math.inf, 2.0, math.inf)):
        best = Best.after(best, step, loss)
        assert (
            best
            == {
                0: None,
                1: Best(1, 3.0),
                2: Best(1, 3.0, since=1),
                3: Best(1, 3.0, since=2),
                4: Best(4, 2.0),
                5: Best(4, 2.0, since=1),
            }[step]
        )


@pytest.mark.parametrize(("patience", "ends_after"), [(0, None), (1, 3), (2, 4)])
def test_a_run_ends_early_when_its_loss_stays_where_it_is(patience, ends_after):
    early_stopping, ended = EarlyStopping(patience, None), []
    for step, loss in enumerate((4.0, 3.0, 2.0, 2.5, math.nan, 2.5)):
        early_stopping.update(step, loss)
        assert early_stopping.keeps(step) == (patience > 0 and step <= 2)
        ended += [step] * early_stopping.exhausted
    assert early_stopping.best == Best(2, 2.0, since=3)
    assert ended[:1] == ([] if ends_after is None else [ends_after])


def test_two_trainings_in_one_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gpt2_jax.runtime.lock.PATIENCE", 0)
    text = tmp_path / "text.txt"
    text.write_text("too short")
    cfg = config(data__path=str(text), data__tokenizer="bytes", data__vocab_size=0)
    (tmp_path / "run").mkdir()
    with Lock(tmp_path / "run/.lock", "training in run"):
        with pytest.raises(BlockingIOError, match=r"another process is training in .*"):
            train(cfg, tmp_path / "run")
        assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
    # which bad input leaves free
    for _ in range(2):
        with pytest.raises(ValueError, match="split"):
            train(cfg, tmp_path / "run")
        assert not (tmp_path / "run/.lock").exists()
