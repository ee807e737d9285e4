"""The state of decoding on the devices, and how rows are written into it."""

import dataclasses
from collections.abc import Callable, Sequence

import flax.struct
import jax
import numpy as np

from gpt2_jax.cache import KVCache
from gpt2_jax.decoding.buckets import power_of_two
from gpt2_jax.decoding.requests import Continuation, Request
from gpt2_jax.decoding.sampling import MIN_BAD_WORDS, History, Sampling

RUNNING, STOP, LENGTH, EXHAUSTED, NOT_FINITE = range(5)
FINISH_REASONS = ("", "stop", "length", "exhausted")


class DecodeState(flax.struct.PyTreeNode):
    """All that a decoding step reads and writes, one row along each first axis."""

    history: History
    sampling: Sampling
    pause_BV: jax.Array  # bool: tokens after which the loop returns to the host
    limit_B: jax.Array  # int32: a row ends with so many new tokens
    finish_B: jax.Array  # int32: RUNNING, or why the row ended
    draw_B3: jax.Array  # uint32: seed, row, sequence
    logprob_BS: jax.Array  # float32, log-probabilities of the new tokens
    top_BSN: jax.Array  # int32: the N most probable tokens in the place of each
    top_logprob_BSN: jax.Array  # float32
    cache: KVCache  # keys and values of all tokens but the last
    draft_cache: KVCache | None  # the same, of the draft model

    def rewind_caches(self) -> "DecodeState":
        """The state whose caches hold all tokens but the last.

        What they hold beyond that is overwritten before it is attended to.
        """
        length_B = self.history.length_B - 1
        draft = self.draft_cache and self.draft_cache.replace(length_B=length_B)
        return self.replace(
            cache=self.cache.replace(length_B=length_B), draft_cache=draft
        )


def pad_windows(
    rows: Sequence[Continuation], batch: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the rows, int32 [batch, size], padded on the right, and their lengths.

    Rows beyond `rows` are empty.
    """
    tokens_BS = np.zeros((batch, size), np.int32)
    length_B = np.zeros(batch, np.int32)
    for b, row in enumerate(rows):
        length_B[b] = row.length
        tokens_BS[b, : row.length] = row.window
    return tokens_BS, length_B


def new_state(
    rows: Sequence[Continuation],
    cache: KVCache,
    draft_cache: KVCache | None,
    *,
    vocab_size: int,
    n_top: int,
    table_QV: np.ndarray | None,
    put: Callable[[np.ndarray], jax.Array],
) -> DecodeState:
    """The state of these rows; those of the caches beyond them have ended.

    Args:
      cache, draft_cache: on the devices, with the tokens of these rows in them.
      n_top, table_QV: as `scheduler.Decoder` has them.
      put: transfers an array with a row along its first axis to the devices.
    """
    B, size, V = cache.length_B.shape[0], cache.size, vocab_size
    tokens_BS, length_B = pad_windows(rows, B, size)
    n_new_B, limit_B, state_B = (np.zeros(B, np.int32) for _ in range(3))
    prompt_BV, pause_BV = (np.zeros((B, V), bool) for _ in range(2))
    counts_BV = np.zeros((B, V), np.int32)
    draw_B3 = np.zeros((B, 3), np.uint32)
    for b, row in enumerate(rows):
        request, prompt = row.request, row.request.prompt
        n_new_B[b] = len(row.ids)
        limit_B[b] = request.options.new_tokens(len(prompt))
        prompt_BV[b, prompt] = True
        np.add.at(counts_BV[b], row.ids, 1)
        if request.pause_V is not None:
            pause_BV[b, : len(request.pause_V)] = request.pause_V
        draw_B3[b] = request.draw
        if table_QV is not None:
            for i in row.ids:
                state_B[b] = table_QV[state_B[b], i]
    finish_B = np.where(n_new_B >= limit_B, LENGTH, RUNNING).astype(np.int32)
    sampling = batch_sampling([row.request for row in rows], B, V)
    return DecodeState(
        history=History(
            tokens_BS=put(tokens_BS),
            length_B=put(length_B),
            n_new_B=put(n_new_B),
            prompt_BV=put(prompt_BV),
            counts_BV=put(counts_BV),
            state_B=put(state_B),
        ),
        sampling=jax.tree.map(put, sampling),
        pause_BV=put(pause_BV),
        limit_B=put(limit_B),
        finish_B=put(finish_B),
        draw_B3=put(draw_B3),
        logprob_BS=put(np.zeros((B, size), np.float32)),
        top_BSN=put(np.zeros((B, size, n_top), np.int32)),
        top_logprob_BSN=put(np.zeros((B, size, n_top), np.float32)),
        cache=cache,
        draft_cache=draft_cache,
    )


def batch_sampling(
    requests: Sequence[Request], batch: int, vocab_size: int
) -> Sampling:
    """The options of a batch, a row for each request; all are off in further rows.

    A field NAME_B of `Sampling` is the option NAME of each row.
    """
    s = Sampling.create(batch, vocab_size)
    W, L = MIN_BAD_WORDS
    words = [[w for w in r.bad_words if len(w) > 1] for r in requests]
    W = power_of_two(max([W, *map(len, words)]))
    L = power_of_two(max([L, *(len(w) for row in words for w in row)]))
    bad_words_BWL = np.full((batch, W, L), -1, np.int32)
    for b, request in enumerate(requests):
        o = request.options
        for field in dataclasses.fields(Sampling):
            if field.name.endswith("_B"):
                getattr(s, field.name)[b] = getattr(o, field.name.removesuffix("_B"))
        if not o.draws:
            s.temperature_B[b] = 0
        bias_V = s.bias_BV[b]
        if o.allowed_ids is not None:
            bias_V[:] = -np.inf
            bias_V[o.allowed_ids] = 0
        for i, x in o.logit_bias.items():
            bias_V[i] += x
        bias_V[[w[0] for w in request.bad_words if len(w) == 1]] = -np.inf
        s.ends_BV[b, list(request.end_ids)] = True
        for w, word in enumerate(words[b]):
            bad_words_BWL[b, w, L - len(word) :] = word
    return s.replace(bad_words_BWL=bad_words_BWL)
