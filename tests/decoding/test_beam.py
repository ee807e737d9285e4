"""Beam search, compared with a slow one on lists that knows neither cache nor jit."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.decoding.beam import beam_search, search, start
from gpt2_jax.decoding.sampling import Sampling
from gpt2_jax.model import GPT2
from shapes import TINY, random_params

V = TINY.vocab_size
RNG = np.random.default_rng(4)
PROMPTS = [RNG.integers(0, V, n).tolist() for n in (5, 1, 17, 9, 3)]
ENDS = (2, 4, 25, 30)  # these occur, early and late


def sampling_of(batch, *, vocab_size=V, ends=(), bias=None, bad_words=(), **options):
    s = Sampling.create(batch, vocab_size, **options)
    s.ends_BV[:, list(ends)] = True
    for token, value in (bias or {}).items():
        s.bias_BV[:, token] = value
    for i, word in enumerate(bad_words):
        s.bad_words_BWL[:, i, -len(word) :] = word
    return s


def run(tiny, prompts, beams, n, *, keep=None, table_QV=None, **options):
    names = ("length_penalty", "early_stopping", "n_valid")
    named = {k: options.pop(k) for k in names if k in options}
    model, params = tiny
    vocab_size = model.cfg.vocab_size
    return beam_search(
        model,
        params,
        prompts,
        sampling_of(len(prompts), vocab_size=vocab_size, **options),
        num_beams=beams,
        num_return_sequences=beams if keep is None else keep,
        max_new_tokens=n,
        table_QV=table_QV,
        **{"n_valid": vocab_size, **named},
    )


# --- The reference --------------------------------------------------------------------


@pytest.fixture(scope="module")
def log_probs(tiny):
    """ids -> log-probabilities of the next token, by the whole sequence anew."""
    model, params = tiny
    apply = jax.jit(lambda t: jax.nn.log_softmax(model.apply({"params": params}, t)[0]))
    known = {}

    def of(ids):
        if tuple(ids) not in known:
            padded = np.zeros((1, TINY.n_positions), np.int32)
            padded[0, : len(ids)] = ids
            known[tuple(ids)] = np.asarray(apply(padded))[0, len(ids) - 1]
        return known[tuple(ids)]

    return of


def edited(logp, prompt, new, *, ends, bias, bad_words, ngram, min_new):
    logp, ids = logp.copy(), prompt + new
    for token, value in bias.items():
        logp[token] += value
    for at in range(len(ids) - ngram + 1 if ngram else 0):
        *before, token = ids[at : at + ngram]
        if before == ids[len(ids) - ngram + 1 :]:
            logp[token] = -np.inf
    for *before, token in bad_words:
        if ids[len(ids) - len(before) :] == before:
            logp[token] = -np.inf
    if len(new) < min_new:
        logp[list(ends)] = -np.inf
    return logp


def slow_search(
    log_probs,
    prompt,
    beams,
    n,
    *,
    length_penalty=1.0,
    early_stopping=False,
    ends=(),
    bias=None,
    bad_words=(),
    no_repeat_ngram_size=0,
    min_new_tokens=0,
):
    """(score, new tokens without the end, log-probabilities with it), best first.

    The score is of edited log-probabilities, the list of those before.
    """
    edits = dict(bias=bias or {}, ngram=no_repeat_ngram_size, min_new=min_new_tokens)
    alive = [(0.0, [], [])]
    pool = []
    for length in range(1, n + 1):
        children = []
        for total, new, logps in alive:
            logp = log_probs(prompt + new)
            total_V = total + edited(
                logp, prompt, new, ends=ends, bad_words=bad_words, **edits
            )
            children += [
                (total_V[t], new + [t], logps + [logp[t]])
                for t in np.flatnonzero(total_V > -np.inf).tolist()
            ]
        children.sort(key=lambda c: -c[0])
        # as many as make sure that `beams` of them go on
        children = children[: max(2, 1 + len(ends)) * beams]
        for total, new, logps in children[:beams]:
            score = total / length**length_penalty
            if new[-1] in ends:
                pool.append((score, new[:-1], logps))
            elif length == n:
                pool.append((score, new, logps))
        pool = sorted(pool, key=lambda h: -h[0])[:beams]
        alive = [c for c in children if c[1][-1] not in ends]
        if len(alive) > beams:
            gap = alive[beams - 1][0] - alive[beams][0]
            assert gap > 1e-5, "rounding decides here: take another prompt"
        alive = alive[:beams]
        if not alive:
            break
        if len(pool) == beams:
            if early_stopping is True:
                break
            longest = early_stopping == "never" and length_penalty > 0
            best = alive[0][0] / (n if longest else length) ** length_penalty
            if best <= pool[-1][0]:
                break
    return pool


def check(found, reference):
    assert [h.ids for h in found] == [new for _, new, _ in reference]
    for ours, (score, new, logps) in zip(found, reference, strict=True):
        # float32: sums in another order, logits of size 10
        assert ours.score == pytest.approx(score, abs=1e-4)
        np.testing.assert_allclose(ours.logprobs, logps[: len(new)], atol=1e-4)
        assert ours.finish_reason == ("length" if len(logps) == len(new) else "stop")


# --- Equal to the reference -----------------------------------------------------------

MODES = [False, True, "never"]


@pytest.mark.parametrize("beams", [2, 3, 4])
@pytest.mark.parametrize("early_stopping", MODES)
def test_equal_to_the_slow_search(tiny, log_probs, beams, early_stopping):
    reasons = set()
    for penalty, ends in itertools.product((-1.0, 0.0, 0.6, 1.0, 2.0), ((), ENDS)):
        options = dict(length_penalty=penalty, early_stopping=early_stopping, ends=ends)
        found = run(tiny, PROMPTS, beams, 12, **options)
        for prompt, hypotheses in zip(PROMPTS, found, strict=True):
            check(hypotheses, slow_search(log_probs, prompt, beams, 12, **options))
            reasons |= {(bool(ends), h.finish_reason) for h in hypotheses}
    assert {(False, "length"), (True, "stop")} <= reasons


def test_the_modes_and_penalties_differ(tiny):
    """Else the test above would compare one search with itself."""

    def ids(penalty, mode):
        options = dict(length_penalty=penalty, early_stopping=mode, ends=ENDS)
        found = run(tiny, PROMPTS, 4, 12, **options)
        return [[h.ids for h in hypotheses] for hypotheses in found]

    assert ids(2.0, False) != ids(2.0, True)
    assert ids(2.0, False) != ids(2.0, "never")
    assert ids(2.0, False) != ids(0.0, False)
    # without a penalty, the length that suits a beam best is the present one
    assert ids(0.0, False) == ids(0.0, "never")


EDITS = [
    dict(bias={4: -np.inf, 11: 4.0, 27: -2.0}),
    dict(bad_words=[(14, 4), (27, 27, 27), (52, 25)]),
    dict(no_repeat_ngram_size=2),
    dict(min_new_tokens=6),
    dict(no_repeat_ngram_size=3, min_new_tokens=3, bias={2: 3.0}),
]


@pytest.mark.parametrize("edits", EDITS, ids=lambda e: "+".join(e))
def test_equal_to_the_slow_search_with_edits(tiny, log_probs, edits):
    found = run(tiny, PROMPTS, 3, 12, ends=ENDS, **edits)
    for prompt, hypotheses in zip(PROMPTS, found, strict=True):
        reference = slow_search(log_probs, prompt, 3, 12, ends=ENDS, **edits)
        check(hypotheses, reference)
    unedited = run(tiny, PROMPTS, 3, 12, ends=ENDS)
    assert [h[0].ids for h in found] != [h[0].ids for h in unedited]


def test_the_last_position_is_used(tiny, log_probs):
    n = TINY.n_positions - 17
    found = run(tiny, PROMPTS[2:3], 2, n)
    check(found[0], slow_search(log_probs, PROMPTS[2], 2, n))
    assert {len(h.ids) for h in found[0]} == {n}


# --- What must hold of any beam search ------------------------------------------------


@pytest.mark.parametrize("early_stopping", MODES)
def test_one_beam_is_greedy(tiny, log_probs, early_stopping):
    for ends in ((), ENDS):
        found = run(tiny, PROMPTS, 1, 20, ends=ends, early_stopping=early_stopping)
        for prompt, (hypothesis,) in zip(PROMPTS, found, strict=True):
            new = []
            while len(new) < 20 and not set(new) & set(ends):
                new.append(int(log_probs(prompt + new).argmax()))
            stopped = new[-1] in ends
            assert hypothesis.ids == new[: len(new) - stopped]
            assert hypothesis.finish_reason == ("stop" if stopped else "length")


def test_a_ragged_batch_equals_single_runs(tiny):
    options = dict(ends=ENDS, length_penalty=1.5, no_repeat_ngram_size=2)
    batch = run(tiny, PROMPTS, 3, 15, **options)
    for prompt, hypotheses in zip(PROMPTS, batch, strict=True):
        (alone,) = run(tiny, [prompt], 3, 15, **options)
        assert [h.ids for h in hypotheses] == [h.ids for h in alone]
        for a, b in zip(hypotheses, alone, strict=True):
            assert a.score == pytest.approx(b.score, abs=1e-5)  # another batch size


def test_the_loop_ends_when_no_prompt_can_improve(tiny):
    model, params = tiny
    tokens, length = np.zeros((5, 32), np.int32), [len(p) for p in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    found = run(tiny, PROMPTS, 3, 40, ends=ENDS, early_stopping=True)
    longest = [max(len(h.ids) + 1 for h in hypotheses) for hypotheses in found]
    state = search(
        model,
        params,
        start(model, params, tokens, np.array(length, np.int32), 64, 3),
        sampling_of(5, ends=ENDS),
        None,
        np.full(5, 40, np.int32),
        np.float32(1),
        np.int32(MODES.index(True)),
        np.int32(V),
    )
    # each prompt took the steps of its last hypothesis, the loop no more than those
    assert state.history.n_new_B.reshape(5, 3).tolist() == [[n] * 3 for n in longest]
    assert max(longest) < 40


def test_rows_have_their_own_lengths(tiny):
    limits = [9, 20, TINY.n_positions - 17, 1, 5]
    batch = run(tiny, PROMPTS, 3, limits)
    for row in (0, 2):  # ended long before the last, and the last to end
        (alone,) = run(tiny, PROMPTS[row : row + 1], 3, limits[row])
        assert [h.ids for h in batch[row]] == [h.ids for h in alone]
    assert [{len(h.ids) for h in hypotheses} for hypotheses in batch] == [
        {limit} for limit in limits
    ]


def test_rows_have_their_own_options(tiny):
    model, params = tiny
    prompts, options = [PROMPTS[0]] * 3, [dict(), dict(ends=ENDS), EDITS[0]]
    singles = [sampling_of(1, **o) for o in options]
    sampling = jax.tree.map(lambda *xs: np.concatenate(xs), *singles)
    found = beam_search(
        model,
        params,
        prompts,
        sampling,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=12,
        n_valid=V,
    )
    ids = [[h.ids for h in hypotheses] for hypotheses in found]
    for row, o in enumerate(options):
        assert ids[row] == [h.ids for h in run(tiny, PROMPTS[:1], 3, 12, **o)[0]]
    assert ids[0] != ids[1] != ids[2] != ids[0]


def test_the_best_are_returned_best_first(tiny):
    four = run(tiny, PROMPTS, 4, 12, ends=ENDS)
    for hypotheses in four:
        scores = [h.score for h in hypotheses]
        assert len(scores) == 4
        assert scores == sorted(scores, reverse=True)
    assert run(tiny, PROMPTS, 4, 12, ends=ENDS, keep=2) == [h[:2] for h in four]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_the_best_of_all_when_the_beams_are_many(length_penalty):
    """Four tokens and an end, at most four long: 1 + 4 + 16 + 64 * 5 hypotheses."""
    cfg = GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    params, prompt, end, n = random_params(cfg, 0.5), [2, 0], 4, 4
    model = GPT2(cfg)
    tails = [
        new + (end,) * stop
        for length in range(n + 1)
        for new in itertools.product(range(4), repeat=length)
        for stop in ((True,) if length < n else (False,))
    ] + [new + (end,) for new in itertools.product(range(4), repeat=n - 1)]
    tails = sorted(set(tails))
    assert len(tails) == 1 + 4 + 16 + 64 + 256
    padded = np.zeros((len(tails), n), np.int32)
    for row, tail in enumerate(tails):
        padded[row, : len(tail)] = tail
    tokens = np.concatenate([np.tile(prompt, (len(tails), 1)), padded], 1)
    logp = jax.nn.log_softmax(model.apply({"params": params}, tokens)[0])
    logp = np.take_along_axis(np.asarray(logp[:, 1:-1]), padded[:, :, None], 2)[..., 0]
    every = sorted(
        (
            (logp[row, : len(tail)].sum() / len(tail) ** length_penalty, tail)
            for row, tail in enumerate(tails)
        ),
        reverse=True,
    )
    options = dict(early_stopping="never", length_penalty=length_penalty, ends=(end,))
    (found,) = run((model, params), [prompt], 400, n, **options)
    assert len(found) == len(tails)  # fewer than beams: no more are possible
    assert [h.ids for h in found[:20]] == [
        [t for t in tail if t != end] for _, tail in every[:20]
    ]
    # float32 sums of four
    np.testing.assert_allclose(
        [h.score for h in found], [score for score, _ in every], atol=1e-5
    )


def test_a_table_of_allowed_tokens(tiny):
    """Two words, [3, 9] and [3, 40, 41], then an end: fewer than the beams."""
    table = np.full((5, V), -1, np.int32)
    table[0, 3], table[1, 9], table[1, 40], table[2, 41], table[3, 7] = 1, 3, 2, 3, 4
    found = run(tiny, PROMPTS, 4, 12, ends=(7,), table_QV=table)
    for hypotheses in found:
        assert sorted(h.ids for h in hypotheses) == [[3, 9], [3, 40, 41]]
        assert {h.finish_reason for h in hypotheses} == {"stop"}
        assert hypotheses[0].score > hypotheses[1].score
    table[3, 7] = -1
    assert run(tiny, PROMPTS, 4, 12, ends=(7,), table_QV=table) == [[]] * len(PROMPTS)


def test_ids_of_a_padded_vocabulary_have_no_probability(tiny):
    cfg = dataclasses.replace(TINY, vocab_size=70)
    _, params = tiny
    wte = np.asarray(params["wte"]["embedding"])
    wider = np.concatenate([wte, 3 * wte[:9]])  # of larger logits, either sign
    padded = GPT2(cfg), {**params, "wte": {"embedding": wider}}
    options = dict(ends=ENDS, no_repeat_ngram_size=2)
    found = run(padded, PROMPTS, 3, 12, n_valid=V, **options)
    assert found != run(padded, PROMPTS, 3, 12, **options)
    expected = run(tiny, PROMPTS, 3, 12, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert [h.ids for h in ours] == [h.ids for h in theirs]


# --- Compilation and errors -----------------------------------------------------------


def test_nothing_is_compiled_for_other_values(tiny, compilations):
    run(tiny, PROMPTS[:2], 3, 9)
    with compilations() as n:
        run(tiny, PROMPTS[1:3], 3, 11, length_penalty=2.0, ends=ENDS)
        run(tiny, PROMPTS[:2], 3, 5, early_stopping=True, ends=ENDS[:1], n_valid=50)
        run(tiny, PROMPTS[:2], 3, 9, keep=1, early_stopping="never", **EDITS[1])
        assert n() == 0
        run(tiny, PROMPTS[:2], 2, 9)  # another number of beams, to see that it counts
        assert n() >= 2


def test_logits_that_are_no_numbers_end_it_with_an_error(tiny):
    model, params = tiny
    bad = jax.tree.map(lambda x: x, params)
    bad["ln_f"]["bias"] = bad["ln_f"]["bias"].at[3].set(np.nan)
    with pytest.raises(ValueError, match="prompt 0: the model's logits are not finite"):
        run((model, bad), PROMPTS[:2], 3, 9)


@pytest.mark.parametrize(
    ("prompts", "n", "options", "message"),
    [
        ([[]], 1, {}, "prompt 0 is empty"),
        ([[1], [1] * 60], 5, {}, r"prompt 1 of 60 tokens \+ max_new_tokens=5 exceeds"),
        ([[1]], 0, {}, "max_new_tokens=0 of prompt 0 must be >= 1"),
        ([[1]], 1, {"keep": 4}, r"num_return_sequences=4 is not in \[1, num_beams=3\]"),
        ([[1]], 1, {"keep": 0}, r"num_return_sequences=0 is not in \[1, num_beams=3\]"),
        ([[1]], 1, {"early_stopping": "no"}, "early_stopping='no' is not one of"),
    ],
)
def test_bad_input_is_refused_before_anything_compiles(
    tiny, compilations, prompts, n, options, message
):
    with compilations() as count:
        with pytest.raises(ValueError, match=message):
            run(tiny, prompts, 3, n, **options)
        assert count() == 0


def test_no_prompts(tiny):
    assert run(tiny, [], 3, 9) == []
