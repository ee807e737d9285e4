"""Bad input to fine-tuning: one clear line, and nothing half-written."""

import json
from pathlib import Path

import pytest

from test_bad_input import refused
from test_run import TINY_RUN, run, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(text, tmp_path_factory) -> Path:
    """A run of bytes, prepared data of characters, and files of examples."""
    folder = tmp_path_factory.mktemp("tuning")
    train(folder / "base", text, "--config.steps=6", "--config.eval.sample_tokens=0")
    train(folder / "chars", text, "--config.steps=6", "--config.data.tokenizer=char")
    pair = {"prompt": "a", "completion": "b"}
    for name, lines in {
        "good": [pair] * 40,
        "few": [pair] * 3,
        "long": [pair, {"prompt": "a", "completion": 99 * "b"}],
        "half": [{"prompt": "a"}],
        "chat": [{"messages": [{"role": "assistant", "content": "Hi"}]}],
    }.items():
        content = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content)
    (folder / "cut.jsonl").write_text('{"prompt": "a", "comple')
    (folder / "empty.jsonl").touch()
    return folder


BASE = "--config.init_from={}/base"
SFT = "--config.data.kind=sft --config.data.path={}"
CASES = [
    # where it begins
    ("--config.init_from=/no/such", "init_from=/no/such: no such file or folder"),
    (
        "--config.init_from={}",
        "holds no model: expected a run's folder, a Hugging Face",
    ),
    ("--config.init_from={}/good.jsonl", "good.jsonl is no model: expected"),
    (BASE + " --config.model.vocab_size=200", "vocab_size=200 is less than the token"),
    (BASE + " --config.model.vocab_size=-1", "model.vocab_size=-1 must be >= 0"),
    (BASE + " --config.block_size=64", "block_size=64 exceeds n_positions=32 of"),
    (
        BASE + " --config.model.n_positions=8",
        "block_size=16 exceeds model.n_positions=8",
    ),
    (BASE + " --config.data.path={}/chars/data", "is not that of init_from: char, not"),
    # adapters
    ("--config.lora.rank=4", "lora.rank=4 adapts nothing: set init_from"),
    (BASE + " --config.lora.rank=-4", "lora.rank=-4 must be >= 0"),
    (
        BASE + " --config.lora.rank=400",
        "lora.rank=400 exceeds 16, a side of attn/c_attn",
    ),
    (BASE + " --config.lora.alpha=0", "lora.alpha=0.0 must be > 0"),
    (BASE + " --config.lora.dropout=1", "lora.dropout=1.0 must be in [0, 1)"),
    (BASE + " --config.lora.kernels=('wte',)", "lora.kernels: 'wte' is not one of"),
    # examples
    (SFT.format(""), "data.kind=sft needs data.path"),
    (SFT + "/none.jsonl", "no such file of examples: "),
    (SFT + "/empty.jsonl", "empty.jsonl holds no example"),
    (SFT + "/cut.jsonl", "cut.jsonl, line 1: no JSON"),
    (SFT + "/half.jsonl", "half.jsonl, line 1: no 'completion'"),
    (SFT + "/long.jsonl", "line 2: a completion of 100 tokens with its end exceeds"),
    (SFT + "/few.jsonl", "split, 0.05 of 3 examples, is empty"),
    (SFT + "/chat.jsonl", "line 1: messages: data.template must say"),
    (SFT + "/good.jsonl --config.data.template=x", "must have {content} once"),
    (SFT + "/good.jsonl --config.data.tokenizer=char", "is not trained on examples"),
    ("--config.data.kind=chat", "data.kind='chat' is not one of text, sft"),
    # data and rates
    (
        "--config.data.packing=tight",
        "data.packing='tight' is not one of flat, documents",
    ),
    ("--config.data.mixture=(('a',1),)", "and data.mixture: give one"),
    (
        "--config.data.path= --config.data.mixture=(('/no/such',1),('b',0))",
        "data.mixture: weights [1.0, 0.0] must be > 0",
    ),
    (
        "--config.data.path= --config.data.mixture=(('/no/such',1),)",
        "no prepared data in /no/such: index.json is missing",
    ),
    (
        "--config.data.path= "
        "--config.data.mixture=(('{0}/base/data',1),('{0}/chars/data',1))",
        "was made with another tokenizer than",
    ),
    ("--config.optim.lr_scales=(('h_9/',0.5),)", "lr_scales: 'h_9/' is found in no"),
    ("--config.optim.lr_scales=(('(',0.5),)", "optim.lr_scales: '(': "),
    ("--config.optim.lr_scales=(('wte',-1),)", "factor -1.0 of 'wte' must be finite"),
    ("--config.eval.patience=-1", "eval.patience=-1 must be >= 0"),
    (
        "--config.eval.patience=1 --config.data.splits=(1,0,0)",
        "eval.patience=1 needs a validation split",
    ),
]


@pytest.mark.parametrize(("flags", "message"), CASES)
def test_bad_flags_and_files(folder, text, tmp_path, flags, message):
    given = flags.replace("{0}", str(folder)).replace("{}", str(folder)).split()
    workdir = tmp_path / "run"
    usual = [*TINY_RUN, f"--workdir={workdir}", f"--config.data.path={text}"]
    if "init_from" in flags:
        usual = [flag for flag in usual if "tokenizer" not in flag]
        if "n_positions" not in flags:
            usual = [flag for flag in usual if "n_positions" not in flag]
    assert message in refused("train.py", *usual, *given)
    assert not (workdir / "checkpoints").exists()
    assert not list(tmp_path.rglob("*.tmp*"))


def test_bad_steps_and_a_base_that_is_gone(folder, text, tmp_path):
    for script in ("generate.py", "evaluate.py"):
        error = refused(script, f"--workdir={folder}/base", "--step=last")
        assert "step='last' is neither a number nor 'best'" in error
    moved = (folder / "base").rename(tmp_path / "base")
    usual = [flag for flag in TINY_RUN if "tokenizer" not in flag]
    flags = [f"--config.init_from={moved}", "--config.lora.rank=2"]
    train_flags = [flag for flag in usual if "n_positions" not in flag]
    workdir = tmp_path / "adapted"
    run(
        "train.py",
        *train_flags,
        *flags,
        f"--workdir={workdir}",
        f"--config.data.path={text}",
    )
    moved.rename(folder / "base")
    error = refused("generate.py", f"--workdir={workdir}")
    assert f"holds adapters of {moved}: " in error
    error = refused(
        "convert.py", f"--model={workdir}", "--to=hf", f"--out={tmp_path}/o"
    )
    assert f"holds adapters of {moved}: " in error
    assert not list(tmp_path.glob("o*"))
