import itertools

import jax
import numpy as np
import pytest

from gpt2_jax.sampling import (
    Sampling,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    process_logits,
    sample,
)

V = 50
LOGITS = np.random.default_rng(0).normal(0, 3, (4, V)).astype(np.float32)
NONE_SEEN = np.zeros((4, V), bool)


draw = jax.jit(sample)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept(logits):
    return np.isfinite(np.asarray(logits))


def reference_top_p(logits, p):
    """By sorting: tokens until their sum reaches p, the one that crosses included."""
    keep = np.zeros_like(logits, bool)
    for row, probs in enumerate(softmax(logits.astype(np.float64))):
        order = np.argsort(-probs)
        n = np.searchsorted(np.cumsum(probs[order]), p) + 1
        keep[row, order[:n]] = True
    return keep


@pytest.mark.parametrize("k", [1, 2, 7, V - 1, V, V + 5])
def test_top_k_keeps_the_k_largest(k):
    out = np.asarray(keep_top_k(LOGITS, np.full(4, k)))
    order = np.argsort(-LOGITS, axis=-1)
    for row in range(4):
        expected = set(order[row, :k].tolist())
        assert set(np.flatnonzero(kept(out[row])).tolist()) == expected
    np.testing.assert_array_equal(out[kept(out)], LOGITS[kept(out)])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_token_that_crosses_p(p):
    out = keep_top_p(LOGITS, np.full(4, p, np.float32))
    np.testing.assert_array_equal(kept(out), reference_top_p(LOGITS, p))


def test_top_p_by_hand():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    for p, n in [(0.4, 1), (0.6, 2), (0.79, 2), (0.81, 3), (0.96, 4), (1.0, 4)]:
        assert kept(keep_top_p(logits, np.array([p], np.float32))).sum() == n


def test_off_is_the_identity_whatever_the_other_rows_ask_for():
    k = np.array([0, 3, 0, 1])
    p = np.array([1.0, 0.5, 1.0, 0.1], np.float32)
    for out in (keep_top_k(LOGITS, k), keep_top_p(LOGITS, p)):
        np.testing.assert_array_equal(out[0], LOGITS[0])
        np.testing.assert_array_equal(out[2], LOGITS[2])
        assert not kept(out[1]).all()


def test_tokens_that_are_out_stay_out():
    logits = np.where(np.arange(V) < 10, LOGITS, -np.inf).astype(np.float32)
    for out in (
        keep_top_k(logits, np.full(4, 20)),
        keep_top_p(logits, np.full(4, 0.99, np.float32)),
    ):
        assert not kept(out)[:, 10:].any()
        assert kept(out).any(-1).all()


def test_repetition_penalty_by_hand():
    logits = np.array([[2.0, -2.0, 1.0, 0.0]], np.float32)
    seen = np.array([[True, True, False, True]])
    out = penalize_repetition(logits, seen, np.array([2.0], np.float32))
    np.testing.assert_array_equal(out, [[1.0, -4.0, 1.0, 0.0]])


def test_the_order_is_penalty_temperature_top_k_top_p():
    seen = LOGITS > 2
    s = Sampling.create(4, temperature=0.5, top_k=8, top_p=0.7, repetition_penalty=1.5)
    x = np.where(seen, np.where(LOGITS > 0, LOGITS / 1.5, LOGITS * 1.5), LOGITS) / 0.5
    kth = np.sort(x, -1)[:, -8][:, None]
    x = np.where(x >= kth, x, -np.inf)
    expected = np.where(reference_top_p(x, 0.7), x, -np.inf)
    out = np.asarray(process_logits(LOGITS, seen, s))
    np.testing.assert_array_equal(kept(out), kept(expected))
    # two roundings in float32 of values up to 20
    np.testing.assert_allclose(out[kept(out)], expected[kept(out)], rtol=1e-6)


def test_temperature_zero_is_the_argmax_for_every_top_k_and_top_p():
    keys = jax.random.split(jax.random.key(0), 4)
    for k, p in itertools.product([0, 1, 5], [1.0, 0.5, 1e-4]):
        s = Sampling.create(4, temperature=0.0, top_k=k, top_p=p)
        out = draw(LOGITS, NONE_SEEN, s, keys)
        np.testing.assert_array_equal(out, LOGITS.argmax(-1))


def test_draws_follow_the_distribution():
    n = 200_000
    probs = np.array([0.4, 0.3, 0.2, 0.06, 0.04])
    logits = np.broadcast_to(np.log(probs).astype(np.float32), (n, 5))
    keys = jax.random.split(jax.random.key(0), n)
    s = Sampling.create(n)
    draws = draw(logits, np.zeros((n, 5), bool), s, keys)
    counts = np.bincount(draws, minlength=5)
    chi_square = ((counts - n * probs) ** 2 / (n * probs)).sum()
    assert chi_square < 18.5  # 99.9% quantile at 4 degrees of freedom


def test_rows_of_one_batch_have_their_own_options():
    s = Sampling(
        temperature=np.array([0.0, 1.0, 1.0, 1.0], np.float32),
        top_k=np.array([0, 1, 0, 0], np.int32),
        top_p=np.array([1.0, 1.0, 1e-6, 1.0], np.float32),
        repetition_penalty=np.ones(4, np.float32),
    )
    draws = np.stack(
        [
            draw(LOGITS, NONE_SEEN, s, jax.random.split(jax.random.key(i), 4))
            for i in range(20)
        ]
    )
    assert (draws[:, :3] == LOGITS.argmax(-1)[:3]).all()
    assert len(set(draws[:, 3].tolist())) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be finite and >= 0"),
        ({"temperature": float("nan")}, "temperature=nan must be finite"),
        ({"temperature": float("inf")}, "temperature=inf must be finite"),
        ({"top_k": -1}, "top_k=-1 must be an integer >= 0"),
        ({"top_k": 1.5}, "top_k=1.5 must be an integer >= 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 must be in \(0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be finite and > 0"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling.create(1, **options)
