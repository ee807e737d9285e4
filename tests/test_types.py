"""Values of another type than is wanted: refused in one line, before anything runs."""

import dataclasses
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
import pytest

import gpt2_jax
from configs import default
from gpt2_jax.checks import integer, number, token_ids
from gpt2_jax.config import GPT2Config
from gpt2_jax.data.make_tokenizer import train_tokenizer
from gpt2_jax.data.prepare import prepare
from gpt2_jax.data.sft import check_template
from gpt2_jax.decoding.options import INTEGERS, NUMBERS, Options
from gpt2_jax.decoding.score import Row
from gpt2_jax.evaluation.task_runs import evaluate_task
from gpt2_jax.evaluation.tasks import Options as TaskOptions
from gpt2_jax.formats.convert import convert
from gpt2_jax.lm import LanguageModel
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizers.plain import ByteTokenizer
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.evaluate import evaluate_run
from gpt2_jax.training.train import train
from shapes import TINY


class Hostile:
    def __repr__(self):
        raise RuntimeError("no repr")


# What is neither text nor a list, and lists of what is neither text nor an integer.
NOT_LISTS = {
    "none": None,
    "bool": True,
    "int": 5,
    "float": 1.5,
    "complex": 1j,
    "bytes": b"ab",
    "bytearray": bytearray(b"ab"),
    "memoryview": memoryview(b"ab"),
    "dict": {1: 2},
    "dict of text": {"a": 1},
    "mapping": MappingProxyType({1: 2}),
    "set": {1, 2},
    "frozenset": frozenset({1}),
    "keys": {1: 2}.keys(),
    "generator": (i for i in [1, 2]),
    "iterator": iter(["a"]),
    "path": Path("a"),
    "object": object(),
    "hostile": Hostile(),
    "class": int,
    "function": len,
    "numpy scalar": np.int64(5),
    "numpy 0-d": np.array(5),
    "numpy 0-d text": np.array("ab"),
    "jax 0-d": jnp.int32(5),
    "numpy bytes": np.bytes_(b"ab"),
}
NOT_IDS = {
    "floats": [1.0, 2.0],
    "a float": [1, 2.0],
    "bools": [True, False],
    "a bool": [1, True],
    "a numpy bool": [1, np.bool_(True)],
    "a bool of none": [1, None],
    "bytes in a list": [b"a"],
    "a dict in a list": [{1: 2}],
    "a set in a list": [{1, 2}],
    "numpy floats": np.array([1.0]),
    "numpy bools": np.array([True]),
    "numpy complex": np.array([1j]),
    "numpy dates": np.array(["2020-01-01"], "datetime64[D]"),
    "numpy 3-d": np.zeros((1, 2, 2), int),
    "jax floats": jnp.ones(2),
    "objects": np.array([1, None], object),
    "a list thrice": [[[1]]],
    "mixed depths": [1, [2]],
}
OUTSIDE = {
    "negative": [-1],
    "huge": [2**70],
    "uint64": np.array([1, 2**63], np.uint64),
    "both ends of int64": [2**63, -1],
    "past the end": [257],
}
MIXED = {"text and id": ["a", 1], "ids and text": [[1], "a"], "": []}


@pytest.fixture(scope="module")
def lm():
    """Without parameters: whatever would run fails with another error."""
    return LanguageModel(GPT2(TINY), {}, ByteTokenizer(), step=0)


PROMPTS = {
    "generate": lambda lm, x: lm.generate(x),
    "complete": lambda lm, x: lm.complete(x),
    "stream": lambda lm, x: lm.stream(x),
    "request": lambda lm, x: list(lm.generate_many([x])),
    "request of its own": lambda lm, x: list(lm.generate_many([{"prompt": x}])),
    "score": lambda lm, x: lm.score(x),
    "prompt": lambda lm, x: lm.logprobs(x, "a"),
    "completion": lambda lm, x: lm.logprobs("a", x),
    "explain": lambda lm, x: lm.explain(x),
    "logits": lambda lm, x: lm.logits(x),
    "rows": lambda lm, x: list(lm.score_rows([Row(x, 1)])),
}


def refused(call, *args, named=None):
    """The message of the ValueError, which is one short line."""
    with pytest.raises(ValueError, match=named and re.escape(named)) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 300
    # numpy's and Python's own errors name neither the value nor what is wanted
    assert "truth value" not in message
    assert "not iterable" not in message
    return message


@pytest.mark.parametrize("call", PROMPTS.values(), ids=PROMPTS.keys())
def test_what_is_no_prompt_is_refused(lm, call):
    for value in {**NOT_LISTS, **NOT_IDS, **OUTSIDE, **MIXED}.values():
        refused(call, lm, value)


def test_what_is_not_gone_through_in_order_holds_no_requests(lm):
    for name, value in NOT_LISTS.items():
        if name not in ("generator", "iterator"):
            refused(lm.generate_many, value, named="requests=")
    refused(lm.generate_many, "text", named="requests='text' must be a list or an it")
    refused(
        lambda: list(lm.generate_many([1, 2])),
        named="prompt of request 0=1 of type int",
    )
    assert list(lm.generate_many([])) == list(lm.generate_many(iter(()))) == []


def test_prompts_in_the_forms_that_are_taken(lm):
    """None is refused for its type: the ids are beyond the vocabulary."""
    for ids in (
        [1, 300],
        (1, 300),
        range(1, 301, 299),
        np.array([1, 300]),
        np.array([1, 300], np.uint16),
        jnp.array([1, 300]),
        [np.int64(1), np.uint32(300)],
        [jnp.int32(1), np.array(300)],
        [[1, 300]],
        np.array([[1, 300]]),
        jnp.array([[1, 300]]),
        [np.array([1, 300])],
        ([1, 300], (1, 2, 3)),
    ):
        refused(lm.generate, ids, named="token id 300 is outside [0, vocab_size=")
    for texts in (["a" * 99], ("a" * 99,), np.array(["a" * 99])):
        refused(lm.generate, texts, named="prompt 0: token id 97 is outside")


IS_TEXT = {"text": "ab", "no text": "", "digits": "5", "nan": "nan"}
ANYTHING = {**NOT_LISTS, **NOT_IDS, **OUTSIDE, **MIXED, **IS_TEXT}


def but_for(values, *names):
    """All values but these, and None, which stands for the default."""
    return {name: x for name, x in values.items() if name not in ("none", *names)}


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS])
def test_what_is_no_number_is_refused(name):
    fine = ["int", "numpy scalar", "numpy 0-d", "jax 0-d"]
    others = but_for(ANYTHING, *fine, *(["float"] if name in NUMBERS else []))
    for value in others.values():
        refused(lambda x: Options(**{name: x}), value, named=f"{name}=")


@pytest.mark.parametrize(
    ("name", "fine"),
    [
        ("do_sample", ["bool"]),
        ("early_stopping", []),
        ("overflow", []),
        ("stop", ["text", "digits", "nan", ""]),
        ("bad_words", ["", "ids and text"]),
        ("stop_token_ids", [*OUTSIDE, ""]),
        ("allowed_tokens", ["past the end", "bools", "numpy bools"]),
        ("logit_bias", ["dict", "mapping"]),
    ],
)
def test_what_is_of_no_use_as_an_option_is_refused(name, fine):
    for value in but_for(ANYTHING, *fine).values():
        refused(lambda x: Options(**{name: x}), value, named=name)
    for key in (value for value in fine if value not in ("bool", "")):
        assert getattr(Options(**{name: ANYTHING[key]}), name) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(logit_bias={"5": 1}), "logit_bias: id='5' must be an integer"),
        (dict(logit_bias={True: 1}), "logit_bias: id=True must be an integer"),
        (dict(logit_bias={5: "1"}), "logit_bias[5]='1' must be a number"),
        (dict(logit_bias={5: True}), "logit_bias[5]=True must be a number"),
        (dict(logit_bias={5: [1]}), "logit_bias[5]=[1] must be a number"),
        (dict(bad_words=[{1, 2}]), "bad_words={1, 2} must be a list, not set"),
        (dict(bad_words=[b"a"]), "bad_words=b'a' must be a list, not bytes"),
        (dict(stop=[b"a"]), "stop=b'a' must be text, not bytes"),
        (dict(stop={"a"}), "stop={'a'} must be a list, not set"),
        (dict(stop=["a", ""]), "stop='' must be text, a character at least"),
        (dict(allowed_tokens=[[0], [0, 1]]), "allowed_tokens must be token ids, bool"),
        (dict(allowed_tokens=[[2**70]]), "next state 1180591620717411303424 is"),
        (dict(allowed_tokens=[0, [0]]), "allowed_tokens=0 must be a list, not int"),
    ],
)
def test_messages_name_what_came(options, message):
    refused(lambda: Options(**options), named=message)


def test_arrays_serve_as_lists_in_options():
    options = Options(
        stop=np.array(["a", "b"]),
        bad_words=jnp.array([[1, 2]]),
        stop_token_ids=jnp.array([3]),
        allowed_tokens=jnp.array([4]),
        top_k=np.array(5),
        temperature=jnp.bfloat16(0.5),
        logit_bias={np.int8(6): np.float16(1)},
    )
    assert options.stop == ("a", "b")
    assert options.bad_words == ((1, 2),)
    assert options.stop_token_ids == (3,)
    assert options.allowed_ids.tolist() == [4]
    assert (options.top_k, options.temperature) == (5, 0.5)
    assert options.logit_bias == {6: 1.0}


def test_arguments_beside_the_options(lm):
    rows = [Row([1, 2], 1)]
    numbers = {
        "n_draft=": lambda x: lm.generate("a", n_draft=x),
        "n_slots=": lambda x: lm.generate_many(["a"], n_slots=x),
        "stride=": lambda x: lm.score("ab", stride=x),
        "top_k=": lambda x: lm.explain("ab", top_k=x),
        "batch_size=": lambda x: list(lm.score_rows(rows, batch_size=x)),
        "n_scored=": lambda x: list(lm.score_rows([([1, 2], x)])),
    }
    integers = ("int", "numpy scalar", "numpy 0-d", "jax 0-d")
    for name, call in numbers.items():
        for value in but_for(ANYTHING, *integers).values():
            refused(call, value, named=name)
    for value in but_for(ANYTHING).values():
        refused(lambda x: lm.generate("a", draft=x), value, named="draft=")


def test_numbers_of_other_kinds():
    assert integer("n", np.uint8(3)) == integer("n", np.array(3)) == 3
    for x in (Fraction(1, 2), Decimal("0.5"), np.float16(0.5), np.array(0.5)):
        assert number("x", x) == 0.5
    for x in (10**400, bytearray(b"1.5"), np.array("0.5"), np.array([0.5]), "0.5"):
        refused(number, "x", x, named="x=")
    assert token_ids("ids", np.array([2**63], np.uint64)) == [2**63]


LOADS = {
    "model": lambda x: gpt2_jax.load(x),
    "step": lambda x: gpt2_jax.load("x", step=x),
    "dtype": lambda x: gpt2_jax.load("x", dtype=x),
    "revision": lambda x: gpt2_jax.load("x", revision=x),
    "mesh": lambda x: gpt2_jax.load("x", mesh=x),
    "workdir": lambda x: evaluate_run(x, "test", batch_size=1),
    "split": lambda x: evaluate_run("x", x, batch_size=1),
    "batch_size": lambda x: evaluate_run("x", "test", batch_size=x),
    "evaluated dtype": lambda x: evaluate_run("x", "test", batch_size=1, dtype=x),
    "converted model": lambda x: convert(x, "hf", "y"),
    "to": lambda x: convert("x", x, "y"),
    "out": lambda x: convert("x", "hf", x),
    "written dtype": lambda x: convert("x", "hf", "y", dtype=x),
    "max_shard_bytes": lambda x: convert("x", "hf", "y", max_shard_bytes=x),
    "task": lambda x: evaluate_task("x", x, "y"),
    "task's model": lambda x: evaluate_task(x, "lambada", "y"),
    "task's batch_size": lambda x: evaluate_task("x", "lambada", "y", batch_size=x),
    "task's out": lambda x: evaluate_task("x", "lambada", "y", out=x),
    "stride": lambda x: TaskOptions(stride=x),
    "target": lambda x: TaskOptions(target=x),
    "detokenizer": lambda x: TaskOptions(detokenizer=x),
    "trained workdir": lambda x: train(CONFIG, x),
    "name": GPT2Config.named,
    "prepared path": lambda x: prepare(x, "o", ByteTokenizer()),
    "prepared out": lambda x: prepare("x", x, ByteTokenizer()),
    "tokenizer": lambda x: prepare("x", "o", x),
    "splits": lambda x: prepare("x", "o", ByteTokenizer(), splits=x),
    "shard_size": lambda x: prepare("x", "o", ByteTokenizer(), shard_tokens=x),
    "seed": lambda x: prepare("x", "o", ByteTokenizer(), seed=x),
    "vocabulary size": lambda x: train_tokenizer("x", "o", x),
    "special_tokens": lambda x: train_tokenizer("x", "o", 300, special_tokens=x),
    "tokenizer's model": lambda x: train_tokenizer("x", "o", 300, model=x),
    "template": check_template,
}


@pytest.mark.parametrize("name", LOADS)
def test_what_is_no_argument_of_a_function_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "x" is nowhere
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    numbers = ("int", "numpy scalar", "numpy 0-d", "jax 0-d")
    is_number = name.endswith(("step", "size", "bytes", "stride", "seed"))
    is_path = name.endswith(("model", "dir", "out", "path"))
    fine = [*IS_TEXT, *(numbers if is_number else []), *(["path"] if is_path else [])]
    fine += [""] if name == "special_tokens" else []
    for value in but_for(ANYTHING, *fine).values():
        refused(LOADS[name], value)


CONFIG = TrainConfig.from_dict(default.get_config().to_dict())
CONFIGS = [GPT2Config(), CONFIG]
CONFIGS += [CONFIG.data, CONFIG.optim, CONFIG.lora, CONFIG.mesh, CONFIG.eval]
CONFIGS += [CONFIG.checkpoint]
FIELDS = [(c, f.name) for c in CONFIGS for f in dataclasses.fields(c)]


@pytest.mark.parametrize(("config", "name"), FIELDS)
def test_what_is_of_another_type_than_a_field_is_refused(config, name):
    now = getattr(config, name)
    fine = {bool: ("bool",), str: IS_TEXT, int: ("int",), float: ("int", "float")}
    fine = fine.get(
        int if name == "n_inner" else type(now), ("", "floats", "a float", *OUTSIDE)
    )
    for value in but_for(ANYTHING, *fine).values():
        message = refused(
            lambda x: dataclasses.replace(config, **{name: x}), value, named=name
        )
        assert f"{name}=" in message or f"{name}." in message


class TestTokenizers:
    tokenizers = (ByteTokenizer(),)

    def test_what_is_no_text_is_not_encoded(self):
        for tokenizer in self.tokenizers:
            for name, value in ANYTHING.items():
                if name not in IS_TEXT:
                    refused(tokenizer.encode, value, named="must be text")
                    refused(tokenizer.encode_array, value, named="must be text")

    def test_what_are_no_ids_is_not_decoded(self):
        for tokenizer in self.tokenizers:
            for name, value in ANYTHING.items():
                if name != "":
                    refused(tokenizer.decode, value, named="id")
            assert tokenizer.decode([]) == tokenizer.decode(np.zeros(0, int)) == ""
            assert tokenizer.decode(jnp.array([97, 98])) == "ab"
