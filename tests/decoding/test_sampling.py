"""Each edit and filter against numpy in float64, and what holds for all of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.decoding.sampling import (
    MIN_BAD_WORDS,
    History,
    Sampling,
    draw_token,
    edit_logits,
    filter_logits,
    forbid_bad_words,
    forbid_repeated_ngrams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical_p,
    penalize_counts,
    penalize_repetition,
    sample,
)

B, V, S = 4, 50, 24
OUT = -np.inf
LOGITS = np.random.default_rng(0).normal(0, 3, (B, V)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), B)

edit = jax.jit(edit_logits)
filtered = jax.jit(filter_logits)
draw = jax.jit(sample)
append = jax.jit(History.append)
ngrams = jax.jit(forbid_repeated_ngrams)
bad_words = jax.jit(forbid_bad_words)
top_k, top_p = jax.jit(keep_top_k), jax.jit(keep_top_p)
min_p, typical_p = jax.jit(keep_min_p), jax.jit(keep_typical_p)

# float32 rounds by 6e-8 of the value, here in five steps at most, on values up to 20.
ROUNDED = dict(rtol=1e-6, atol=5e-6)


def kept(logits):
    return np.isfinite(np.asarray(logits))


def floats(*values):
    return np.array(values, np.float32)


def log(*probs):
    """One row of logits of these probabilities."""
    return np.log(np.array([probs], np.float32))


def check(ours, reference):
    """The same tokens are out, and the others have the same logits."""
    ours = np.asarray(ours)
    np.testing.assert_array_equal(kept(ours), kept(reference))
    np.testing.assert_allclose(ours[kept(ours)], reference[kept(ours)], **ROUNDED)


# --- What a batch consists of ---------------------------------------------------------


def history_of(prompts, drawn, vocab_size=V, size=S, state=None, padding=None):
    """Of rows of ragged lengths; what follows a row in its buffer is garbage."""
    n = len(prompts)
    if padding is None:
        padding = np.random.default_rng(0).integers(0, vocab_size, (n, size))
    tokens = np.broadcast_to(padding, (n, size)).astype(np.int32)
    in_prompt = np.zeros((n, vocab_size), bool)
    counts = np.zeros((n, vocab_size), np.int32)
    for i, (prompt, new) in enumerate(zip(prompts, drawn, strict=True)):
        tokens[i, : len(prompt) + len(new)] = [*prompt, *new]
        in_prompt[i, prompt] = True
        np.add.at(counts[i], new, 1)
    n_new = np.array([len(new) for new in drawn], np.int32)
    return History(
        tokens_BS=tokens,
        length_B=np.array([len(p) for p in prompts], np.int32) + n_new,
        n_new_B=n_new,
        prompt_BV=in_prompt,
        counts_BV=counts,
        state_B=np.zeros(n, np.int32) if state is None else state,
    )


def words_array(rows):
    """Each row's words, each as its last columns; -1 everywhere else."""
    array = np.full((len(rows), *MIN_BAD_WORDS), -1, np.int32)
    for i, words in enumerate(rows):
        for j, word in enumerate(words):
            array[i, j, -len(word) :] = word
    return array


def random_rows(rng, batch=B, alphabet=4):
    """Prompts and drawn tokens, of few kinds so that all edits find something."""
    prompts = [rng.integers(0, alphabet, rng.integers(1, 12)) for _ in range(batch)]
    drawn = [rng.integers(0, alphabet, rng.integers(0, 10)) for _ in range(batch)]
    return [p.tolist() for p in prompts], [d.tolist() for d in drawn]


def random_words(rng, alphabet=4):
    n = rng.integers(0, MIN_BAD_WORDS[0] + 1)
    return [rng.integers(0, alphabet, rng.integers(2, 5)).tolist() for _ in range(n)]


def mixture(rng, batch=B, vocab_size=V):
    """Each row has about half of the options, at random."""

    def some(dtype, *values):
        return rng.choice(np.array(values, dtype), batch)

    bias = rng.normal(0, 2, (batch, vocab_size)) * (rng.random((batch, 1)) < 0.5)
    bias[rng.random((batch, vocab_size)) < 0.1] = OUT
    ends = np.zeros((batch, vocab_size), bool)
    ends[np.arange(batch)[:, None], rng.integers(0, vocab_size, (batch, 2))] = True
    return Sampling(
        temperature_B=some(np.float32, 0, 0.3, 1, 1.7),
        top_k_B=some(np.int32, 0, 0, 1, 7, 30, 99),
        top_p_B=some(np.float32, 1, 1, 0.3, 0.9, 0.99),
        min_p_B=some(np.float32, 0, 0, 0.02, 0.3),
        typical_p_B=some(np.float32, 1, 1, 0.2, 0.8),
        repetition_penalty_B=some(np.float32, 1, 0.8, 1.3, 2),
        presence_penalty_B=some(np.float32, 0, -0.5, 1.5),
        frequency_penalty_B=some(np.float32, 0, 0.25, -0.5),
        no_repeat_ngram_size_B=some(np.int32, 0, 1, 2, 3, 4),
        min_new_tokens_B=some(np.int32, 0, 2, 5, 100),
        bias_BV=bias.astype(np.float32),
        ends_BV=ends,
        bad_words_BWL=words_array([random_words(rng) for _ in range(batch)]),
    )


def random_table(rng, states=3, vocab_size=V):
    """Each state allows about half of the tokens, and token 0 always."""
    table = rng.integers(0, states, (states, vocab_size)).astype(np.int32)
    table[rng.random((states, vocab_size)) < 0.5] = -1
    table[:, 0] = 1
    return table


# --- The references: one row, in float64, by sorting and by plain loops ---------------

# float32 sums of V probabilities are off by about 1e-7: so near to a threshold, float32
# may rightly decide otherwise than float64, and these tests prove nothing.
EDGE = 2e-6


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def clear_of(values, threshold):
    assert np.abs(values - threshold).min() > EDGE, "at the edge: take another seed"


def reference_temperature(x, temperature):
    return x / temperature


def reference_top_k(x, k):
    return np.where(x >= np.sort(x)[::-1][min(k, len(x)) - 1], x, OUT)


def reference_top_p(x, p):
    probs = softmax(x)
    order = np.argsort(-probs)
    total = np.cumsum(probs[order])
    clear_of(total, p)
    return np.where(probs >= probs[order[np.searchsorted(total, p)]], x, OUT)


def reference_min_p(x, p):
    probs = softmax(x)
    times = probs / probs.max() / p
    clear_of(times, 1)
    return np.where(times >= 1, x, OUT)


def reference_typical_p(x, p):
    ids = np.flatnonzero(kept(x))
    probs = softmax(x[ids])
    entropy = -(probs * np.log(probs)).sum()
    distance = np.abs(-np.log(probs) - entropy)
    order = np.argsort(distance)
    total = np.cumsum(probs[order])
    clear_of(total, p)
    at = np.searchsorted(total, p)
    if at + 1 < len(order):
        clear_of(distance[order[at + 1]], distance[order[at]])
    return np.where(np.isin(np.arange(len(x)), ids[order[: at + 1]]), x, OUT)


FILTERS = {  # in order, with the value that means off
    "temperature": (reference_temperature, 1),
    "top_k": (reference_top_k, 0),
    "top_p": (reference_top_p, 1),
    "min_p": (reference_min_p, 0),
    "typical_p": (reference_typical_p, 1),
}


def reference_filters(x, options, order=tuple(FILTERS)):
    x = x.astype(np.float64)
    for name in order:
        reference, off = FILTERS[name]
        if options[name] != off:
            x = reference(x, options[name])
    return x


def options_of(sampling, row):
    """A row's options by name, as Python's numbers."""
    names = [n for n in sampling.__dataclass_fields__ if n.endswith("_B")]
    return {n.removesuffix("_B"): getattr(sampling, n)[row].item() for n in names}


def repeated(row, n):
    """Tokens after which the last n of the row occur in it twice."""
    found = set()
    for token in range(V):
        longer = [*row, token]
        grams = [tuple(longer[i : i + n]) for i in range(len(longer) - n + 1)]
        if n and grams.count(grams[-1] if grams else None) > 1:
            found.add(token)
    return found


def completing(row, words):
    """Tokens with which the row ends in one of the words."""
    return {word[-1] for word in words if [*row, word[-1]][-len(word) :] == word}


def reference_edits(x, prompt, new, sampling, i, allowed=None):
    o, row = options_of(sampling, i), [*prompt, *new]
    x = x.astype(np.float64) + sampling.bias_BV[i]
    for token in set(row):
        penalty = o["repetition_penalty"]
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(new):
        x[token] -= o["presence_penalty"] + o["frequency_penalty"] * new.count(token)
    x[list(repeated(row, o["no_repeat_ngram_size"]))] = OUT
    words = [w[w >= 0].tolist() for w in sampling.bad_words_BWL[i] if w.max() >= 0]
    x[list(completing(row, words))] = OUT
    if allowed is not None:
        x[~allowed] = OUT
    if len(new) < o["min_new_tokens"]:
        x[sampling.ends_BV[i]] = OUT
    return x


# --- Edits ----------------------------------------------------------------------------


def test_repetition_penalty_by_hand():
    logits = floats([2.0, -2.0, 1.0, 0.0])
    seen = np.array([[True, True, False, True]])
    out = penalize_repetition(logits, seen, floats(2))
    np.testing.assert_array_equal(out, [[1.0, -4.0, 1.0, 0.0]])


def test_repetition_penalty_counts_the_prompt_and_what_was_drawn():
    history = history_of([[0, 1], [2], [4], [5, 5]], [[3], [3, 3], [4], []])
    logits = np.ones((B, V), np.float32)
    out = edit(logits, history, Sampling.create(B, V, repetition_penalty=2.0))
    expected = np.ones((B, V))
    expected[0, [0, 1, 3]] = expected[1, [2, 3]] = 0.5
    expected[2, 4] = expected[3, 5] = 0.5
    np.testing.assert_array_equal(out, expected)


def test_presence_and_frequency_penalty_by_hand():
    counts = np.array([[0, 1, 3], [0, 1, 3]], np.int32)
    out = penalize_counts(
        np.ones((2, 3), np.float32), counts, floats(0.5, -1), floats(0.25, 0)
    )
    np.testing.assert_array_equal(out, [[1, 0.25, -0.25], [1, 2, 2]])


@pytest.mark.parametrize("option", ["presence_penalty", "frequency_penalty"])
def test_what_was_drawn_is_counted_and_the_prompt_is_not(option):
    history = history_of([[0, 0, 1], [2], [3], [4]], [[1, 3, 3], [], [5], [4]])
    out = edit(LOGITS, history, Sampling.create(B, V, **{option: 2.0}))
    expected = LOGITS.copy()
    expected[0, [1, 3]] -= floats(2, 2 if option == "presence_penalty" else 4)
    expected[2, 5] -= 2
    expected[3, 4] -= 2
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("row", "n", "expected"),
    [
        ([5, 6, 5], 1, {5, 6}),
        ([5, 6, 5], 2, {6}),
        ([5, 6, 7, 5, 6], 3, {7}),
        ([5, 6, 7, 5, 6, 8, 5, 6], 3, {7, 8}),
        ([5, 5], 2, {5}),
        ([5, 5, 5], 3, {5}),
        ([5, 5], 3, set()),
        ([5], 1, {5}),
        ([5], 2, set()),
        ([5], 9, set()),
        ([5, 6, 7], 4, set()),
        ([5, 6, 5], 0, set()),
        ([5, 6, 5], S, set()),
        ([5, 6, 5], S + 1, set()),
        ([0] * S, S, {0}),
        ([0] * S, S + 1, set()),
    ],
)
def test_no_ngram_twice_by_hand(row, n, expected):
    h = history_of([row] * B, [[]] * B)
    out = ngrams(LOGITS, h.tokens_BS, h.length_B, np.full(B, n, np.int32))
    for i in range(B):
        assert set(np.flatnonzero(~kept(out)[i])) == expected
    assert repeated(row, n) == expected


@pytest.mark.parametrize("alphabet", [1, 2, 3, 7])
def test_no_ngram_twice_in_rows_that_mix_sizes(alphabet):
    rng = np.random.default_rng(alphabet)
    for _ in range(20):
        prompts, drawn = random_rows(rng, alphabet=alphabet)
        h = history_of(prompts, drawn)
        n = rng.permutation(5)[:B].astype(np.int32)
        out = ngrams(LOGITS, h.tokens_BS, h.length_B, n)
        for i, (prompt, new) in enumerate(zip(prompts, drawn, strict=True)):
            expected = LOGITS[i].copy()
            expected[list(repeated([*prompt, *new], n[i]))] = OUT
            np.testing.assert_array_equal(out[i], expected)


def test_an_ngram_of_any_size_is_looked_for_within_the_row_only():
    """That is, in at most as many passes as the row has tokens."""
    h = history_of([[5, 6, 5]] * B, [[]] * B)
    n = np.array([2**31 - 1, 2, 2**31 - 1, 0], np.int32)
    out = ngrams(LOGITS, h.tokens_BS, h.length_B, n)
    np.testing.assert_array_equal(kept(out).sum(-1), [V, V - 1, V, V])


@pytest.mark.parametrize(
    ("row", "words", "expected"),
    [
        ([1, 2], [[2, 3]], {3}),
        ([1, 2], [[1, 3]], set()),
        ([1, 2], [[1, 2, 3], [2, 4], [9, 2, 5]], {3, 4}),
        ([1, 2], [[2, 3], [2, 3]], {3}),
        ([2], [[1, 2, 3]], set()),  # longer than the row
        ([0], [[0, 0, 3]], set()),
        ([2], [[2, 2]], {2}),
        ([1, 2, 3, 4, 5, 6, 7], [[1, 2, 3, 4, 5, 6, 7, 8]], {8}),
        ([0, 2, 3, 4, 5, 6, 7], [[1, 2, 3, 4, 5, 6, 7, 8]], set()),
        ([2, 3, 4, 5, 6, 7], [[1, 2, 3, 4, 5, 6, 7, 8]], set()),
        ([9, 9, 9, *range(1, 8)], [[*range(n, 9)] for n in range(1, 8)], {8}),
        ([1, 2], [[2, V - 1], [2, 0]], {0, V - 1}),
        ([1, 2], [], set()),
    ],
)
def test_bad_words_by_hand(row, words, expected):
    """Alike if the word starts within the prompt or was drawn from its first token."""
    for n_prompt in range(1, len(row) + 1):
        h = history_of([row[:n_prompt]] * B, [row[n_prompt:]] * B)
        out = bad_words(LOGITS, h.tokens_BS, h.length_B, words_array([words] * B))
        for i in range(B):
            assert set(np.flatnonzero(~kept(out)[i])) == expected
    assert completing(row, words) == expected


@pytest.mark.parametrize("alphabet", [1, 2, 3])
def test_bad_words_of_each_row_its_own(alphabet):
    rng = np.random.default_rng(alphabet)
    for _ in range(20):
        prompts, drawn = random_rows(rng, alphabet=alphabet)
        words = [random_words(rng, alphabet) for _ in range(B)]
        h = history_of(prompts, drawn)
        out = bad_words(LOGITS, h.tokens_BS, h.length_B, words_array(words))
        for i, (prompt, new) in enumerate(zip(prompts, drawn, strict=True)):
            expected = LOGITS[i].copy()
            expected[list(completing([*prompt, *new], words[i]))] = OUT
            np.testing.assert_array_equal(out[i], expected)


def test_a_bad_word_of_the_first_token_alone():
    s = Sampling.create(B, V).replace(bad_words_BWL=words_array([[[0, 0]]] * B))
    out = edit(LOGITS, history_of([[0], [1], [0, 1], [1, 0]], [[]] * B), s)
    assert (~kept(out)).sum(-1).tolist() == [1, 0, 0, 1]
    assert (~kept(out))[:, 0].tolist() == [True, False, False, True]


def test_only_tokens_that_the_state_allows():
    table = random_table(np.random.default_rng(0))
    state = np.array([2, 0, 1, 2], np.int32)
    history = history_of([[1]] * B, [[]] * B, state=state)
    out = edit(LOGITS, history, Sampling.create(B, V), table)
    np.testing.assert_array_equal(out, np.where(table[state] >= 0, LOGITS, OUT))


def test_ends_wait_for_the_minimum_of_new_tokens():
    s = Sampling.create(B, V).replace(
        min_new_tokens_B=np.array([3, 3, 0, 1], np.int32),
        ends_BV=np.arange(V) == np.array([[7], [8], [9], [10]]),
    )
    history = history_of([[1, 2, 3, 4]] * B, [[5, 6], [5, 6, 7], [], []])
    expected = LOGITS.copy()
    expected[0, 7] = expected[3, 10] = OUT
    np.testing.assert_array_equal(edit(LOGITS, history, s), expected)


def test_bias_is_added():
    bias = np.random.default_rng(1).normal(0, 5, (B, V)).astype(np.float32)
    bias[:, 3] = OUT
    out = edit(LOGITS, history_of([[1]] * B, [[]] * B), Sampling.create(B, V))
    np.testing.assert_array_equal(out, LOGITS)
    s = Sampling.create(B, V).replace(bias_BV=bias)
    out = edit(LOGITS, history_of([[1]] * B, [[]] * B), s)
    np.testing.assert_array_equal(out, LOGITS + bias)


@pytest.mark.parametrize("with_table", [False, True])
def test_edits_in_order(with_table):
    rng = np.random.default_rng(3)
    table = random_table(rng)
    for _ in range(25):
        prompts, drawn = random_rows(rng)
        s, state = mixture(rng), rng.integers(0, 3, B).astype(np.int32)
        history = history_of(prompts, drawn, state=state)
        out = edit(LOGITS, history, s, table if with_table else None)
        for i in range(B):
            allowed = table[state[i]] >= 0 if with_table else None
            expected = reference_edits(LOGITS[i], prompts[i], drawn[i], s, i, allowed)
            check(out[i], expected)


def test_penalties_that_overflow_forbid_nothing_and_stay_numbers():
    """Of three tokens all were drawn twice; the last one is out."""
    logits = jnp.array([[3e38, -3e38, -jnp.inf, 1.0]])
    counts = jnp.array([[2, 2, 2, 0]])
    seen = counts > 0
    greatest = np.finfo(np.float32).max
    for penalty, first, second in ((0.1, greatest, -3e37), (10.0, 3e37, -greatest)):
        out = penalize_repetition(logits, seen, floats(penalty))
        np.testing.assert_allclose(out, [[first, second, -np.inf, 1]], rtol=1e-6)
    for x, end in ((3e38, -greatest), (-3e38, greatest)):
        out = penalize_counts(logits, counts, floats(0), floats(x))
        np.testing.assert_allclose(out, [[end, end, -np.inf, 1]], rtol=1e-6)


def test_bias_then_repetition_then_presence_penalty():
    s = Sampling.create(B, V, repetition_penalty=2.0, presence_penalty=1.0)
    s.bias_BV[:] = 5
    logits = np.full((B, V), -1, np.float32)
    out = edit(logits, history_of([[1]] * B, [[2]] * B), s)
    np.testing.assert_array_equal(out[:, :3], [[4, 2, 1]] * B)


def test_padding_does_not_matter():
    """Nor the size of the buffer: rows are of 1 to 20 tokens."""
    rng = np.random.default_rng(4)
    for _ in range(10):
        prompts, drawn = random_rows(rng)
        s = mixture(rng)
        expected = edit(LOGITS, history_of(prompts, drawn), s)
        for padding in (0, 3, V - 1, V, -1, -2, rng.integers(0, 4, (B, S))):
            out = edit(LOGITS, history_of(prompts, drawn, padding=padding), s)
            np.testing.assert_array_equal(out, expected)
        out = edit(LOGITS, history_of(prompts, drawn, size=2 * S, padding=2), s)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("with_table", [False, True])
def test_append_is_what_a_longer_row_is(with_table):
    rng = np.random.default_rng(5)
    table = random_table(rng) if with_table else None
    prompts, state = [[1, 2], [3], [4, 4, 4], [0]], np.zeros(B, np.int32)
    drawn = [[] for _ in prompts]
    history = start = history_of(prompts, drawn, padding=0)
    for _ in range(20):
        token, grown = rng.integers(0, V, B).astype(np.int32), rng.random(B) < 0.6
        for i in np.flatnonzero(grown):
            if table is not None:
                token[i] = rng.choice(np.flatnonzero(table[state[i]] >= 0))
                state[i] = table[state[i], token[i]]
            drawn[i].append(token[i])
        history = append(history, token, grown, table)
    expected = history_of(prompts, drawn, padding=0, state=state)
    jax.tree.map(np.testing.assert_array_equal, history, expected)
    assert len({len(new) for new in drawn}) > 1
    assert not with_table or len(set(state.tolist())) > 1
    still = append(start, token, np.zeros(B, bool), table)
    jax.tree.map(np.testing.assert_array_equal, still, start)


def test_append_to_a_full_buffer_overwrites_nothing():
    history = history_of([list(range(S))], [[]])
    out = append(history, np.array([40], np.int32), np.array([True]), None)
    np.testing.assert_array_equal(out.tokens_BS, history.tokens_BS)
    assert (out.n_new_B[0], out.counts_BV[0, 40]) == (1, 1)


# --- Filters --------------------------------------------------------------------------


def check_filter(keep, reference, logits, values, dtype=np.float32):
    values = np.broadcast_to(np.array(values, dtype), B)
    out = np.asarray(keep(logits, values))
    for i in range(B):
        expected = reference(logits[i].astype(np.float64), values[i].item())
        np.testing.assert_array_equal(out[i], expected)


@pytest.mark.parametrize("k", [1, 2, 7, V - 1, V, V + 5, 2**31 - 1])
def test_top_k_keeps_the_k_largest(k):
    check_filter(top_k, reference_top_k, LOGITS, k, np.int32)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.998])
def test_top_p_keeps_the_token_that_crosses_p(p):
    check_filter(top_p, reference_top_p, LOGITS, p)


@pytest.mark.parametrize("p", [1e-6, 0.001, 0.03, 0.5, 0.999])
def test_min_p_keeps_what_is_near_enough_to_the_most_probable(p):
    check_filter(min_p, reference_min_p, LOGITS, p)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.998])
def test_typical_p_keeps_what_is_nearest_to_the_mean_surprise(p):
    check_filter(typical_p, reference_typical_p, LOGITS, p)


def test_top_p_by_hand():
    logits = log(0.5, 0.3, 0.15, 0.05)
    for p, n in [(0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)]:
        out = top_p(logits, floats(p))
        assert kept(out)[0].tolist() == (np.arange(4) < n).tolist()


def test_min_p_by_hand():
    logits = log(0.5, 0.3, 0.15, 0.05)
    for p, n in [(0, 4), (0.05, 4), (0.11, 3), (0.29, 3), (0.31, 2), (0.61, 1), (1, 1)]:
        assert kept(min_p(logits, floats(p)))[0].sum() == n


def test_typical_p_by_hand():
    """Surprises of 1, 2, 3, 3 bits, 1.75 in the mean: the second token is nearest."""
    logits = log(0.5, 0.25, 0.125, 0.125)
    for p, expected in [
        (0.01, [False, True, False, False]),
        (0.24, [False, True, False, False]),
        (0.26, [True, True, False, False]),
        (0.74, [True, True, False, False]),
        (0.76, [True, True, True, True]),  # equals stay together
        (1.0, [True, True, True, True]),
    ]:
        assert kept(typical_p(logits, floats(p)))[0].tolist() == expected


def test_equals_stay_together():
    logits = log(0.1, 0.3, 0.1, 0.3, 0.2)
    largest = [False, True, False, True, False]
    assert kept(top_k(logits, np.array([1])))[0].tolist() == largest
    assert kept(top_p(logits, floats(0.2)))[0].tolist() == largest
    assert kept(min_p(logits, floats(1)))[0].tolist() == largest
    assert kept(top_k(logits, np.array([4])))[0].all()
    assert kept(top_p(logits, floats(0.9)))[0].all()


@pytest.mark.parametrize("value", [-100.0, -1e-3, 0.7, 30.0])
def test_neighbours_among_floats_are_told_apart(value):
    row = [value, np.nextafter(np.float32(value), np.float32(np.inf)), value - 1]
    assert kept(top_k(floats(row), np.array([1])))[0].tolist() == [False, True, False]


def test_zeros_of_either_sign_are_equals():
    logits = floats([0.0, -0.0, -1.0])
    assert kept(top_k(logits, np.array([1])))[0].tolist() == [True, True, False]


@pytest.mark.parametrize("scale", [0.1, 1, 10])
def test_filters_of_random_logits(scale):
    rng = np.random.default_rng(int(10 * scale))
    for _ in range(25):
        logits = rng.normal(rng.choice([0, -100]), scale, (B, V)).astype(np.float32)
        logits[rng.random((B, V)) < rng.choice([0, 0.3, 0.9])] = OUT
        logits[:, 0] = 0
        check_filter(top_k, reference_top_k, logits, rng.integers(1, V, B), np.int32)
        for keep, reference in (
            (top_p, reference_top_p),
            (min_p, reference_min_p),
            (typical_p, reference_typical_p),
        ):
            check_filter(keep, reference, logits, rng.uniform(0.01, 0.99, B))


ALL = [
    (top_k, np.array([0, 3, 0, 1], np.int32)),
    (top_p, floats(1, 0.5, 1, 0.1)),
    (min_p, floats(0, 0.5, 0, 1)),
    (typical_p, floats(1, 0.5, 1, 0.1)),
]


@pytest.mark.parametrize(("keep", "values"), ALL)
def test_off_is_the_identity_whatever_the_other_rows_ask_for(keep, values):
    for logits in (LOGITS, 1e-3 * LOGITS - 100, 30 * LOGITS):
        out = np.asarray(keep(logits, values))
        np.testing.assert_array_equal(out[[0, 2]], logits[[0, 2]])
    assert not kept(keep(LOGITS, values))[[1, 3]].all(-1).any()


def test_rows_without_options_keep_their_logits():
    rng = np.random.default_rng(6)
    off = Sampling.create(B, V)
    rows = np.array([True, False, True, False])
    for _ in range(10):
        history, on = history_of(*random_rows(rng)), mixture(rng)
        s = jax.tree.map(
            lambda a, b: np.where(rows.reshape(B, *[1] * (a.ndim - 1)), a, b), off, on
        )
        s.ends_BV[:] = on.ends_BV
        edited = np.asarray(edit(LOGITS, history, s))
        out = np.asarray(filtered(edited, s))
        np.testing.assert_array_equal(edited[rows], LOGITS[rows])
        np.testing.assert_array_equal(out[rows], LOGITS[rows])
        np.testing.assert_array_equal(edited[~rows], edit(LOGITS, history, on)[~rows])
        rest = ~rows & (s.temperature_B > 0)
        np.testing.assert_array_equal(out[rest], filtered(edited, on)[rest])


@pytest.mark.parametrize(("keep", "values"), ALL)
def test_tokens_that_are_out_stay_out(keep, values):
    logits = np.where(np.arange(V) < 10, LOGITS, OUT).astype(np.float32)
    weak = {top_k: 20, top_p: 0.99, min_p: 1e-30, typical_p: 0.99}[keep]
    for value in (values, np.full(B, weak, values.dtype)):
        out = keep(logits, value)
        assert not kept(out)[:, 10:].any()
        assert kept(out).any(-1).all()


def test_filters_in_order():
    """And a reference with two neighbours changed round gives another result."""
    rng = np.random.default_rng(7)
    order = list(FILTERS)
    swaps = [
        order[:i] + [order[i + 1], order[i]] + order[i + 2 :] for i in (1, 2, 3)
    ] + [order[1:] + order[:1]]  # the k largest are the same at each temperature
    seen = np.zeros(len(swaps), bool)
    for _ in range(40):
        s = mixture(rng)
        out = filtered(LOGITS, s)
        for i in np.flatnonzero(s.temperature_B):
            options = options_of(s, i)
            expected = reference_filters(LOGITS[i], options)
            np.testing.assert_array_equal(kept(out[i]), kept(expected))
            # As distributions: a constant added to a row is of no consequence. Logits
            # of about 10 / 0.3 are off by 2e-6, which is that factor on a probability.
            probs = softmax(np.asarray(out[i], np.float64))
            np.testing.assert_allclose(probs, softmax(expected), rtol=0, atol=2e-6)
            seen |= [
                (kept(reference_filters(LOGITS[i], options, swap)) != kept(expected))
                .any()
                .item()
                for swap in swaps
            ]
    assert seen.all()


def test_top_k_then_top_p_then_min_p_by_hand():
    logits = log(0.4, 0.3, 0.2, 0.1)
    out = filtered(logits, Sampling.create(1, 4, top_k=2, top_p=0.5))
    assert kept(out)[0].tolist() == [True, False, False, False]  # 0.4 / 0.7 > 0.5
    out = filtered(logits, Sampling.create(1, 4, top_p=0.5, min_p=0.6))
    assert kept(out)[0].tolist() == [True, True, False, False]
    out = filtered(logits, Sampling.create(1, 4, top_p=0.5, temperature=0.5))
    assert kept(out)[0].tolist() == [True, False, False, False]  # 0.16 / 0.3 > 0.5


EXTREME = {
    "large": np.sign(LOGITS) * np.float32(1e30),
    "largest": np.sign(LOGITS) * np.finfo(np.float32).max,
    "far apart": LOGITS * np.float32(1e4),
    "all large and negative": np.full((B, V), -1e30, np.float32),
    "all equal": np.zeros((B, V), np.float32),
    "one finite": np.where(np.arange(V) == 9, LOGITS, OUT).astype(np.float32),
    "tiny": LOGITS * np.float32(1e-30),
}


@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits(name):
    logits, rng = EXTREME[name], np.random.default_rng(8)
    largest = logits == logits.max(-1, keepdims=True)
    for keep, values in [(k, np.full(B, v[3])) for k, v in ALL]:
        out = np.asarray(keep(logits, values))
        assert kept(out).any(-1).all()
        assert np.isin(out[kept(out)], logits).all()
        assert keep is typical_p or (kept(out) & largest).any(-1).all()
    for _ in range(10):
        s = mixture(rng)
        edited = np.asarray(edit(logits, history_of(*random_rows(rng)), s))
        assert not np.isnan(edited).any()
        out, token = filtered(logits, s), np.asarray(draw(logits, s, KEYS))
        assert not np.isnan(out).any()
        assert kept(out).any(-1).all()
        assert not kept(out)[~kept(logits)].any()
        assert (kept(out) | (s.temperature_B == 0)[:, None])[range(B), token].all()
        assert kept(logits)[range(B), token].all()


# --- Draws ----------------------------------------------------------------------------


def test_temperature_zero_is_the_argmax_for_every_filter():
    for k, p, m, t in itertools.product([0, 1, 5], [1, 1e-4], [0, 1], [1, 0.01]):
        values = dict(top_k=k, top_p=p, min_p=m, typical_p=t)
        s = Sampling.create(B, V, temperature=0.0, **values)
        np.testing.assert_array_equal(filtered(LOGITS, s), LOGITS)
        np.testing.assert_array_equal(draw(LOGITS, s, KEYS), LOGITS.argmax(-1))


def test_temperature_zero_is_the_argmax_of_edited_logits():
    rng = np.random.default_rng(9)
    for _ in range(20):
        prompts, drawn = random_rows(rng)
        s = mixture(rng).replace(temperature_B=np.zeros(B, np.float32))
        out = draw(edit(LOGITS, history_of(prompts, drawn), s), s, KEYS)
        for i in range(B):
            expected = reference_edits(LOGITS[i], prompts[i], drawn[i], s, i)
            assert out[i] == expected.argmax()


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-30, 1e-37, 1e-38, 1e-45])
@pytest.mark.parametrize("shift", [0, -100])
def test_a_temperature_near_zero_is_the_argmax(temperature, shift):
    """Logits of GPT-2 lie about -100: divided by this, none is left in float32."""
    logits = LOGITS + np.float32(shift)
    for p in (0, 0.1):
        s = Sampling.create(B, V, temperature=temperature, min_p=p)
        np.testing.assert_array_equal(draw(logits, s, KEYS), logits.argmax(-1))


@pytest.mark.parametrize("p", [1e-30, 1e-38, 1e-45, 1e-60])
@pytest.mark.parametrize("keep", [top_p, typical_p])
def test_a_p_near_zero_keeps_one_token(keep, p):
    """float32 has no such number, or its arithmetic takes it for 0."""
    out = keep(LOGITS, np.full(B, p).astype(np.float32))
    np.testing.assert_array_equal(kept(out).sum(-1), np.ones(B))


N = 60_000
PROBS = np.array([0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.04, 0.01])


@pytest.fixture(scope="module")
def draws():
    """N draws from PROBS in each of seven rows, each with its own options."""
    s = Sampling.create(7, len(PROBS)).replace(
        temperature_B=floats(1, 0.5, 1, 1, 1, 1, 1.5),
        top_k_B=np.array([0, 0, 3, 0, 0, 0, 6], np.int32),
        top_p_B=floats(1, 1, 1, 0.7, 1, 1, 0.8),
        min_p_B=floats(0, 0, 0, 0, 0.35, 0, 0.1),
        typical_p_B=floats(1, 1, 1, 1, 1, 0.5, 0.95),
    )
    logits = np.log(np.tile(PROBS, (7, 1))).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), (N, 7))
    tokens = jax.jit(jax.vmap(sample, in_axes=(None, None, 0)))(logits, s, keys)
    return s, logits, np.asarray(tokens)


@pytest.mark.parametrize(
    ("row", "n_kept"), [(0, 8), (1, 8), (2, 3), (3, 4), (4, 4), (5, 4), (6, 5)]
)
def test_draws_follow_the_distribution(draws, row, n_kept):
    """Of what the filters leave, renormalised."""
    s, logits, tokens = draws
    probs = softmax(reference_filters(logits[row], options_of(s, row)))
    counts = np.bincount(tokens[:, row], minlength=len(PROBS))
    left = probs > 0
    assert left.sum() == n_kept
    assert not counts[~left].any()
    expected = N * probs[left]
    chi_square = ((counts[left] - expected) ** 2 / expected).sum()
    # 99.9% quantile at n_kept - 1 degrees of freedom
    assert chi_square < {3: 13.8, 4: 16.3, 5: 18.5, 8: 24.3}[n_kept]


def test_draws_from_a_vocabulary_of_several_lanes_follow_the_distribution():
    ids = np.array([0, 5, 127, 128, 133, 200, 256, 299])  # some of them share a lane
    logits = np.full((1, 300), OUT, np.float32)
    logits[0, ids] = np.log(PROBS) - 40
    keys = jax.random.split(jax.random.key(1), (N, 1))
    tokens = jax.jit(jax.vmap(draw_token, in_axes=(None, 0)))(logits, keys)
    counts = np.bincount(np.asarray(tokens)[:, 0], minlength=300)
    assert counts.sum() == counts[ids].sum()
    chi_square = ((counts[ids] - N * PROBS) ** 2 / (N * PROBS)).sum()
    assert chi_square < 24.3  # 99.9% quantile at 7 degrees of freedom


def test_rows_of_one_batch_have_their_own_options():
    s = Sampling.create(B, V).replace(
        temperature_B=floats(0, 1, 1, 1),
        top_k_B=np.array([0, 1, 0, 0], np.int32),
        top_p_B=floats(1, 1, 1e-6, 1),
    )
    keys = jax.random.split(jax.random.key(1), (20, B))
    tokens = np.stack([draw(LOGITS, s, key) for key in keys])
    assert (tokens[:, :3] == LOGITS.argmax(-1)[:3]).all()
    assert len(set(tokens[:, 3].tolist())) > 1


def test_a_row_depends_on_neither_its_mates_nor_its_slot():
    rng = np.random.default_rng(10)
    table = random_table(rng)
    keys = [jax.random.split(jax.random.key(i), B) for i in range(10)]

    def take(tree, rows):
        return jax.tree.map(lambda a: np.asarray(a)[rows], tree)

    def run(logits, history, s, key):
        logits = edit(logits, history, s, table)
        return np.asarray(filtered(logits, s)), np.asarray(draw(logits, s, key))

    for key in keys:
        history, s = history_of(*random_rows(rng)), mixture(rng)
        logits, token = run(LOGITS, history, s, key)
        order = rng.permutation(B)
        others = rng.normal(0, 30, (B, V)).astype(np.float32)
        for slot, row in enumerate(order):
            # Alone, and at another slot among rows with other options and logits.
            alone = run(*(take(t, [row]) for t in (LOGITS, history, s)), key[row][None])
            rows = rng.permutation(B)
            rows[slot] = row
            mates = np.where(np.arange(B)[:, None] == slot, LOGITS[row], others)
            moved = run(mates, take(history, rows), take(s, rows), key[rows])
            for at, (x, t) in ((0, alone), (slot, moved)):
                assert t[at] == token[row]
                if s.temperature_B[row]:  # else nothing is filtered
                    np.testing.assert_array_equal(x[at], logits[row])


def test_one_program_serves_every_mixture(compilations):
    rng = np.random.default_rng(11)
    table = random_table(rng)

    def run(s):
        history = history_of(*random_rows(rng))
        draw(edit(LOGITS, history, s), s, KEYS)
        draw(edit(LOGITS, history, s, table), s, KEYS)

    run(Sampling.create(B, V))
    with compilations() as n:
        for _ in range(20):
            run(mixture(rng))
        run(Sampling.create(B, V, temperature=0.0, top_k=3))
        assert n() == 0


# --- Options --------------------------------------------------------------------------


def test_created_options_are_off_but_for_those_named():
    s = Sampling.create(B, V, temperature=0.5, no_repeat_ngram_size=2)
    assert [options_of(s, i) for i in range(B)] == B * [
        dict(
            temperature=0.5,
            top_k=0,
            top_p=1,
            min_p=0,
            typical_p=1,
            repetition_penalty=1,
            presence_penalty=0,
            frequency_penalty=0,
            no_repeat_ngram_size=2,
            min_new_tokens=0,
        )
    ]
    assert s.bias_BV.shape == s.ends_BV.shape == (B, V)
    assert s.bad_words_BWL.shape == (B, *MIN_BAD_WORDS)
    assert not s.bias_BV.any()
    assert not s.ends_BV.any()
    assert (s.bad_words_BWL == -1).all()


def test_created_options_have_one_type_each():
    """Else another program would be compiled for a value of another type."""
    types = jax.tree.map(jnp.result_type, Sampling.create(B, V))
    given = Sampling.create(B, V, temperature=1, top_k=np.int64(3), min_p=True)
    assert jax.tree.map(jnp.result_type, given) == types


def test_an_option_that_does_not_exist_is_refused_by_name():
    with pytest.raises(TypeError, match="unknown sampling option 'top_q'"):
        Sampling.create(1, V, top_q=1, top_k=1)
