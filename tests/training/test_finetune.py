import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_train import config

import gpt2_jax
from gpt2_jax.checkpoints import checkpoint
from gpt2_jax.config import GPT2Config
from gpt2_jax.formats.convert import convert
from gpt2_jax.formats.open_model import Source
from gpt2_jax.runtime.sharding import make_mesh
from gpt2_jax.tokenizers.gpt2 import GPT2Tokenizer
from gpt2_jax.tokenizers.gpt2_files import BYTE_OF_CHARACTER
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer
from gpt2_jax.training.evaluate import evaluate_run
from gpt2_jax.training.finetune import check_tokenizer, load_params, resize_params
from gpt2_jax.training.records import read_metrics
from gpt2_jax.training.train import train
from shapes import TINY, random_params

RUN = {
    **{"steps": 6, "batch_size": 8, "block_size": 16, "log_every": 1},
    **{"model__n_embd": 16, "model__n_layer": 2, "model__n_head": 2},
    **{"data__tokenizer": "bytes", "data__vocab_size": 0},
    **{"optim__warmup_steps": 2, "eval__every": 3, "eval__examples": 8},
    **{"checkpoint__every": 3, "checkpoint__keep_last": 9},
}
TUNE = {**RUN, "data__tokenizer": "", "model__n_embd": 256, "model__n_layer": 4}


def losses(workdir):
    return [r["loss"] for r in read_metrics(workdir / "metrics.jsonl") if "loss" in r]


def val_losses(workdir):
    records = read_metrics(workdir / "metrics.jsonl")
    return [r["val_loss"] for r in records if "val_loss" in r]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "one.txt").write_text("To be, or not to be, that is the question. " * 99)
    (folder / "two.txt").write_text("Whether 'tis nobler in the mind to suffer? " * 99)
    return folder


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory):
    """A run on the first text."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    train(config(**RUN, data__path=str(texts / "one.txt")), workdir)
    return workdir


def test_a_run_begins_with_the_weights_of_another(base, texts, tmp_path):
    cfg = config(
        **{**TUNE, "data__path": str(texts / "one.txt"), "optim__ema_decay": 0.5},
        init_from=str(base),
    )
    train(cfg, tmp_path / "run")
    # of the same parameters on the same batches: not a figure's difference
    assert val_losses(tmp_path / "run")[0] == val_losses(base)[-1]
    contract = checkpoint.latest_contract(tmp_path / "run/checkpoints")
    assert contract.model == checkpoint.latest_contract(base / "checkpoints").model
    assert contract.tokenizer.kind == "bytes"


def test_from_a_file_of_another_program_and_resumed_without_it(
    base, texts, tmp_path, capsys
):
    convert(base, "hf", tmp_path / "model")
    values = {**TUNE, "data__path": str(texts / "two.txt")}
    values |= {"optim__schedule": "constant", "init_from": str(tmp_path / "model")}
    train(config(**values), tmp_path / "whole")
    train(config(**values | {"steps": 3}), tmp_path / "cut")
    shutil.rmtree(tmp_path / "model")
    train(config(**values), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ours, theirs = (gpt2_jax.load(tmp_path / d).params for d in ("cut", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(ValueError, match=r"init_from=.*model: no such file or folder"):
        train(config(**values), tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_vocabulary_and_context_are_resized_where_that_is_asked_for(
    base, texts, tmp_path, capfd
):
    sizes = {"model__vocab_size": 272, "model__n_positions": 24, "steps": 3}
    values = {**TUNE, **sizes, "data__path": str(texts / "one.txt"), "block_size": 24}
    train(config(**values, init_from=str(base), mesh__tensor=2), tmp_path / "run")
    assert "note: n_positions of" in capfd.readouterr().err
    params = gpt2_jax.load(tmp_path / "run").params
    assert params["wte"]["embedding"].shape == (272, 16)
    assert params["wpe"]["embedding"].shape == (24, 16)
    with pytest.raises(ValueError, match=r"block_size=24 exceeds n_positions=16 of"):
        train(
            config(**values | {"model__n_positions": 0}, init_from=str(base)),
            tmp_path / "other",
        )


def test_new_rows_are_the_mean_and_new_positions_drawn():
    params = random_params(TINY, 0.2)
    cfg = GPT2Config.from_dict({**vars(TINY), "vocab_size": 70, "n_positions": 600})
    new = resize_params(params, cfg, n_known=60, seed=1)
    wte, wpe = params["wte"]["embedding"], params["wpe"]["embedding"]
    np.testing.assert_array_equal(new["wte"]["embedding"][:60], wte[:60])
    mean = np.asarray(wte[:60], np.float64).mean(0)
    # a float32 mean of 60 numbers of size 0.2
    np.testing.assert_allclose(
        new["wte"]["embedding"][60:], np.tile(mean, (10, 1)), atol=1e-7
    )
    np.testing.assert_array_equal(new["wpe"]["embedding"][:64], wpe)
    drawn = np.asarray(new["wpe"]["embedding"][64:])
    # 17,152 draws: their deviation is known to 0.5 %
    assert drawn.std() == pytest.approx(0.02, rel=0.02)
    cut = resize_params(
        params,
        GPT2Config.from_dict({**vars(TINY), "n_positions": 5}),
        n_known=61,
        seed=1,
    )
    np.testing.assert_array_equal(cut["wpe"]["embedding"], wpe[:5])
    np.testing.assert_array_equal(cut["wte"]["embedding"], wte)


def gpt2_tokenizer(*special: str) -> GPT2Tokenizer:
    """All bytes, no merge, end of text, and special tokens."""
    names = [*BYTE_OF_CHARACTER, "<|endoftext|>", *special]
    vocab = json.dumps({name: i for i, name in enumerate(names)}).encode()
    return GPT2Tokenizer({"vocab.json": vocab, "merges.txt": b"#version: 0.2\n"})


def test_a_new_token_may_take_a_row_of_the_padding():
    """The size stays, and still the row is not what padding happened to be."""
    cfg = GPT2Config.from_dict({**vars(TINY), "vocab_size": 264, "n_layer": 1})
    tokenizer, extended = gpt2_tokenizer(), gpt2_tokenizer("<|user|>")
    check_tokenizer(extended, tokenizer)
    params = random_params(cfg, 0.2)
    source = Source(cfg, tokenizer, lambda _, places: jax.device_put(params, places))
    mesh = make_mesh(2, 2, 2)
    loaded = load_params(source, cfg, tokenizer, mesh, seed=0)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert len(loaded["wte"]["embedding"].sharding.device_set) == 8
    grown = load_params(source, cfg, extended, mesh, seed=0)
    wte = params["wte"]["embedding"]
    np.testing.assert_allclose(
        grown["wte"]["embedding"][257], wte[:257].mean(0), atol=1e-7
    )
    assert not np.allclose(wte[257], wte[:257].mean(0), atol=0.01)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (ByteTokenizer(), "bytes, not gpt2"),
        (gpt2_tokenizer("<b>"), "id 257 is b'<b>', not b'<a>'"),
        (gpt2_tokenizer(), "257 ids, not 258"),
    ],
)
def test_a_tokenizer_of_other_ids_is_refused(tokenizer, message):
    with pytest.raises(ValueError, match=f"is not that of init_from: {message}"):
        check_tokenizer(tokenizer, gpt2_tokenizer("<a>"))
    characters = [CharTokenizer("ab"), CharTokenizer("ba")]
    check_tokenizer(*characters[:1] * 2)


ADAPT = {**TUNE, "lora__rank": 2, "optim__learning_rate": 0.02}


@pytest.fixture(scope="module")
def adapted(base, texts, tmp_path_factory):
    """A run that adapts the first one to the second text."""
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    values = {**ADAPT, "data__path": str(texts / "two.txt"), "optim__ema_decay": 0.5}
    train(config(**values, init_from=str(base)), workdir)
    return workdir, values


def test_an_adapted_run_loads_merged(base, adapted, texts):
    workdir, _ = adapted
    lm = gpt2_jax.load(workdir)
    assert lm.params["h_0"]["mlp"]["c_fc"].keys() == {"kernel", "bias"}
    before = gpt2_jax.load(base).params
    np.testing.assert_array_equal(
        lm.params["wte"]["embedding"], before["wte"]["embedding"]
    )
    result, _ = evaluate_run(workdir, "validation", batch_size=8)
    all_targets = val_losses(workdir)
    assert all_targets[-1] < all_targets[0] - 0.01
    # evaluated over 8 examples there, here over all: much the same text
    assert result.loss == pytest.approx(all_targets[-1], abs=0.1)
    # the state is small: no moments, nor a copy, of what is not trained
    with ocp.StandardCheckpointer() as checkpointer:
        states = [
            checkpointer.metadata(d / "checkpoints/6/state") for d in (workdir, base)
        ]
    adapted_size, base_size = (
        sum(math.prod(x.shape) for x in jax.tree.leaves(state.item_metadata.tree))
        for state in states
    )
    assert adapted_size < base_size / 5


def test_adapters_are_merged_into_files_of_other_programs(adapted, tmp_path):
    workdir, _ = adapted
    convert(workdir, "hf", tmp_path / "out")
    ours, theirs = (gpt2_jax.load(path).params for path in (workdir, tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_adapters_resume_and_miss_their_base(base, adapted, texts, tmp_path):
    _, values = adapted
    constant = {**values, "optim__schedule": "constant"}
    moved = shutil.copytree(base, tmp_path / "base")
    cfg = config(**constant, init_from=str(moved))
    cut = config(**constant | {"steps": 3}, init_from=str(moved))
    train(cfg, tmp_path / "whole")
    train(cut, tmp_path / "cut")
    train(cfg, tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"has lora.rank=2, the config 3"):
        train(
            dataclasses.replace(cfg, lora=dataclasses.replace(cfg.lora, rank=3)),
            tmp_path / "cut",
        )
    # both are moved, or the base alone
    (tmp_path / "new").mkdir()
    for name in ("base", "cut"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    assert gpt2_jax.load(tmp_path / "new/cut").step == cfg.steps
    (tmp_path / "new/base").rename(tmp_path / "elsewhere")
    elsewhere = dataclasses.replace(cfg, init_from=str(tmp_path / "elsewhere"))
    assert train(elsewhere, tmp_path / "new/cut").step == cfg.steps
    for name, place in (("elsewhere", "base"), ("new/cut", "cut")):
        (tmp_path / name).rename(tmp_path / place)
    # another model in the place of the base, and none
    other = checkpoint.find_step(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"checkpoint .* holds adapters of .*base: no checkpoint in"
    ):
        gpt2_jax.load(tmp_path / "cut")
    train(config(**RUN, seed=1, data__path=str(texts / "one.txt")), tmp_path / "base")
    assert other.exists()
    with pytest.raises(ValueError, match=r"base, whose parameters are others now"):
        gpt2_jax.load(tmp_path / "cut")


def test_adapters_need_a_base_as_it_is(base, texts, tmp_path):
    values = {**ADAPT, "data__path": str(texts / "two.txt")}
    with pytest.raises(ValueError, match=r"lora.rank=2 adapts nothing: set init_from"):
        config(**values)
    with pytest.raises(ValueError, match=r"optim.name=muon is for kernels"):
        config(**values, init_from=str(base), optim__name="muon")
    with pytest.raises(ValueError, match=r"vocab_size 257 of .* can't become 300"):
        train(
            config(**values, init_from=str(base), model__vocab_size=300),
            tmp_path / "run",
        )
    with pytest.raises(ValueError, match=r"lora.rank=17 exceeds 16, a side of"):
        train(
            config(**{**values, "lora__rank": 17}, init_from=str(base)),
            tmp_path / "run",
        )
    assert not (tmp_path / "run/checkpoints").exists()


def test_patience_ends_a_run_and_the_best_is_kept(texts, tmp_path, capsys):
    values = {
        **RUN,
        **{"steps": 60, "eval__every": 2, "checkpoint__every": 50},
        **{"checkpoint__keep_last": 1, "eval__patience": 3, "eval__examples": 0},
        **{"optim__learning_rate": 0.5, "optim__min_learning_rate": 0.5},
        "data__path": str(texts / "one.txt"),
    }
    result = train(config(**values), tmp_path / "run")  # at a rate that diverges
    out = capsys.readouterr().out
    found = val_losses(tmp_path / "run")
    best = int(np.argmin(found))
    assert result.step == 2 * (best + 3) < 60
    assert result.best_step == 2 * best
    assert f"least validation loss {found[best]:.4f}, at step {2 * best}" in out
    assert "stopped early: eval.patience=3" in out
    assert gpt2_jax.load(tmp_path / "run").step == result.step
    assert gpt2_jax.load(tmp_path / "run", step="best").step == 2 * best
    with pytest.raises(ValueError, match="step='first' is neither a number nor 'best'"):
        gpt2_jax.load(tmp_path / "run", step="first")
    again = train(config(**values), tmp_path / "run")  # it has ended
    assert (again.step, again.best_step) == (result.step, result.best_step)


@pytest.mark.slow
def test_patience_counts_on_where_a_run_was_stopped(texts, tmp_path):
    cut = {
        **RUN,
        **{"steps": 60, "eval__every": 2, "checkpoint__every": 50},
        **{"checkpoint__keep_last": 1, "eval__patience": 3, "eval__examples": 0},
        **{"optim__learning_rate": 0.5, "optim__min_learning_rate": 0.5},
        **{"data__path": str(texts / "one.txt"), "optim__schedule": "constant"},
    }
    train(config(**cut), tmp_path / "whole")
    train(config(**cut | {"steps": 4}), tmp_path / "cut")
    end = train(config(**cut), tmp_path / "cut")
    assert val_losses(tmp_path / "cut") == val_losses(tmp_path / "whole")
    assert end.step == 2 * (len(val_losses(tmp_path / "whole")) - 1)


LINES = [{"prompt": f"{i % 5}: ", "completion": "abcde"[i % 5] * 3} for i in range(64)]


@pytest.fixture
def examples(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_a_run_of_examples(base, examples, tmp_path):
    """It learns to answer, at the place where the prompt ends."""
    path = examples
    values = {
        **{**TUNE, "steps": 120, "optim__learning_rate": 0.03, "log_every": 40},
        **{"data__kind": "sft", "data__path": str(path), "eval__every": 120},
        **{"checkpoint__every": 120},
    }
    train(config(**values, init_from=str(base)), tmp_path / "run")
    lm = gpt2_jax.load(tmp_path / "run")
    texts = lm.generate([f"{i}: " for i in range(5)], temperature=0, max_new_tokens=8)
    assert texts == [c * 3 for c in "abcde"]
    path.write_text(json.dumps(LINES[0]))
    with pytest.raises(ValueError, match=r"jsonl has changed since this run began"):
        train(config(**values, init_from=str(base)), tmp_path / "run")
    # what the run began with is in its folder
    result, _ = evaluate_run(tmp_path / "run", "validation", batch_size=8)
    assert result.tokens == 4 * 3  # of 3 examples: three letters and the end
    assert result.loss == pytest.approx(val_losses(tmp_path / "run")[-1], rel=1e-5)


@pytest.mark.parametrize(
    "lora__rank", [pytest.param(0, marks=pytest.mark.slow), 2]
)  # stopped and resumed without adapters: integration/test_stopped.py
def test_a_run_of_examples_goes_on_where_it_was_cut(
    base, examples, tmp_path, lora__rank
):
    values = {**TUNE, "data__kind": "sft", "data__path": str(examples)}
    values |= {"optim__schedule": "constant", "lora__rank": lora__rank}
    values |= {"steps": 12, "init_from": str(base)}  # three epochs of 57 examples
    train(config(**values), tmp_path / "whole")
    train(config(**values | {"steps": 3}), tmp_path / "cut")
    train(config(**values), tmp_path / "cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert val_losses(tmp_path / "cut") == val_losses(tmp_path / "whole")
    ours, theirs = (gpt2_jax.load(tmp_path / d).params for d in ("cut", "whole"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
