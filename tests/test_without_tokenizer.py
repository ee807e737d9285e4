"""A model that came without a tokenizer: all that needs no text works on ids."""

import json

import numpy as np
import pytest
from test_train import config

import gpt2_jax
from foreign import write_hf, write_nanogpt
from gpt2_jax.data.foreign import tokenizer_of
from gpt2_jax.data.prepare import load_index
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.training.evaluate import evaluate_run
from gpt2_jax.training.train import train

VALUES = {
    "steps": 2,
    "batch_size": 8,
    "block_size": 8,
    "optim__warmup_steps": 1,
    "eval__every": 2,
    "checkpoint__every": 2,
    "data__vocab_size": 0,
    "model__vocab_size": 0,
    "model__n_positions": 0,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """nanoGPT's train.bin and val.bin, of the ids that a model of 17 rows has."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for name, n in (("train", 400), ("val", 65)):
        rng.integers(0, 17, n).astype("<u2").tofile(folder / f"{name}.bin")
    return folder


def val_losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return [r["val_loss"] for r in records if "val_loss" in r]


def test_it_is_trained_further_on_shards_and_evaluated_on_them(shards, tmp_path):
    model = write_hf(tmp_path / "model", eos_token_id=[3, 5])
    lm = gpt2_jax.load(model)
    ids = np.fromfile(shards / "val.bin", "<u2").astype(int)
    logits = np.asarray(lm.logits(ids[:64].reshape(8, 8)), np.float64)
    logp = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    expected = -np.take_along_axis(logp, ids[1:].reshape(8, 8, 1), -1).mean()

    run = tmp_path / "run"
    values = {**VALUES, "init_from": str(model), "data__path": str(shards)}
    train(config(**values), run)
    # float32 sums of 64 losses of size 3
    assert val_losses(run)[0] == pytest.approx(expected, rel=1e-5)
    result, _ = evaluate_run(run, "validation", batch_size=8)
    assert result.loss == pytest.approx(val_losses(run)[-1], rel=1e-5)
    assert result.tokens == 64
    assert load_index(run / "data").tokenizer_kind == "none"
    trained = gpt2_jax.load(run)
    assert isinstance(trained.tokenizer, NoTokenizer)
    assert trained.tokenizer.end_ids == (3, 5)
    with pytest.raises(ValueError, match=r"text needs a tokenizer.*token ids alone"):
        trained.generate("text")


def test_text_and_tokenizers_that_its_data_have(shards, tmp_path):
    model = write_nanogpt(tmp_path / "ckpt.pt")
    (tmp_path / "text.txt").write_text("the quick brown fox " * 50)
    values = {**VALUES, "init_from": str(model)}
    with pytest.raises(ValueError, match=r"is text, and the model has no tokenizer"):
        train(config(**values, data__path=str(tmp_path / "text.txt")), tmp_path / "a")
    none = gpt2_jax.load(model).tokenizer
    assert tokenizer_of(shards, none) is none
    (tmp_path / "meta.json").write_text(json.dumps({"itos": [*"abc"]}))
    assert tokenizer_of(tmp_path, none).kind == "char"
