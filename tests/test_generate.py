import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax.cache import KVCache
from gpt2_jax.generate import bucket, check_ids, decode, generate, prefill
from gpt2_jax.model import GPT2
from gpt2_jax.sampling import Sampling
from shapes import TINY, random_params

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, TINY.vocab_size, n).tolist() for n in (5, 1, 17)]


def run(tiny, prompts, n, *, seed=0, eot_id=None, n_valid=None, **options):
    model, params = tiny
    return generate(
        model,
        params,
        prompts,
        max_new_tokens=n,
        sampling=Sampling.create(len(prompts), **options),
        seed=seed,
        eot_id=eot_id,
        n_valid=n_valid,
    )


def uncached_greedy(tiny, prompt, n):
    """The whole sequence anew for each token, right-padded to the context."""
    model, params = tiny
    apply = jax.jit(lambda p, t: model.apply({"params": p}, t)[0])
    ids = list(prompt)
    for _ in range(n):
        padded = np.zeros((1, TINY.n_positions), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(apply(params, padded)[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_cached_and_uncached_greedy_tokens_agree_up_to_the_last_position(tiny):
    n = TINY.n_positions - max(map(len, PROMPTS))
    out = run(tiny, PROMPTS, n, temperature=0.0)
    assert [len(o) for o in out] == [n] * 3
    for prompt, tokens in zip(PROMPTS, out, strict=True):
        assert tokens == uncached_greedy(tiny, prompt, n)
        single = run(tiny, [prompt], TINY.n_positions - len(prompt), temperature=0.0)
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


def test_nothing_is_compiled_for_another_prompt_seed_or_option(tiny, compilations):
    run(tiny, [PROMPTS[0]], 9, top_k=3)
    with compilations() as n:
        run(tiny, [PROMPTS[2]], 11, temperature=0.0)
        run(tiny, [PROMPTS[1]], 3, top_k=5, top_p=0.4, seed=9)
        run(tiny, [PROMPTS[0]], 9, repetition_penalty=1.3, temperature=2.0, eot_id=3)
        assert n() == 0
        run(tiny, PROMPTS[:2], 9)  # another batch size, to see that it counts
        assert n() >= 2


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


def test_a_row_ends_before_end_of_text_and_the_loop_with_the_last_row(tiny):
    free = run(tiny, PROMPTS, 40, temperature=0.0)
    eot = free[0][6]
    out = run(tiny, PROMPTS, 40, temperature=0.0, eot_id=eot)
    for tokens, all_tokens in zip(out, free, strict=True):
        end = all_tokens.index(eot) if eot in all_tokens else 40
        assert tokens == all_tokens[:end]

    model, params = tiny
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, :5] = PROMPTS[0]
    state = prefill(model, params, tokens, np.array([5]), np.uint32(0), 64)
    greedy = Sampling.create(1, temperature=0.0)
    state = decode(
        model, params, state, greedy, np.int32(40), np.int32(eot), np.int32(61)
    )
    first = free[0].index(eot)
    # the cache has gone no further than the last token that was kept
    assert int(state.cache.length_B[0]) == 5 + first


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
    strong = run(tiny, [[5, 6, 7]], 1, temperature=0.0, repetition_penalty=1e6)
    model, params = tiny
    logits = model.apply({"params": params}, np.array([[5, 6, 7]]))[0][0, -1]
    logits = np.asarray(logits).copy()
    logits[[5, 6, 7]] = np.where(logits[[5, 6, 7]] > 0, 0, -np.inf)
    assert strong[0] == [int(logits.argmax())]


def test_zero_new_tokens(tiny):
    assert run(tiny, PROMPTS, 0) == [[], [], []]


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        ([], 1, "no prompt given"),
        ([[]], 1, "prompt 0 is empty"),
        ([[1], [61]], 1, r"token id 61 is outside \[0, vocab_size=61\)"),
        ([[-1]], 1, r"token id -1 is outside"),
        ([[1.5]], 1, "token ids must be integers, not float64"),
        ([[1] * 60], 5, r"60 tokens \+ max_new_tokens=5 exceeds n_positions=64"),
        ([[1]], -1, "max_new_tokens=-1 must be >= 0"),
        ([[1]], 1.5, "max_new_tokens=1.5 must be an integer"),
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


def test_check_ids_takes_arrays():
    check_ids(np.array([[0, 60]]), 61)
    with pytest.raises(ValueError, match="token id 99"):
        check_ids(np.array([[0, 99]]), 61)
