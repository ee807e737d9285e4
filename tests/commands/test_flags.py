"""Each flag with values that can't be right: one line that names it, and status 2.

The programs run in this process, as far as their work: that is left out.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from absl import flags, logging

from gpt2_jax.commands import cli
from gpt2_jax.decoding.options import Options
from gpt2_jax.runtime.files import user_path

ROOT = Path(__file__).resolve().parents[2]
HUGE = str(10**30)
NOT_POSITIVE = ("0", "-1", HUGE, "1e30", "nan", "inf", "", "x", "1.5")
NOT_NATURAL = NOT_POSITIVE[1:]
NO_NUMBER = ("", "x", "nan", "inf", "-inf", "1e39", "1" + "0" * 400)
NO_RATE = ("-1", "1", *NO_NUMBER)
NO_SEED = ("-1", "4294967296", str(2**63), *NOT_NATURAL)
NO_PATH = ("", "~no-such-user/x", "a\0b", "gs://b/x", "x" * 300)
CONFIG = f"--config={ROOT}/configs/default.py"

# script: (flags that are right, {flag: values that are not})
FLAGS: dict[str, tuple[list[str], dict[str, tuple[str, ...]]]] = {
    "train": (
        [CONFIG, "--workdir=run"],
        {
            "workdir": NO_PATH,
            "start_timeout": NOT_POSITIVE,
            "peer_timeout": NOT_POSITIVE,
            "num_processes": NOT_POSITIVE,
            "process_id": NOT_NATURAL,
            "coordinator_address": ("", "x", "host:", ":1"),
            "profile_steps": ("x", "1", "2:1", "1:1", "-1:2", "1:2:3"),
            "config": ("nothing.py", str(ROOT / "setup.cfg"), str(ROOT / "configs")),
            "config.seed": NO_SEED,
            "config.steps": NOT_POSITIVE,
            "config.batch_size": NOT_POSITIVE,
            "config.batch_warmup": ("x", "()x", "(1,)", "((1,),)", "((1.5,2),)"),
            "config.block_size": NOT_POSITIVE,
            "config.device_batch_size": NOT_NATURAL,
            "config.log_every": NOT_POSITIVE,
            "config.dtype": ("", "x", "float16"),
            "config.attention": ("", "x"),
            "config.remat": ("", "x"),
            "config.model.vocab_size": NOT_NATURAL,
            "config.model.n_positions": ("1", *NOT_NATURAL),
            "config.model.n_embd": ("3", *NOT_POSITIVE),
            "config.model.n_layer": NOT_POSITIVE,
            "config.model.n_head": ("3", *NOT_POSITIVE),
            "config.model.n_inner": NOT_POSITIVE,
            "config.model.bias": ("x", "2", ""),
            "config.model.activation_function": ("", "x"),
            "config.model.layer_norm_epsilon": ("0", "-1", *NO_NUMBER),
            "config.model.initializer_range": ("0", "-1", *NO_NUMBER),
            "config.model.embd_pdrop": NO_RATE,
            "config.model.attn_pdrop": NO_RATE,
            "config.model.resid_pdrop": NO_RATE,
            "config.data.kind": ("", "x", "sft"),
            "config.data.template": ("x", "{content}"),
            "config.data.path": NO_PATH[1:3],
            "config.data.vocab_size": NOT_NATURAL,
            "config.data.mixture": ("x", "(1,)", "(('a',),)", "(('a',0.0),)"),
            "config.data.packing": ("", "x"),
            "config.data.splits": ("x", "('a',)"),
            "config.optim.name": ("", "x"),
            "config.optim.learning_rate": ("0", "-1", *NO_NUMBER),
            "config.optim.muon_learning_rate": ("1", "-1", *NO_NUMBER),
            "config.optim.schedule": ("", "x", "wsd"),
            "config.optim.min_learning_rate": ("1", "-1", *NO_NUMBER),
            "config.optim.warmup_steps": NOT_NATURAL,
            "config.optim.decay_steps": ("1", *NOT_NATURAL),
            "config.optim.b1": NO_RATE,
            "config.optim.b2": NO_RATE,
            "config.optim.eps": ("0", "-1", *NO_NUMBER),
            "config.optim.weight_decay": ("-1", *NO_NUMBER),
            "config.optim.clip_norm": ("0", "-1", *NO_NUMBER),
            "config.optim.state_dtype": ("", "x"),
            "config.optim.ema_decay": NO_RATE,
            "config.optim.max_skipped": NOT_NATURAL,
            "config.optim.max_loss_z": ("-1", *NO_NUMBER),
            "config.optim.lr_scales": ("x", "(1,)", "(('(',1.0),)", "(('a',-1.0),)"),
            "config.lora.rank": ("1", *NOT_NATURAL),
            "config.lora.alpha": ("0", "-1", *NO_NUMBER),
            "config.lora.dropout": NO_RATE,
            "config.lora.kernels": ("x", "(1,)"),
            "config.eval.every": NOT_POSITIVE,
            "config.eval.examples": NOT_NATURAL,
            "config.eval.patience": NOT_NATURAL,
            "config.eval.sample_tokens": NOT_NATURAL,
            "config.eval.sample_prompt": ("\udce9",),
            "config.wandb_project": ("\udce9",),
            "config.checkpoint.every": NOT_POSITIVE,
            "config.checkpoint.keep_last": NOT_POSITIVE,
        },
    ),
    "prepare_data": (
        ["--path=none.txt", "--out=out", "--tokenizer=bytes"],
        {
            "path": NO_PATH[1:3],
            "out": NO_PATH,
            "format": ("", "csv"),
            "tokenizer": NO_PATH,
            "splits": ("", "x", "1", "1,1,1", "nan,0,1", "0.5,0.5,inf", "2,-1,0"),
            "seed": NO_SEED,
            "shard_tokens": NOT_POSITIVE,
            "threads": NOT_POSITIVE,
            "dtype": ("", "int8"),
        },
    ),
    "train_tokenizer": (
        ["--path=none.txt", "--out=out", "--vocab_size=300"],
        {
            "out": NO_PATH,
            "model": ("", "x"),
            "seed": NO_SEED,
            "max_bytes": NOT_NATURAL,
            "format": ("", "csv"),
        },
    ),
    "evaluate": (
        ["--model=none", "--task=lambada", "--path=none.txt"],
        {
            "batch_size": NOT_POSITIVE,
            "dtype": ("", "float16"),
            "task": ("", "x"),
            "detokenizer": ("x",),
            "target": ("", "x"),
            "stride": NOT_POSITIVE[3:],
            "out": ("", "x.txt", "~no-such-user/x.json"),
        },
    ),
    "generate": (
        ["--workdir=none"],
        {
            "max_new_tokens": NOT_NATURAL,
            "seed": NO_SEED,
            "temperature": ("-1", *NO_NUMBER),
            "top_k": NOT_NATURAL,
            "top_p": ("0", "-1", "2", *NO_NUMBER),
            "num_return_sequences": NOT_POSITIVE,
            "logit_bias": ("", "1", "=", "x=1", "1=x", "1=nan", "1.5=1"),
            "allowed_tokens": ("x", "1,x", "1.5"),
            "stop_token_ids": ("x", "1,,2"),
            "early_stopping": ("", "x"),
        },
    ),
}


@pytest.fixture(scope="module", params=FLAGS)
def program(request) -> Iterator[tuple[str, ModuleType]]:
    """A script, imported; its flags are those of this process until the test ends."""
    known = set(flags.FLAGS)
    path = ROOT / f"scripts/{request.param}.py"
    spec = importlib.util.spec_from_file_location(f"flags_of_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    verbosity = logging.get_verbosity()
    try:
        spec.loader.exec_module(module)
        yield path.stem, module
    finally:
        logging.set_verbosity(verbosity)
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)


def without_work(name: str, module: ModuleType, monkeypatch) -> None:
    """What the program would do is done as far as arguments are looked at."""
    if name == "train":

        def train(_: object, workdir: str, **__: object) -> SimpleNamespace:
            user_path(workdir)
            return SimpleNamespace(signal=None)

        monkeypatch.setattr(module, "train", train)
        monkeypatch.setattr(module.distributed, "run", lambda _, program: program())
    if name == "generate":
        options = (set(flags.FLAGS) & {*Options.__dataclass_fields__}).__contains__
        model = SimpleNamespace(
            generate=lambda _, **given: Options(
                **{k: v for k, v in given.items() if options(k)}
            )
        )
        monkeypatch.setattr(module.gpt2_jax, "load", lambda *_, **__: model)


def test_bad_values_are_one_line(program, tmp_path, monkeypatch, capsys):
    name, module = program
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    monkeypatch.setattr(cli, "_silence_threads", lambda: None)
    without_work(name, module, monkeypatch)
    right, wrong = FLAGS[name]
    for flag, values in wrong.items():
        for value in values:
            given = [x for x in right if not x.startswith(f"--{flag}=")]
            argv = [f"scripts/{name}.py", *given, f"--{flag}={value}"]
            status = outcome(module.main, argv, monkeypatch)
            error = capsys.readouterr().err
            assert (status, error.count("\n")) == (2, 1), (flag, value, error)
            assert error.startswith("error: ")
            assert len(error) <= 301
            words = {flag, flag.removeprefix("config."), flag.rpartition(".")[2]}
            named = any(word in error for word in words)
            assert named or flag in NAMED_BY_VALUE, (flag, value, error)
    assert not list(tmp_path.iterdir())


# Paths and choices say what they are; what they were given is in the line.
NAMED_BY_VALUE = (
    *("workdir", "path", "out", "config", "config.data.path", "tokenizer"),
    *("coordinator_address", "num_processes", "process_id", "profile_steps"),
)


def outcome(main: Callable[..., int | None], argv: list[str], monkeypatch) -> object:
    flags.FLAGS.unparse_flags()
    sys.modules.pop("config_config", None)  # ml_collections' name of every config
    for flag in [x for x in flags.FLAGS if x.startswith("config.")]:
        delattr(flags.FLAGS, flag)
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for keys
    try:
        return cli._guarded(main, cli._parse(argv))
    except SystemExit as end:
        return end.code


BAD_CONFIGS = {
    "steps = 3": "has no attribute 'get_config'",
    "raise RuntimeError('boom\\nmore')": "RuntimeError: boom more",
    "def get_config(:": "SyntaxError: ",
    "import nothing_there": "ModuleNotFoundError: ",
    "def get_config(): return 1 / 0": "ZeroDivisionError: ",
    "def get_config(): return None": "--config",
    "def get_config(): return {'a': 1}": "key 'a' does not exist",
}


def test_a_config_file_that_fails_is_named(program, tmp_path, monkeypatch, capsys):
    name, module = program
    if name != "train":
        pytest.skip("it has no config")
    monkeypatch.chdir(tmp_path)
    without_work(name, module, monkeypatch)
    for number, (source, why) in enumerate(BAD_CONFIGS.items()):
        Path(f"{number}.py").write_text(source + "\n")
        argv = ["scripts/train.py", f"--config={number}.py", "--workdir=run"]
        assert outcome(module.main, argv, monkeypatch) == 2
        error = capsys.readouterr().err
        assert why in error
        assert error.count("\n") == 1
