import dataclasses
import math

import numpy as np
import pytest
from absl import flags

from gpt2_jax.commands import cli
from gpt2_jax.decoding.options import DEFAULTS, Options
from gpt2_jax.decoding.requests import Request
from gpt2_jax.decoding.sampling import Sampling
from gpt2_jax.decoding.state import batch_sampling

BAD = [
    (dict(max_new_tokens=-1), r"max_new_tokens=-1 must be in \[0, 2147483647\]"),
    (dict(max_new_tokens=1.5), "max_new_tokens=1.5 must be an integer"),
    (dict(max_new_tokens=True), "max_new_tokens=True must be an integer"),
    (dict(max_new_tokens="7"), "max_new_tokens='7' must be an integer"),
    (dict(max_length=0), r"max_length=0 must be in \[1, "),
    (dict(max_new_tokens=3, max_length=9), "max_new_tokens and max_length: give one"),
    (dict(min_new_tokens=-1), "min_new_tokens=-1 must be in"),
    (dict(min_new_tokens=5, max_new_tokens=4), "min_new_tokens=5 exceeds the 4"),
    (dict(min_new_tokens=5, max_length=5), "min_new_tokens=5 exceeds the 4"),
    (dict(num_return_sequences=0), r"num_return_sequences=0 must be in \[1, 1000\]"),
    (dict(num_return_sequences=2, do_sample=False), "all would be equal"),
    (dict(num_return_sequences=2, temperature=0), "temperature=0: all would be equal"),
    (dict(do_sample="no"), "do_sample='no' is not one of"),
    (dict(do_sample=1), "do_sample=1 is not one of"),
    (dict(do_sample=True, temperature=0), "do_sample=True and temperature=0"),
    (dict(do_sample=True, num_beams=2), "do_sample=True and num_beams=2"),
    (dict(do_sample=False, temperature=0.7), "temperature=0.7 and do_sample=False"),
    (dict(do_sample=False, top_k=5), "top_k=5 and do_sample=False: nothing is drawn"),
    (dict(do_sample=False, top_p=0.5), "top_p=0.5 and do_sample=False"),
    (dict(do_sample=False, min_p=0.5), "min_p=0.5 and do_sample=False"),
    (dict(do_sample=False, typical_p=0.5), "typical_p=0.5 and do_sample=False"),
    (
        dict(temperature=-0.1),
        "temperature=-0.1 must be 0, or > 0 and finite in float32",
    ),
    (dict(temperature=math.inf), "temperature=inf must be 0, or"),
    (dict(temperature=math.nan), "temperature=nan must be a number"),
    (dict(temperature="hot"), "temperature='hot' must be a number"),
    (dict(top_k=-1), "top_k=-1 must be in"),
    (dict(top_k=2**31), "top_k=2147483648 must be in"),
    (dict(top_k=0.9), "top_k=0.9 must be an integer"),
    (dict(top_p=0), r"top_p=0.0 must be in \(0, 1\]"),
    (dict(top_p=1.1), "top_p=1.1 must be in"),
    (dict(top_p=True), "top_p=True must be a number"),
    (dict(min_p=-0.1), r"min_p=-0.1 must be in \[0, 1\]"),
    (dict(min_p=2), "min_p=2.0 must be in"),
    (dict(typical_p=0), "typical_p=0.0 must be in"),
    (dict(typical_p=1.5), "typical_p=1.5 must be in"),
    (
        dict(repetition_penalty=0),
        "repetition_penalty=0.0 must be > 0 and finite in float32",
    ),
    (dict(repetition_penalty=-2), "repetition_penalty=-2.0"),
    (dict(presence_penalty=math.inf), "presence_penalty=inf must be finite"),
    (dict(frequency_penalty=-math.inf), "frequency_penalty=-inf must be finite"),
    (dict(frequency_penalty=1e39), r"frequency_penalty=1e\+39 must be finite in float"),
    (dict(temperature=1e-40), "temperature=1e-40 must be 0, or > 0 and finite"),
    (dict(frequency_penalty=[1]), r"frequency_penalty=\[1\] must be a number"),
    (dict(no_repeat_ngram_size=-2), "no_repeat_ngram_size=-2 must be in"),
    (dict(logit_bias=[(1, 2)]), "logit_bias=.* must map token ids to numbers"),
    (dict(logit_bias={"a": 1}), "logit_bias: id='a' must be an integer"),
    (dict(logit_bias={3: "x"}), r"logit_bias\[3\]='x' must be a number"),
    (dict(logit_bias={3: math.inf}), r"logit_bias\[3\]=inf must be at most"),
    (dict(bad_words="word"), "bad_words='word' must be a list"),
    (dict(bad_words=[""]), "bad_words='' must be text"),
    (dict(bad_words=[[]]), "bad_words has an empty word"),
    (dict(bad_words=[[1.5]]), "bad_words: id=1.5 must be an integer"),
    (dict(bad_words=[7]), "bad_words=7 must be a list"),
    (dict(allowed_tokens=[]), "allowed_tokens must be token ids"),
    (dict(allowed_tokens=[1.5]), "allowed_tokens: id=1.5 must be an integer"),
    (dict(allowed_tokens=np.zeros(9, bool)), "allows no token"),
    (dict(allowed_tokens=[[1, -1]]), r"next state 1 is outside \[-1, 1\)"),
    (dict(allowed_tokens=[[1, 0], [-1, -1]]), "state 1 allows no token"),
    (dict(allowed_tokens=np.zeros((1, 1, 1), int)), "allowed_tokens must be token"),
    (dict(num_beams=0), "num_beams=0 must be in"),
    (dict(num_beams=2, num_return_sequences=3), "=3 exceeds num_beams=2"),
    (dict(num_beams=2, top_k=3), "top_k=3 and num_beams=2: nothing is drawn"),
    (dict(num_beams=2, temperature=0.5), "temperature=0.5 and num_beams=2"),
    (dict(num_beams=2, best_of=3), "best_of=3 and num_beams=2"),
    (dict(num_beams=2, stop="x"), "num_beams=2: beam search has no such option"),
    (dict(num_beams=2, logprobs=3), "logprobs=3 and num_beams=2"),
    (dict(num_beams=2, overflow="slide"), "overflow='slide' and num_beams=2"),
    (dict(length_penalty=2), "length_penalty=2.0 and num_beams=1"),
    (dict(length_penalty=math.nan, num_beams=2), "length_penalty=nan"),
    (dict(early_stopping=True), "early_stopping=True and num_beams=1"),
    (dict(early_stopping="soon", num_beams=2), "early_stopping='soon' is not one of"),
    (dict(best_of=-1), "best_of=-1 must be in"),
    (dict(best_of=2, num_return_sequences=3), "=3 exceeds best_of=2"),
    (dict(best_of=2, temperature=0), "best_of=2 and temperature=0"),
    (dict(stop=""), "stop='' must be text"),
    (dict(stop=["a", 3]), "stop=3 must be text"),
    (dict(stop=["\ud800"]), "has a lone surrogate"),
    (dict(stop=5), "stop=5 must be a list"),
    (dict(stop_token_ids=5), "stop_token_ids=5 must be a list"),
    (dict(stop_token_ids=["a"]), "stop_token_ids: id='a' must be an integer"),
    (dict(logprobs=101), r"logprobs=101 must be in \[0, 100\]"),
    (dict(overflow="wrap"), r"overflow='wrap' is not one of \('error', 'slide'\)"),
    (dict(seed=-1), "seed=-1 must be in"),
    (dict(seed=2**32), "seed=4294967296 must be in"),
    (dict(seed=0.5), "seed=0.5 must be an integer"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_a_bad_option_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="topk"):
        Options(topk=3)


def test_none_stands_for_the_default():
    names = [name for name in Options.__dataclass_fields__ if name != "allowed_tokens"]
    assert Options(**dict.fromkeys(names)) == Options()


def test_values_come_in_one_form():
    options = Options(
        top_k=np.int64(3),
        top_p=np.float32(0.5),
        stop="x",
        bad_words=["a", [np.int8(1)]],
    )
    assert (options.top_k, options.top_p, options.stop) == (3, 0.5, ("x",))
    assert options.bad_words == ("a", (1,))


@pytest.mark.parametrize(
    ("options", "draws"),
    [
        ({}, True),
        ({"do_sample": True}, True),
        ({"do_sample": False}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0, "top_k": 5, "top_p": 0.3}, False),
        ({"num_beams": 3}, False),
    ],
)
def test_what_draws(options, draws):
    assert Options(**options).draws == draws


# They act elsewhere: on arrays of the whole vocabulary, on the host, in beam search.
NOT_IN_SAMPLING = {
    *("max_new_tokens", "max_length", "num_return_sequences", "do_sample"),
    *("logit_bias", "bad_words", "allowed_tokens", "stop", "stop_token_ids"),
    *("num_beams", "length_penalty", "early_stopping", "best_of", "logprobs"),
    *("overflow", "seed"),
}


def test_fields_of_sampling_are_options_of_the_same_name():
    names = {f.name for f in dataclasses.fields(Sampling)}
    options = {f.name for f in dataclasses.fields(Options)}
    whole = {"bias_BV", "ends_BV", "bad_words_BWL"}
    assert names - whole == {f"{name}_B" for name in options - NOT_IN_SAMPLING}
    assert options >= NOT_IN_SAMPLING


def test_options_reach_the_row_of_their_request():
    values = dict(temperature=0.5, top_k=3, top_p=0.75, min_p=0.25, typical_p=0.875)
    values |= dict(repetition_penalty=1.5, presence_penalty=2.0, frequency_penalty=2.5)
    values |= dict(no_repeat_ngram_size=4, min_new_tokens=5)
    requests = [Request([0], Options(**o), (0, 0, 0)) for o in ({}, values)]
    sampling = batch_sampling(requests, 3, 8)  # the last row is free
    for name, value in values.items():
        column = getattr(sampling, f"{name}_B").tolist()
        assert column == [DEFAULTS[name], value, DEFAULTS[name]], name


def test_how_many_tokens_are_new():
    assert Options().new_tokens(7) == 100
    assert Options(min_new_tokens=300).new_tokens(7) == 300
    assert Options(max_new_tokens=3).new_tokens(700) == 3
    assert Options(max_length=10).new_tokens(7) == 3
    assert Options(max_length=10).new_tokens(10) == 0
    with pytest.raises(
        ValueError, match=r"max_length=10 leaves no room .* of 11 tokens"
    ):
        Options(max_length=10).new_tokens(11)
    with pytest.raises(ValueError, match=r"no room for min_new_tokens=4 after .* of 7"):
        Options(max_length=10, min_new_tokens=4).new_tokens(7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(logit_bias={61: 1}),
            r"logit_bias: id 61 is outside \[0, vocab_size=61\)",
        ),
        (dict(stop_token_ids=[-1]), "stop_token_ids: id -1 is outside"),
        (dict(bad_words=[[3, 99]]), "bad_words: id 99 is outside"),
        (dict(allowed_tokens=[3, 61]), "allowed_tokens: id 61 is outside"),
        (dict(allowed_tokens=np.ones(62, bool)), "a mask of 62 ids for vocab_size=61"),
        (dict(allowed_tokens=np.ones(60, bool)), "a mask of 60 ids for vocab_size=61"),
        (
            dict(allowed_tokens=np.zeros((2, 60), int)),
            "has 60 columns for vocab_size=61",
        ),
        (dict(logprobs=62), "logprobs=62 exceeds vocab_size=61"),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options).check_ids(61)


def test_the_forms_of_allowed_tokens():
    assert Options(allowed_tokens=[5, 3]).allowed_ids.tolist() == [5, 3]
    assert Options(allowed_tokens=np.arange(9) > 6).allowed_ids.tolist() == [7, 8]
    table = Options(allowed_tokens=[[1, 0], [0, -1]]).table
    assert table.dtype == np.int32
    assert table.shape == (2, 2)
    assert Options(allowed_tokens=[[1, 0], [0, -1]]).allowed_ids is None


@pytest.fixture
def defined_flags():
    """The flags of the options, until the test ends: other tests define them too."""
    known = set(flags.FLAGS)
    cli.define_options()
    yield
    for name in set(flags.FLAGS) - known:
        delattr(flags.FLAGS, name)


def test_each_option_is_a_flag_that_explains_itself(defined_flags):
    for name in DEFAULTS:
        assert flags.FLAGS[name].help

    def given(*arguments):
        flags.FLAGS.unparse_flags()
        flags.FLAGS(["program", *arguments], known_only=True)
        return cli.given_options()

    assert Options(**given()) == Options()
    biases = "--logit_bias=5=-inf", "--logit_bias=6=1"
    options = given("--stop=a", "--stop=b", "--early_stopping=never", *biases)
    assert options["stop"] == ["a", "b"]
    assert options["early_stopping"] == "never"
    assert options["logit_bias"] == {5: -math.inf, 6: 1.0}
    assert given("--stop_token_ids=7,8")["stop_token_ids"] == [7, 8]
    for arguments, message in (
        (["--stop="], "stop='' must be text, a character at least"),
        (["--allowed_tokens="], "and not empty"),
        (["--logit_bias=5"], "'' is no float"),
        (["--logit_bias=5=1", "--logit_bias=5=2"], "'5' is given twice"),
        (["--stop_token_ids=x"], "'x' is no int"),
    ):
        with pytest.raises(ValueError, match=message):
            Options(**given(*arguments))
    given()
