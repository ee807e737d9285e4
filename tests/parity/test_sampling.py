"""Edits and filters against transformers' on torch: one distribution, token by token.

Bias, repetition penalty, n-grams, bad words, minimum length, temperature and all four
filters; transformers has no presence or frequency penalty. Its definitions are ours,
but for these, which the tests stay clear of:
  equals: at the last place of top-p transformers keeps the one that its sort puts
    there; we keep all. Random logits have none there; a test of its own shows it.
  ends: transformers ignores a bad word that is one of the ends alone.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from test_sampling import history_of, words_array

from gpt2_jax.decoding.sampling import Sampling, edit_logits, filter_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
processors = pytest.importorskip("transformers.generation.logits_process")

B, S = 8, 32
VOCAB_SIZES = [50, 257, 1000]
SCALES = [0.3, 1.0, 5.0]


@dataclasses.dataclass
class Row:
    logits: np.ndarray
    prompt: list[int]
    drawn: list[int]
    ends: list[int]
    options: dict[str, Any]  # by the names in transformers' GenerationConfig

    @property
    def ids(self) -> list[int]:
        return [*self.prompt, *self.drawn]


def random_row(rng, vocab_size):
    """Of few kinds of token, so that n-grams repeat and bad words begin."""
    logits = rng.normal(rng.choice([0, -20]), rng.choice(SCALES), vocab_size)
    if rng.random() < 0.3:
        logits[rng.random(vocab_size) < 0.3] = -np.inf
    kinds = rng.choice(vocab_size, rng.integers(2, 6), replace=False)
    return Row(
        logits.astype(np.float32),
        rng.choice(kinds, rng.integers(1, 20)).tolist(),
        rng.choice(kinds, rng.integers(0, 12)).tolist(),
        rng.choice(vocab_size, 2, replace=False).tolist(),
        {},
    )


def sequence_bias(rng, row):
    ids = {*rng.choice(len(row.logits), 10).tolist(), row.ids[-1]}
    return [[[i], rng.choice([-np.inf, *rng.normal(0, 3, 4)]).item()] for i in ids]


def bad_words(rng, row):
    """Some that the row's last tokens begin, up to its start and beyond; and others."""
    words = [[*row.ids[-rng.integers(1, 8) :], rng.choice(row.ids)] for _ in range(3)]
    words.append([rng.integers(len(row.logits)), *row.ids][-7:] + [row.ids[0]])
    words += [rng.choice(row.ids, rng.integers(2, 9)).tolist() for _ in range(3)]
    words.append([rng.integers(len(row.logits))])
    words = [[int(i) for i in word] for word in words]
    return [word for word in words if word not in [[i] for i in row.ends]]


# In transformers' own order; each with a value that it may have, and how it is made.
OPTIONS = {
    "sequence_bias": (sequence_bias, processors.SequenceBiasLogitsProcessor),
    "repetition_penalty": (
        lambda rng, _: rng.uniform(0.7, 2),
        processors.RepetitionPenaltyLogitsProcessor,
    ),
    "no_repeat_ngram_size": (
        lambda rng, _: int(rng.integers(1, 5)),
        processors.NoRepeatNGramLogitsProcessor,
    ),
    "bad_words_ids": (bad_words, processors.NoBadWordsLogitsProcessor),
    "min_new_tokens": (
        lambda rng, _: int(rng.integers(1, 12)),
        processors.MinNewTokensLengthLogitsProcessor,
    ),
    "temperature": (
        lambda rng, _: rng.uniform(0.3, 2),
        processors.TemperatureLogitsWarper,
    ),
    "top_k": (lambda rng, _: int(rng.integers(1, 60)), processors.TopKLogitsWarper),
    "top_p": (lambda rng, _: rng.uniform(0.05, 0.99), processors.TopPLogitsWarper),
    "min_p": (lambda rng, _: 10 ** rng.uniform(-4, -0.1), processors.MinPLogitsWarper),
    "typical_p": (
        lambda rng, _: rng.uniform(0.05, 0.99),
        processors.TypicalLogitsWarper,
    ),
}
THRESHOLDS = ("top_p", "min_p", "typical_p")


def processor(name, value, row):
    make = OPTIONS[name][1]
    if name == "bad_words_ids":
        return make(value, row.ends)
    if name == "min_new_tokens":
        return make(len(row.prompt), value, row.ends)
    return make(value)


def their_list(row, options):
    return transformers.LogitsProcessorList(
        processor(name, options[name], row) for name in OPTIONS if name in options
    )


def their_logits(row, options):
    logits = torch.from_numpy(row.logits)[None]
    return their_list(row, options)(torch.tensor([row.ids]), logits)[0].numpy()


def near_an_edge(row):
    """Whether a token is so near to a threshold that rounding decides about it.

    The sums in float32 that top-p and typical-p compare differ by about 1e-7 between
    two libraries. So rows on which thresholds 2e-6 off keep other tokens are drawn
    anew, one in a thousand or so.
    """

    def kept(factor):
        moved = {n: factor * row.options[n] for n in THRESHOLDS if n in row.options}
        return np.isfinite(their_logits(row, row.options | moved))

    return (kept(1 - 2e-6) != kept(1 + 2e-6)).any()


process = jax.jit(lambda x, h, s: filter_logits(edit_logits(x, h, s), s))


def our_logits(rows):
    vocab_size = len(rows[0].logits)
    history = history_of(
        [r.prompt for r in rows], [r.drawn for r in rows], vocab_size, S
    )
    s = Sampling.create(B, vocab_size)
    words = []
    for i, row in enumerate(rows):
        options = dict(row.options)
        for (token,), bias in options.pop("sequence_bias", []):
            s.bias_BV[i, token] = bias
        words.append(options.pop("bad_words_ids", []))
        s.bias_BV[i, [w[0] for w in words[-1] if len(w) == 1]] = -np.inf
        s.ends_BV[i, row.ends] = True
        for name, value in options.items():
            getattr(s, f"{name}_B")[i] = value
    words = [[w for w in row if len(w) > 1] for row in words]
    logits = np.stack([r.logits for r in rows])
    return np.asarray(
        process(logits, history, s.replace(bad_words_BWL=words_array(words)))
    )


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max())
    return e / e.sum()


def check(rng, vocab_size, choose):
    """One batch, each row with the options that `choose()` names."""
    rows: list[Row] = []
    while len(rows) < B:
        row = random_row(rng, vocab_size)
        row.options = {name: OPTIONS[name][0](rng, row) for name in choose()}
        if not near_an_edge(row):
            rows.append(row)
    changed = False
    for ours, row in zip(our_logits(rows), rows, strict=True):
        theirs = their_logits(row, row.options)
        np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
        # Logits up to 20 / 0.3 in float32: 4e-6 off, which is a probability's factor.
        np.testing.assert_allclose(softmax(ours), softmax(theirs), rtol=0, atol=1e-5)
        changed |= not np.array_equal(theirs, row.logits)
    assert changed


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_alone(name, vocab_size):
    rng = np.random.default_rng(vocab_size)
    for _ in range(5):
        check(rng, vocab_size, lambda: [name])


@pytest.mark.parametrize("batch", range(25))
def test_two_hundred_combinations(batch):
    """Eight rows to a batch, each with options of its own."""
    rng = np.random.default_rng(batch)
    names = list(OPTIONS)
    check(
        rng,
        VOCAB_SIZES[batch % len(VOCAB_SIZES)],
        lambda: rng.permutation(names)[: rng.integers(2, len(names) + 1)].tolist(),
    )


def test_equals_at_the_last_place_of_top_p():
    """The one difference in what stays: all of them with us, else one of them."""
    row = Row(np.log(np.float32([0.3, 0.3, 0.2, 0.2])), [0], [], [], {"top_p": 0.2})
    assert np.isfinite(their_logits(row, row.options)).sum() == 1
    assert np.isfinite(our_logits([row] * B)[0]).tolist() == [True, True, False, False]


def test_the_order_is_that_of_transformers():
    """Of the list that its `generate` makes of the same options."""
    rng = np.random.default_rng(0)
    row = random_row(rng, VOCAB_SIZES[0])
    options = {name: value(rng, row) for name, (value, _) in OPTIONS.items()}
    config = transformers.GenerationConfig(
        **options, do_sample=True, eos_token_id=row.ends
    )
    config._eos_token_tensor = torch.tensor(row.ends)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=4, n_head=1, n_layer=1)
    )
    theirs = model._get_logits_processor(config, input_ids_seq_length=len(row.prompt))
    assert [type(p) for p in theirs] == [type(p) for p in their_list(row, options)]
