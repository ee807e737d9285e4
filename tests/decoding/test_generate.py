import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.cache import KVCache
from gpt2_jax.decoding.buckets import bucket
from gpt2_jax.decoding.generate import generate
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.requests import Request
from gpt2_jax.decoding.scheduler import Decoder
from gpt2_jax.decoding.speculative import Draft
from gpt2_jax.model import GPT2
from gpt2_jax.runtime import sharding
from shapes import TINY, random_params

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, TINY.vocab_size, n).tolist() for n in (5, 1, 17)]
GREEDY = dict(temperature=0.0)


@partial(jax.jit, static_argnums=0)
def whole_logits(model, params, tokens):
    return model.apply({"params": params}, tokens)[0]


def run(tiny, prompts, n, *, seed=0, end_ids=(), n_valid=None, **options):
    model, params = tiny
    options = Options(max_new_tokens=n, **options)
    return generate(
        model, params, prompts, options, seed=seed, end_ids=end_ids, n_valid=n_valid
    )


def finished(decoder, requests, **kwargs):
    """The rows of all requests, in their order."""
    done = {r.index: r for rows in decoder.run(requests, **kwargs) for r in rows}
    return [done[i] for i in sorted(done)]


def uncached_greedy(tiny, prompt, n):
    """The whole sequence anew for each token, right-padded to the context."""
    model, params = tiny
    ids = list(prompt)
    for _ in range(n):
        padded = np.zeros((1, TINY.n_positions), np.int32)
        padded[0, : len(ids)] = ids
        logits = whole_logits(model, params, padded)
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_cached_and_uncached_greedy_tokens_agree_up_to_the_last_position(tiny):
    n = TINY.n_positions - max(map(len, PROMPTS))
    out = run(tiny, PROMPTS, n, **GREEDY)
    assert [len(o) for o in out] == [n] * 3
    for prompt, tokens in zip(PROMPTS, out, strict=True):
        assert tokens == uncached_greedy(tiny, prompt, n)
        single = run(tiny, [prompt], TINY.n_positions - len(prompt), **GREEDY)
        assert single[0] == uncached_greedy(
            tiny, prompt, TINY.n_positions - len(prompt)
        )


def test_cached_logits_equal_those_of_the_whole_sequence(tiny):
    model, params = tiny
    tokens = RNG.integers(0, TINY.vocab_size, (3, TINY.n_positions))
    whole, _ = jax.jit(model.apply)({"params": params}, tokens)
    length = np.array([5, 1, 17])
    step = jax.jit(lambda p, t, c: model.apply({"params": p}, t, c))
    cache = KVCache.empty(TINY, 3, TINY.n_positions, jnp.float32)
    # ragged: rows are filled to 5, 1 and 17 tokens, garbage behind them
    garbled = np.where(np.arange(17) < length[:, None], tokens[:, :17], 60)
    logits, cache = step(params, garbled, cache)
    rows = np.arange(3)
    # float32 sums in another order, logits of size 10
    np.testing.assert_allclose(
        logits[rows, length - 1], whole[rows, length - 1], atol=1e-5
    )
    cache = cache.replace(length_B=jnp.asarray(length))
    for i in range(TINY.n_positions - 17):
        at = length + i
        logits, cache = step(params, tokens[rows, at][:, None], cache)
        np.testing.assert_allclose(logits[:, 0], whole[rows, at], atol=1e-5)
    assert int(cache.length_B[2]) == TINY.n_positions


def test_the_cache_grows_with_the_text_and_long_prompts_go_in_chunks():
    cfg = dataclasses.replace(TINY, n_positions=1000, n_layer=2)
    long = GPT2(cfg), random_params(cfg, 0.2)
    prompts = [RNG.integers(0, 61, n).tolist() for n in (700, 120, 512, 3)]
    out = run(long, prompts, 140, **GREEDY)
    for prompt, tokens in zip(prompts, out, strict=True):
        whole = np.array([prompt + tokens])
        logits, _ = jax.jit(long[0].apply)({"params": long[1]}, whole)
        expected = np.asarray(logits)[0, len(prompt) - 1 : -1].argmax(-1)
        assert tokens == expected.tolist()


def test_nothing_is_compiled_for_another_prompt_seed_or_option(tiny, compilations):
    run(tiny, [PROMPTS[0]], 9, top_k=3)
    with compilations() as n:
        run(tiny, [PROMPTS[2]], 11, **GREEDY)
        run(tiny, [PROMPTS[1]], 3, top_k=5, top_p=0.4, seed=9)
        run(tiny, [PROMPTS[0]], 9, repetition_penalty=1.3, temperature=2.0)
        run(tiny, [PROMPTS[0]], 9, min_p=0.1, typical_p=0.9, end_ids=[3])
        run(tiny, [PROMPTS[0]], 9, presence_penalty=1.0, frequency_penalty=0.5)
        run(tiny, [PROMPTS[0]], 9, no_repeat_ngram_size=2, logit_bias={3: 1.0})
        run(tiny, [PROMPTS[0]], 9, allowed_tokens=[1, 2, 3], min_new_tokens=4)
        assert n() == 0
        run(tiny, PROMPTS[:2], 9)  # another batch size, to see that it counts
        assert n() >= 2


def broken(params, value):
    """With one row of wte that makes one logit infinite, or with NaN in all."""
    params = jax.tree.map(lambda x: x, params)
    if np.isnan(value):
        params["ln_f"]["bias"] = params["ln_f"]["bias"].at[3].set(value)
    else:
        wte = params["wte"]["embedding"]
        params["wte"]["embedding"] = wte.at[60].set(3e38 * np.sign(wte[60]))
    return params


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_end_it_with_an_error(tiny, value):
    model, params = tiny
    for options in (GREEDY, {"top_k": 3}):
        with pytest.raises(ValueError, match="prompt 0: the model's logits are not"):
            run((model, broken(params, value)), [PROMPTS[0]], 9, **options)


def test_seeds_reproduce_and_differ(tiny):
    first = run(tiny, PROMPTS, 20, seed=1)
    assert first == run(tiny, PROMPTS, 20, seed=1)
    assert first != run(tiny, PROMPTS, 20, seed=2)
    twice = run(tiny, [PROMPTS[0]] * 2, 20)
    assert twice[0] != twice[1]


def test_a_row_does_not_depend_on_its_batch_mates(tiny):
    alone = run(tiny, PROMPTS[:1], 20, top_k=20)
    for mates in (PROMPTS[1:], [PROMPTS[2]], [[7] * 9]):
        assert run(tiny, PROMPTS[:1] + mates, 20, top_k=20)[0] == alone[0]


def requests(n, **options):
    """Of different prompts, lengths and options, each with draws of its own."""
    rng = np.random.default_rng(1)
    made = []
    for i in range(n):
        own = dict(max_new_tokens=int(rng.integers(1, 30)), **options)
        own.setdefault("temperature", [0.0, 1.0, 0.7][i % 3])
        own.setdefault("repetition_penalty", [1.0, 1.3][i % 2])
        prompt = rng.integers(0, 61, int(rng.integers(1, 30))).tolist()
        made.append(Request(prompt, Options(**own), (7, i, 0), end_ids=(5, 6)))
    return made


def test_a_freed_slot_takes_the_next_request_and_compiles_nothing(tiny, compilations):
    asked = requests(13)
    alone = [finished(Decoder(*tiny, n_slots=1, n_valid=61), [r])[0] for r in asked]
    assert {row.finish for row in alone} == {"stop", "length"}
    finished(Decoder(*tiny, n_slots=3, n_valid=61), asked[:5])
    with compilations() as n:
        decoder = Decoder(*tiny, n_slots=3, n_valid=61)
        together = finished(decoder, iter(asked))
        assert n() == 0
    for one, row in zip(alone, together, strict=True):
        assert (row.ids, row.finish) == (one.ids, one.finish)
        # float32 sums in another order, batched or not
        np.testing.assert_allclose(row.logprobs, one.logprobs, atol=1e-4)
    # fewer steps than one by one: the slots were kept busy
    assert decoder.steps < sum(len(row.ids) for row in alone) / 2


def test_log_probabilities_are_those_of_the_plain_model(tiny):
    model, params = tiny
    options = Options(
        max_new_tokens=12, temperature=0.3, top_k=4, logit_bias={9: 3.0}, logprobs=5
    )
    request = Request(PROMPTS[0], options, (0, 0, 0))
    [row] = finished(Decoder(*tiny, n_slots=1, n_valid=50, n_top=5), [request])
    whole = np.array([PROMPTS[0] + row.ids])
    logits = np.asarray(model.apply({"params": params}, whole)[0])[0, 4:-1, :50]
    logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    # float32 sums in another order, logits of size 10
    expected = logp[np.arange(12), row.ids]
    np.testing.assert_allclose(row.logprobs, expected, atol=1e-4)
    for top, row_logp in zip(row.top_logprobs, logp, strict=True):
        assert list(top) == np.argsort(-row_logp)[:5].tolist()
        np.testing.assert_allclose(
            list(top.values()), np.sort(row_logp)[::-1][:5], atol=1e-4
        )


def test_a_row_ends_before_an_end_and_the_loop_with_the_last_row(tiny):
    free = run(tiny, PROMPTS, 40, **GREEDY)
    eot = free[0][6]
    out = run(tiny, PROMPTS, 40, end_ids=[eot], **GREEDY)
    for tokens, all_tokens in zip(out, free, strict=True):
        end = all_tokens.index(eot) if eot in all_tokens else 40
        assert tokens == all_tokens[:end]
    decoder = Decoder(*tiny, n_slots=1, n_valid=61)
    options = Options(max_new_tokens=40, **GREEDY)
    [row] = finished(decoder, [Request(PROMPTS[0], options, (0, 0, 0), (eot,))])
    assert row.finish == "stop"
    # the first token comes of the prompt, the last step is that of the end
    assert decoder.steps == len(row.ids) == free[0].index(eot)
    held = run(tiny, PROMPTS[:1], 40, end_ids=[eot], min_new_tokens=20, **GREEDY)[0]
    assert len(held) >= 20
    assert eot not in held


def test_the_caller_may_end_a_row_after_a_token_that_it_waits_for(tiny):
    drawn = dict(max_new_tokens=30, temperature=2.0)
    [free] = run(tiny, PROMPTS[:1], 30, temperature=2.0)
    last = max(free, key=free.index)  # of all tokens the one that comes latest
    pause_V = np.arange(61) == last
    asked = [
        Request(PROMPTS[0], Options(**drawn), (0, 0, 0), (), (), p)
        for p in (pause_V, None)
    ]
    decoder = Decoder(*tiny, n_slots=2, n_valid=61)
    ids = {}
    for rows in decoder.run(asked):
        for row in rows:
            ids[row.index] = row.ids
            if row.index == 0 and row.ids[-1] == last:
                row.finish = "stop"
    assert ids == {0: free[: free.index(last) + 1], 1: free}
    assert decoder.steps == 29


@pytest.mark.parametrize(
    ("kind", "n_draft"),
    [
        ("prompt_lookup", 3),
        pytest.param("itself", 3, marks=pytest.mark.slow),
        ("another", 1),
    ],
)
def test_guesses_change_nothing_but_the_number_of_steps(tiny, kind, n_draft):
    model, params = tiny
    small = dataclasses.replace(TINY, n_layer=1, n_head=2)
    draft = {
        "prompt_lookup": Draft(n_draft),
        "itself": Draft(n_draft, model, params),
        "another": Draft(n_draft, GPT2(small), random_params(small, 0.2)),
    }[kind]
    # a text that repeats itself, beside others
    asked = requests(6, no_repeat_ngram_size=4)
    asked += requests(6, logit_bias={3: 20.0, 4: 19.0})
    plain = Decoder(model, params, n_slots=12, n_valid=61)
    expected = finished(plain, asked)
    decoder = Decoder(model, params, n_slots=12, n_valid=61, draft=draft)
    for row, one in zip(finished(decoder, asked), expected, strict=True):
        assert (row.ids, row.finish) == (one.ids, one.finish)
        np.testing.assert_allclose(row.logprobs, one.logprobs, atol=1e-4)
    if kind == "itself":
        # every guess is right
        longest = max(len(row.ids) for row in expected)
        assert decoder.steps <= -(-longest // (1 + n_draft)) + 1
    assert decoder.steps <= plain.steps


def test_guesses_leave_the_distribution_as_it_is(tiny):
    model, params = tiny
    small = dataclasses.replace(TINY, n_layer=1)
    draft = Draft(2, GPT2(small), random_params(small, 0.1))
    n, options = 600, Options(max_new_tokens=3, temperature=1.5)
    decoder = Decoder(model, params, n_slots=200, n_valid=61, draft=draft)
    asked = (Request([7, 3, 9], options, (3, i, 0)) for i in range(n))
    rows = finished(decoder, asked)
    # the third token's distribution, over all first and second ones
    pairs = np.array([[7, 3, 9, a, b] for a in range(61) for b in range(61)])
    logits = np.asarray(jax.jit(model.apply)({"params": params}, pairs)[0])
    p = np.asarray(jax.nn.softmax(logits.astype(np.float64) / 1.5, axis=-1))
    first, second = p[0, 2], p[::61, 3]
    third = np.einsum("a,ab,abc->c", first, second, p[:, 4].reshape(61, 61, 61))
    counts = np.bincount([row.ids[2] for row in rows], minlength=61)
    common = np.argsort(-third)[:12]
    expected = n * np.append(third[common], 1 - third[common].sum())
    seen = np.append(counts[common], n - counts[common].sum())
    chi_square = ((seen - expected) ** 2 / expected).sum()
    assert chi_square < 32.9  # 99.9% quantile at 12 degrees of freedom


def test_past_the_context_it_slides(tiny):
    model, params = tiny
    options = Options(max_new_tokens=300, overflow="slide", **GREEDY)
    [row] = finished(
        Decoder(*tiny, n_slots=1, n_valid=61), [Request(PROMPTS[2], options, (0, 0, 0))]
    )
    assert len(row.ids) == 300
    text = PROMPTS[2] + row.ids
    at, window = len(PROMPTS[2]), 0
    while at < len(text):
        # each time the context is full, the last half of it is the prompt
        end = min(window + TINY.n_positions, len(text))
        padded = np.zeros((1, TINY.n_positions), np.int32)
        padded[0, : end - window] = text[window:end]
        logits = np.asarray(whole_logits(model, params, padded))[0]
        expected = logits[at - window - 1 : end - window - 1].argmax(-1)
        assert text[at:end] == expected.tolist()
        at, window = end, end - TINY.n_positions // 2
    for draft in (Draft(3), Draft(2, *tiny)):
        decoder = Decoder(*tiny, n_slots=1, n_valid=61, draft=draft)
        again = Request(PROMPTS[2], options, (0, 0, 0))
        assert finished(decoder, [again])[0].ids == row.ids
    long = run(tiny, [text[:200]], 5, overflow="slide", **GREEDY)[0]
    expected = uncached_greedy(tiny, text[200 - TINY.n_positions // 2 : 200], 5)
    assert long == expected


def test_a_table_of_allowed_tokens_is_followed(tiny):
    # an even number, then an odd one, then 60 for ever
    table = np.full((3, 61), -1)
    table[0, 0:60:2] = 1
    table[1, 1:60:2] = 2
    table[2, 60] = 2
    options = Options(max_new_tokens=6, allowed_tokens=table, temperature=5.0)
    asked = [Request(p, options, (0, i, 0)) for i, p in enumerate(PROMPTS)]
    for draft in (Draft(0), Draft(3)):
        decoder = Decoder(
            *tiny, n_slots=3, n_valid=61, table_QV=options.table, draft=draft
        )
        for row in finished(decoder, asked):
            assert row.ids[0] % 2 == 0
            assert row.ids[1] % 2 == 1
            assert row.ids[2:] == [60] * 4


def test_a_row_that_may_say_nothing_more_is_exhausted(tiny):
    options = Options(max_new_tokens=9, allowed_tokens=[4, 8], no_repeat_ngram_size=1)
    request = Request([1, 2], options, (0, 0, 0))
    [row] = finished(Decoder(*tiny, n_slots=1, n_valid=61), [request])
    assert sorted(row.ids) == [4, 8]
    assert row.finish == "exhausted"


@pytest.mark.parametrize(
    ("shape", "n_draft"),
    [pytest.param((1, 1, 4), 0, marks=pytest.mark.slow), ((2, 2, 2), 2)],
)
def test_on_a_mesh_the_tokens_are_the_same(shape, n_draft):
    cfg = dataclasses.replace(TINY, vocab_size=64)
    model, params = GPT2(cfg), random_params(cfg, 0.2)
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = sharding.make_mesh(*shape, devices=devices)
    spread = jax.device_put(params, sharding.tree_shardings(params, mesh))
    asked = requests(9)
    expected = finished(Decoder(model, params, n_slots=4, n_valid=61), asked)
    draft = Draft(n_draft, *((model, spread) if n_draft else ()))
    decoder = Decoder(model, spread, n_slots=4, n_valid=61, mesh=mesh, draft=draft)
    for row, one in zip(finished(decoder, asked), expected, strict=True):
        assert (row.ids, row.finish) == (one.ids, one.finish)


def test_ids_of_a_padded_vocabulary_are_never_drawn():
    cfg = dataclasses.replace(TINY, vocab_size=128)
    untrained = GPT2(cfg), random_params(cfg, stddev=0.02)
    out = run(untrained, [[1]] * 250, 40, n_valid=61)
    drawn = np.concatenate(out)
    assert drawn.size == 10_000
    assert drawn.max() == 60  # all valid ids are within reach, and none beyond
    assert len(np.unique(drawn)) == 61


def test_finished_rows_and_the_penalty_see_the_prompt_only_where_it_is(tiny):
    # Token 0 pads the prompts; a penalty must not take it for seen.
    strong = run(tiny, [[5, 6, 7]], 1, repetition_penalty=1e6, **GREEDY)
    model, params = tiny
    logits = model.apply({"params": params}, np.array([[5, 6, 7]]))[0][0, -1]
    logits = np.asarray(logits).copy()
    logits[[5, 6, 7]] = np.where(logits[[5, 6, 7]] > 0, 0, -np.inf)
    assert strong[0] == [int(logits.argmax())]


def test_hundreds_of_ragged_prompts(tiny, monkeypatch):
    monkeypatch.setattr(
        "gpt2_jax.decoding.scheduler.PREFILL_TOKENS", 2048
    )  # groups of 64 rows
    lengths = RNG.integers(1, 30, 150)
    prompts = [RNG.integers(0, 61, n).tolist() for n in lengths]
    out = run(tiny, prompts, 4, **GREEDY)
    for i in (0, 63, 64, 127, 128, 149):
        assert out[i] == run(tiny, [prompts[i]], 4, **GREEDY)[0]


def test_zero_new_tokens(tiny):
    assert run(tiny, PROMPTS, 0) == [[], [], []]


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        ([], 1, "no prompt given"),
        ([[]], 1, "the prompt is empty"),
        ([[1], [61]], 1, r"token id 61 is outside \[0, vocab_size=61\)"),
        ([[-1]], 1, r"token id -1 is outside"),
        ([[1.5]], 1, "prompt 0: id=1.5 must be an integer"),
        ([[1] * 60], 5, r"60 tokens \+ max_new_tokens=5 exceeds n_positions=64"),
    ],
)
def test_bad_input_is_refused_before_anything_compiles(
    tiny, compilations, prompts, n, message
):
    with compilations() as count:
        with pytest.raises(ValueError, match=message):
            run(tiny, prompts, n)
        assert count() == 0


def test_buckets():
    lengths = [1, 31, 32, 33, 64, 65, 700, 1024]
    expected = [32, 32, 32, 64, 64, 128, 1000, 1000]
    assert [bucket(n, 1000) for n in lengths] == expected
    assert bucket(5, 16) == 16
