"""docs/sampling.md held to its word: random mixes of options beside plain Python.

2,000 mixes: `pytest -m slow tests/decoding/test_sampling_page.py -s`
"""

import collections

import numpy as np
import pytest

import plain_decoding as plain
from gpt2_jax.config import GPT2Config
from gpt2_jax.lm import LanguageModel
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizers.table import TableTokenizer
from shapes import random_params

WORDS = [" ", "a", "b", "c", "d", "\n", "ab", "ba", "abc", "cab", "dd", "bb", " a"]
WORDS += [" b", " c", "a b", "b\n", "\n\n", "\na", "d ", "e"]
WORDS = [w.encode() for w in WORDS] + [b"\xc3", b"\xa9", "é".encode(), "aé".encode()]


class Words(TableTokenizer):
    """Longest match first, so that ids and text have other borders than characters."""

    kind = "words"

    def __init__(self):
        self._table = [*WORDS, b"<end>"]
        self.eot_id = len(WORDS)

    def encode(self, text):
        ids, rest = [], text.encode()
        while rest:
            fits = [i for i, w in enumerate(WORDS) if rest.startswith(w)]
            ids.append(max(fits, key=lambda i: len(WORDS[i])))
            rest = rest[len(WORDS[ids[-1]]) :]
        return ids


CFG = GPT2Config(
    vocab_size=40,  # 27, padded
    n_positions=24,
    n_embd=16,
    n_layer=1,
    n_head=2,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)
V, N_TOP = len(WORDS) + 1, 3


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(GPT2(CFG), random_params(CFG, 0.5), Words(), step=0)


@pytest.fixture(scope="module")
def model(lm):
    return plain.PlainModel(CFG, lm.params)


# --- Mixes ----------------------------------------------------------------------------


def ids(rng, least, most):
    return rng.integers(0, V - 1, int(rng.integers(least, most + 1))).tolist()


def text(rng, most=3):
    letters = rng.choice(list("aabbcd \né"), int(rng.integers(1, most + 1)))
    return "".join(letters)


def pick(rng, *values):
    return values[int(rng.integers(len(values)))]


def edits(rng):
    """Options of steps 2 to 8, and ends."""
    makers = {
        "repetition_penalty": lambda: float(rng.uniform(0.5, 2)),
        "presence_penalty": lambda: float(rng.normal(0, 2)),
        "frequency_penalty": lambda: float(rng.normal(0, 1)),
        "no_repeat_ngram_size": lambda: int(rng.integers(1, 4)),
        "logit_bias": lambda: {
            int(i): pick(rng, float(rng.normal(0, 4)), -np.inf) for i in ids(rng, 1, 4)
        },
        "bad_words": lambda: [
            pick(rng, text(rng), ids(rng, 1, 3)) for _ in range(rng.integers(1, 4))
        ],
        "allowed_tokens": lambda: pick(
            rng, ids(rng, 1, 9), [*range(V)], rng.random(V) < 0.7
        ),
        "stop_token_ids": lambda: ids(rng, 1, 3),
    }
    return {name: make() for name, make in makers.items() if rng.random() < 0.25}


def mix(rng):
    """A prompt and its options, as of `generate_many`."""
    o = edits(rng)
    o["prompt"] = ids(rng, 1, 12) if rng.random() < 0.5 else text(rng, 10)
    if rng.random() < 0.7:
        o["max_new_tokens"] = int(rng.integers(0, 12))
        least = o["max_new_tokens"]
    else:
        n_prompt = (
            len(Words().encode(o["prompt"]))
            if isinstance(o["prompt"], str)
            else len(o["prompt"])
        )
        least = int(rng.integers(0, 12))
        o["max_length"] = n_prompt + least
    if rng.random() < 0.15:
        o["overflow"] = "slide"
        if rng.random() < 0.5:
            o["prompt"] = ids(rng, 20, 40)
            least = o["max_new_tokens"] = int(rng.integers(1, 40))
            o.pop("max_length", None)
    if rng.random() < 0.3:
        o["min_new_tokens"] = int(rng.integers(0, least + 1))
    if rng.random() < 0.5:
        o["stop"] = pick(rng, text(rng), [text(rng) for _ in range(3)])
    if rng.random() < 0.5:
        o["seed"] = int(rng.integers(2**32))
    if rng.random() < 0.3:
        return {**o, **pick(rng, {"temperature": 0}, {"do_sample": False})}
    o["temperature"] = pick(rng, 1.0, float(rng.uniform(0.3, 3)))
    filters = {
        "top_k": lambda: int(rng.integers(1, V + 5)),
        "top_p": lambda: float(rng.uniform(0.1, 1)),
        "min_p": lambda: float(rng.uniform(0, 0.5)),
        "typical_p": lambda: float(rng.uniform(0.1, 1)),
    }
    return o | {name: make() for name, make in filters.items() if rng.random() < 0.3}


def random_table(rng):
    """Of three states, none of which is stuck."""
    table = rng.integers(-1, 3, (3, V))
    table[:, rng.integers(V)] = 1
    return table


# --- Comparison -----------------------------------------------------------------------

counts: collections.Counter[str] = collections.Counter()


def prompt_ids(o):
    tokenizer, prompt = Words(), o["prompt"]
    if isinstance(prompt, str):
        return tokenizer.encode(prompt) or [tokenizer.eot_id]
    return prompt


def compare(model, o, found, draw, *, table=None, n_top=N_TOP):
    """One completion beside the plain row."""
    counts["mixes"] += 1
    args = dict(n_top=n_top, table=table, follow=found.token_ids)
    try:
        row = plain.decode(model, Words(), prompt_ids(o), o, draw, **args)
    except plain.Undecided:
        counts["undecided"] += 1
        return
    counts["tokens"] += len(row.ids)
    counts["tokens taken as they came"] += row.n_followed
    counts[row.finish] += 1
    assert (found.token_ids, found.finish_reason) == (row.ids, row.finish), o
    assert found.text == row.text, o
    assert found.n_prompt_tokens == len(prompt_ids(o))
    # float32 against float64, logits of size 10
    np.testing.assert_allclose(found.logprobs, row.logprobs, atol=1e-4)
    for ours, theirs in zip(found.top_logprobs, row.top, strict=True):
        np.testing.assert_allclose([*ours.values()], [*theirs.values()], atol=1e-4)
        near = np.abs(np.diff([*theirs.values()])) < 1e-4
        assert [*ours] == [*theirs] or near.any()


def compare_queue(lm, model, rng, n, *, n_slots, table=None, **extra):
    mixes = [mix(rng) for _ in range(n)]
    if table is not None:
        for o in mixes:
            o.pop("allowed_tokens", None)
        extra["allowed_tokens"] = table
    many = lm.generate_many(mixes, n_slots=n_slots, seed=5, logprobs=N_TOP, **extra)
    found = {c.index: c for c in many}
    for i, o in enumerate(mixes):
        draw = (o["seed"], 0, 0) if "seed" in o else (5, i, 0)
        compare(model, o, found[i], draw, table=table)


def compare_several(lm, model, rng, n):
    """Ragged batches with several texts a prompt, or the best of several."""
    for _ in range(n):
        o = mix(rng)
        kind, least = type(o["prompt"]), int(rng.integers(1, 4))
        prompts = [o["prompt"], *(mix(rng)["prompt"] for _ in range(6))]
        prompts = [p for p in prompts if isinstance(p, kind)][:least]
        del o["prompt"]
        o |= {"seed": int(rng.integers(2**32)), "overflow": "slide"}
        o.pop("max_length", None)
        o.setdefault("max_new_tokens", max(6, o.get("min_new_tokens", 0)))
        draws = o.get("temperature", 0) > 0
        texts = int(rng.integers(2, 4)) if draws else 1
        best = draws and rng.random() < 0.5
        several = {"best_of": texts} if best else {"num_return_sequences": texts}
        results = lm.complete(prompts, logprobs=N_TOP, **o, **several)
        for i, (prompt, found) in enumerate(zip(prompts, results, strict=True)):
            own = {**o, "prompt": prompt}
            if not best:
                for j, one in enumerate([found] if texts == 1 else found):
                    compare(model, own, one, (o["seed"], i, j))
                continue
            every = lm.complete(prompts, num_return_sequences=texts, **o)[i]
            means = [np.mean(c.logprobs) if c.logprobs else 0.0 for c in every]
            compare(model, own, found, (o["seed"], i, int(np.argmax(means))))


def compare_streams(lm, model, rng, n):
    for _ in range(n):
        o = mix(rng)
        o.setdefault("seed", 3)
        options = {name: x for name, x in o.items() if name != "prompt"}
        pieces = list(lm.stream(o["prompt"], **options))
        found = lm.complete(o["prompt"], logprobs=N_TOP, **options)
        assert "".join(pieces) == found.text
        assert all(pieces)
        compare(model, o, found, (o["seed"], 0, 0))


def compare_beams(lm, model, rng, n):
    for k in range(n):
        o = {name: x for name, x in edits(rng).items()}
        prompt = ids(rng, 1, 10)
        o |= {"num_beams": 2 + k % 3, "max_new_tokens": int(rng.integers(1, 9))}
        o["num_return_sequences"] = int(rng.integers(1, o["num_beams"] + 1))
        o["length_penalty"] = pick(rng, 1.0, float(rng.uniform(-1, 2)))
        o["early_stopping"] = pick(rng, False, True, "never")
        if rng.random() < 0.4:
            o["min_new_tokens"] = int(rng.integers(0, o["max_new_tokens"] + 1))
        found = lm.complete(prompt, **o)
        found = found if isinstance(found, list) else [found]
        counts["mixes"] += 1
        try:
            expected = plain.beams(model, Words(), prompt, o)
        except plain.Undecided:
            counts["undecided"] += 1
            continue
        counts["hypotheses"] += len(expected)
        if not expected:
            assert [(c.token_ids, c.finish_reason) for c in found] == [
                ([], "exhausted")
            ]
            continue
        for ours, (score, new, logps, finish) in zip(found, expected, strict=True):
            assert (ours.token_ids, ours.finish_reason) == (new, finish), o
            # sums of up to 8 log-probabilities, float32 against float64
            np.testing.assert_allclose(ours.score, score, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(ours.logprobs, logps, atol=1e-4)


@pytest.fixture
def counted():
    """Rounding may decide a little, and rows end in all ways."""
    counts.clear()
    yield
    print(dict(counts))
    assert counts["undecided"] <= 0.1 * counts["mixes"]
    assert counts["tokens taken as they came"] <= 0.02 * counts["tokens"]
    assert min(counts["stop"], counts["length"]) > 0.2 * counts["mixes"]


@pytest.mark.usefixtures("counted")
def test_a_hundred_mixes(lm, model):
    compare_queue(lm, model, np.random.default_rng(0), 100, n_slots=4)


def test_the_ends_of_what_is_allowed(lm):
    """Nothing is compiled for it: slots and options are those of the mixes."""
    eot, full = V - 1, [1] * CFG.n_positions
    every = {i: -np.inf for i in range(V)}
    cases = [
        # a prompt as long as the context
        ({"prompt": full, "max_new_tokens": 0}, "length", 0),
        ({"prompt": full, "min_new_tokens": 5, "overflow": "slide"}, "length", 5),
        ({"prompt": full, "max_length": CFG.n_positions}, "length", 0),
        ({"prompt": "", "max_new_tokens": 3, "min_new_tokens": 3}, "length", 3),
        # no token is left: by a bias, by words, or because none may end the text yet
        ({"prompt": "a", "logit_bias": every}, "exhausted", 0),
        ({"prompt": "a", "bad_words": [[i] for i in range(V)]}, "exhausted", 0),
        (
            {"prompt": "a", "allowed_tokens": [eot], "min_new_tokens": 1},
            "exhausted",
            0,
        ),
        ({"prompt": "a", "allowed_tokens": [eot]}, "stop", 0),
        ({"prompt": "a", "stop": ["a", "b"], "allowed_tokens": [1]}, "stop", 0),
        (
            {
                "prompt": "a",
                "stop": "aa",
                "allowed_tokens": [1],
                "min_new_tokens": 3,
                "max_new_tokens": 9,
            },
            "stop",
            3,
        ),
        # more than there are tokens
        ({"prompt": "a", "top_k": 2**31 - 1, "stop_token_ids": [*range(V)]}, "stop", 0),
    ]
    requests = [{"max_new_tokens": 5} | o for o, _, _ in cases]
    for o in requests:
        if "max_length" in o:
            del o["max_new_tokens"]
    many = lm.generate_many(requests, n_slots=4, logprobs=N_TOP, seed=0)
    found = sorted(many, key=lambda c: c.index)
    for c, (o, finish, n) in zip(found, cases, strict=True):
        assert (c.finish_reason, len(c.token_ids)) == (finish, n), o
        assert len(c.logprobs) == len(c.top_logprobs) == n
    with pytest.raises(ValueError, match="max_new_tokens=1 exceeds n_positions=24"):
        lm.generate(full, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens=0 of prompt 0 must be >= 1"):
        lm.generate([1], max_new_tokens=0, num_beams=2)
    for nothing in ([], (), np.zeros(0, int), [[]], [[1], []]):
        with pytest.raises(ValueError, match="empty"):
            lm.generate(nothing, max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.usefixtures("counted")
def test_two_thousand_mixes(lm, model):
    rng = np.random.default_rng(1)
    smaller = LanguageModel(GPT2(CFG), random_params(CFG, 0.3), Words(), step=0)
    compare_queue(lm, model, rng, 1000, n_slots=8)
    compare_queue(lm, model, rng, 200, n_slots=8, table=random_table(rng))
    compare_queue(lm, model, rng, 200, n_slots=3, draft="prompt_lookup", n_draft=3)
    compare_queue(lm, model, rng, 150, n_slots=3, draft=smaller, n_draft=2)
    compare_streams(lm, model, rng, 100)
    compare_several(lm, model, rng, 100)
    compare_beams(lm, model, rng, 250)
    assert counts["mixes"] >= 2000
    assert counts["exhausted"] > 0
