"""Beam search: prefill, then one `while_loop` over a KV cache; tokens in, tokens out.

Shapes are bucketed and everything else is traced, as in programs.py. Beside the axes
of model.py: G prompts and M beams of each, whose B = G * M rows lie prompt by prompt.

What is searched for, and when a search ends, is what transformers 5 does
(`GenerationMixin._beam_search`), read for its semantics:

- The M best candidates of a step, among all tokens of all beams, are looked at. Those
  that end go into a pool of the M best finished hypotheses; the others don't.
- The M best candidates that do not end go on.
- A hypothesis scores sum(log p) / n**length_penalty, for n new tokens with the ending
  one. With max_new_tokens, everything ends.

One thing differs: what can't be (a beam before there are M, a token that is not
allowed) scores -inf rather than -1e9, so that it is never taken for a hypothesis.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.cache import KVCache
from gpt2_jax.decoding.buckets import bucket
from gpt2_jax.decoding.forward import NOT_FINITE_MESSAGE
from gpt2_jax.decoding.options import EARLY_STOPPING
from gpt2_jax.decoding.sampling import History, Sampling, edit_logits
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2
from gpt2_jax.ops.attention import cache_dtype


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One continuation of a prompt."""

    ids: list[int]  # new tokens, without the one that ended it
    score: float  # sum of the edited log-probabilities / n**length_penalty
    finish_reason: str  # "stop": by one of the ends; "length": by max_new_tokens
    logprobs: list[float]  # of each of `ids`, under the model's own distribution


def beam_search(
    model: GPT2,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num_beams: int,
    num_return_sequences: int,
    max_new_tokens: int | Sequence[int],
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    n_valid: int,
    table_QV: jax.Array | np.ndarray | None = None,
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt, best first.

    Args:
      prompts: G lists of ids in [0, n_valid), of any lengths >= 1.
      sampling: a row a prompt; only its edits of the logits are used, on
        log-probabilities that are not normalized again, and its ends.
      num_beams: M; 1 is greedy search: it stops with the first hypothesis.
      max_new_tokens: of all prompts, or of each.
      length_penalty: exponent of the length that divides a score; > 0 favours long
        hypotheses, as log-probabilities are negative.
      early_stopping: with M finished hypotheses a prompt's search ends at once (True);
        or once the best beam would score no better than the worst of them if it ended
        now (False: a later, longer one might with a length_penalty > 0), or if it
        ended at the length that suits it best and lost nothing on the way ("never").
      n_valid: ids from here on are padding of the vocabulary and have no probability.
      table_QV: as in `edit_logits`; rows start in state 0.

    Returns:
      num_return_sequences hypotheses for each prompt; fewer, or none, only where
      fewer are possible. Two may differ in nothing but which token ended them.

    Raises:
      ValueError: before anything is compiled, on an option out of its range, an empty
        prompt, or a length over n_positions; and when the model gives logits that are
        NaN or infinite.
    """
    n_positions = model.cfg.n_positions
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(f"{num_return_sequences=} is not in [1, {num_beams=}]")
    if early_stopping not in EARLY_STOPPING:
        raise ValueError(f"{early_stopping=} is not one of {EARLY_STOPPING}")
    if not prompts:
        return []
    length_G = np.array([len(p) for p in prompts], np.int32)
    limit_G = np.broadcast_to(np.asarray(max_new_tokens, np.int32), length_G.shape)
    for row, (n, n_new) in enumerate(zip(length_G, limit_G, strict=True)):
        if n == 0:
            raise ValueError(f"prompt {row} is empty")
        if n_new < 1:
            raise ValueError(f"max_new_tokens={n_new} of prompt {row} must be >= 1")
        if n + n_new > n_positions:
            raise ValueError(
                f"prompt {row} of {n} tokens + max_new_tokens={n_new} exceeds "
                f"{n_positions=}"
            )

    T = bucket(int(length_G.max()), n_positions)
    tokens_GT = np.zeros((len(prompts), T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_GT[row, : len(prompt)] = prompt
    size = bucket(int((length_G + limit_G).max()), n_positions)
    state = start(model, params, tokens_GT, length_G, size, num_beams)
    state = search(
        model,
        params,
        state,
        sampling,
        table_QV,
        limit_G,
        np.float32(length_penalty),
        np.int32(EARLY_STOPPING.index(early_stopping if num_beams > 1 else True)),
        np.int32(n_valid),
    )
    finished, broken_G = jax.device_get((state.finished, state.broken_G))
    if broken_G.any():
        raise ValueError(f"prompt {broken_G.argmax()}: {NOT_FINITE_MESSAGE}")

    def hypothesis(row: int, begin: int) -> Hypothesis:
        stopped = finished.stopped_B[row]
        span = slice(begin, begin + int(finished.n_new_B[row]) - int(stopped))
        return Hypothesis(
            ids=finished.tokens_BS[row, span].tolist(),
            score=float(finished.score_B[row]),
            finish_reason="stop" if stopped else "length",
            logprobs=finished.logp_BS[row, span].tolist(),
        )

    return [
        [
            hypothesis(row, begin)
            for row in range(g * num_beams, g * num_beams + num_return_sequences)
            if finished.score_B[row] > -np.inf
        ]
        for g, begin in enumerate(length_G)
    ]


@flax.struct.dataclass
class Finished:
    """The pool: the M best hypotheses of each prompt that have ended, best first."""

    score_B: jax.Array  # float32, with the length penalty; -inf: none yet
    tokens_BS: jax.Array  # int32: prompt, then hypothesis
    logp_BS: jax.Array  # float32: of the new tokens, each at its place
    n_new_B: jax.Array  # int32: new tokens, the ending one included
    stopped_B: jax.Array  # bool: the last of them is an end


@flax.struct.dataclass
class BeamState:
    """All that a step of the search reads and writes."""

    history: History  # of the beams; their last token is not in the cache yet
    logp_BS: jax.Array  # float32: of their new tokens, each at its place, not edited
    score_B: jax.Array  # float32: sum of the edited ones; -inf: no beam
    cache: KVCache
    finished: Finished
    closed_G: jax.Array  # bool: the prompt's search is over
    broken_G: jax.Array  # bool: some of its logits were no numbers


@partial(jax.jit, static_argnames=("model", "size", "num_beams"))
def start(
    model: GPT2,
    params: Params,
    tokens_GT: jax.Array,
    length_G: jax.Array,
    size: int,
    num_beams: int,
) -> BeamState:
    """One pass over right-padded prompts, then M rows of each, the first one a beam.

    The last token of a prompt goes through the model once more, as the first step of
    the search: so every step is alike.
    """
    (G, T), V = tokens_GT.shape, model.cfg.vocab_size
    empty = KVCache.empty(model.cfg, G, size, cache_dtype(model.dtype))
    empty = empty.replace(start=0)
    out: Any = model.apply({"params": params}, tokens_GT, empty, method="hidden")
    # A padded position "sees" an id past the vocabulary, which `drop` discards.
    ids_GT = jnp.where(jnp.arange(T) < length_G[:, None], tokens_GT, V)
    seen_GV = jnp.zeros((G, V), bool)
    history = History(
        tokens_BS=jnp.zeros((G, size), jnp.int32).at[:, :T].set(tokens_GT),
        length_B=length_G,
        n_new_B=jnp.zeros((G,), jnp.int32),
        prompt_BV=seen_GV.at[jnp.arange(G)[:, None], ids_GT].set(True, mode="drop"),
        counts_BV=jnp.zeros((G, V), jnp.int32),
        state_B=jnp.zeros((G,), jnp.int32),
    )
    cache = dataclasses.replace(out[1], length_B=length_G - 1)
    history, cache = _repeat((history, cache), num_beams)
    B = G * num_beams
    return BeamState(
        history=history,
        logp_BS=jnp.zeros((B, size)),
        score_B=jnp.where(jnp.arange(B) % num_beams == 0, 0.0, -jnp.inf),
        cache=cache,
        finished=Finished(
            score_B=jnp.full((B,), -jnp.inf),
            tokens_BS=jnp.zeros((B, size), jnp.int32),
            logp_BS=jnp.zeros((B, size)),
            n_new_B=jnp.zeros((B,), jnp.int32),
            stopped_B=jnp.zeros((B,), bool),
        ),
        closed_G=jnp.zeros((G,), bool),
        broken_G=jnp.zeros((G,), bool),
    )


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def search(
    model: GPT2,
    params: Params,
    state: BeamState,
    sampling: Sampling,
    table_QV: jax.Array | None,
    limit_G: jax.Array,
    length_penalty: jax.Array,
    early_stopping: jax.Array,
    n_valid: jax.Array,
) -> BeamState:
    """Steps until no prompt's pool can improve.

    Args:
      sampling: a row a prompt.
      limit_G: int32, max_new_tokens of each prompt.
      length_penalty, early_stopping, n_valid: scalars; early_stopping is an index into
        EARLY_STOPPING.
    """
    B, G, V = state.score_B.shape[0], state.closed_G.shape[0], model.cfg.vocab_size
    M = B // G
    sampling = _repeat(sampling, M)
    valid_V = jnp.arange(V) < n_valid
    rows_B = jnp.arange(B)

    def best(total_BV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The M largest of each prompt: totals, the beams they continue, tokens [B]."""
        found = jax.lax.top_k(total_BV.reshape(G, M * V), M)
        # Else XLA:CPU sorts all M * V where the caller takes a slice of the result.
        total_GM, at_GM = jax.lax.optimization_barrier(found)
        beam_GM = at_GM // V + M * jnp.arange(G)[:, None]
        return total_GM.ravel(), beam_GM.ravel(), (at_GM % V).ravel()

    def step(s: BeamState) -> BeamState:
        # The beams of a prompt have the same length.
        at_B, n_new_B = s.history.length_B, s.history.n_new_B + 1
        n_new_G = n_new_B[::M]
        open_B = ~jnp.repeat(s.closed_G, M)
        at_limit_G = n_new_G >= limit_G

        last_B1 = jnp.take_along_axis(s.history.tokens_BS, at_B[:, None] - 1, axis=1)
        logits_B1V, cache = model.apply({"params": params}, last_B1, s.cache)
        logits_BV = jnp.where(valid_V, logits_B1V[:, 0], -jnp.inf)
        broken_B = ~(logits_BV.max(-1) < jnp.inf) & (s.score_B > -jnp.inf) & open_B
        broken_G = broken_B.reshape(G, M).any(-1)
        logp_BV = jax.nn.log_softmax(logits_BV)
        edited_BV = edit_logits(logp_BV, s.history, sampling, table_QV)
        total_BV = s.score_B[:, None] + edited_BV

        def appended(array_BS, beam_B, value_B):
            return array_BS[beam_B].at[rows_B, at_B].set(value_B, mode="drop")

        total_B, beam_B, token_B = best(total_BV)
        stopped_B = sampling.ends_BV[beam_B, token_B]
        ended_B = (stopped_B | jnp.repeat(at_limit_G, M)) & open_B
        score_B = total_B / _power(n_new_B, length_penalty)
        ending = Finished(
            score_B=jnp.where(ended_B, score_B, -jnp.inf),
            tokens_BS=appended(s.history.tokens_BS, beam_B, token_B),
            logp_BS=appended(s.logp_BS, beam_B, logp_BV[beam_B, token_B]),
            n_new_B=n_new_B,
            stopped_B=stopped_B,
        )
        finished = _best_of(s.finished, ending, M)

        total_B, beam_B, token_B = best(jnp.where(sampling.ends_BV, -jnp.inf, total_BV))
        history, cache = jax.tree.map(lambda x: x[beam_B], (s.history, cache))
        history = history.append(token_B, open_B, table_QV)
        worst_G = finished.score_B[M - 1 :: M]  # -inf: there are not M yet
        at_its_best_G = jnp.where(
            (early_stopping == EARLY_STOPPING.index("never")) & (length_penalty > 0),
            limit_G,
            n_new_G,
        )
        hopeless_G = total_B[::M] / _power(at_its_best_G, length_penalty) <= worst_G
        enough_G = (early_stopping == EARLY_STOPPING.index(True)) & (worst_G > -jnp.inf)
        return BeamState(
            history=history,
            logp_BS=appended(s.logp_BS, beam_B, logp_BV[beam_B, token_B]),
            score_B=total_B,
            cache=dataclasses.replace(cache, length_B=history.length_B - 1),
            finished=finished,
            closed_G=s.closed_G | hopeless_G | enough_G | at_limit_G | broken_G,
            broken_G=s.broken_G | broken_G,
        )

    return jax.lax.while_loop(lambda s: ~jnp.all(s.closed_G), step, state)


def _power(n: jax.Array, exponent: jax.Array) -> jax.Array:
    return n.astype(jnp.float32) ** exponent


def _repeat(tree: Any, times: int) -> Any:
    """Each row `times` times, one after the other."""
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


def _best_of(a: Finished, b: Finished, num_beams: int) -> Finished:
    """The M best rows of both for each prompt, best first; of equals, a's."""
    B, M = a.score_B.shape[0], num_beams
    score_G2M = jnp.concatenate(
        [a.score_B.reshape(-1, M), b.score_B.reshape(-1, M)], axis=1
    )
    _, at_GM = jax.lax.top_k(score_G2M, M)
    first_G1 = jnp.arange(0, B, M)[:, None]
    row_GM = first_G1 + jnp.where(at_GM < M, at_GM, at_GM - M + B)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y])[row_GM.ravel()], a, b)
