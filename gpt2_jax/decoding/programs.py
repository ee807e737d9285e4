"""The compiled programs of decoding, from the empty cache to the loop over tokens.

Shapes are bucketed and everything else is traced: another prompt of the same bucket,
another seed or other options run the same programs.
"""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax.cache import KVCache
from gpt2_jax.decoding.forward import extend_hidden, extend_logits, unembed
from gpt2_jax.decoding.sampling import draw_keys, edit_logits, forbid_padding, sample
from gpt2_jax.decoding.speculative import guess_tokens
from gpt2_jax.decoding.state import (
    EXHAUSTED,
    LENGTH,
    NOT_FINITE,
    RUNNING,
    STOP,
    DecodeState,
)
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2
from gpt2_jax.ops.attention import cache_dtype
from gpt2_jax.runtime.sharding import row_shardings

Tree = TypeVar("Tree")


@partial(jax.jit, static_argnames=("model", "batch", "size", "mesh"))
def empty_cache(model: GPT2, batch: int, size: int, mesh: Mesh | None) -> KVCache:
    """A cache for `batch` rows of `size` tokens, with none in it yet."""
    return _constrain(
        KVCache.empty(model.cfg, batch, size, cache_dtype(model.dtype)), mesh
    )


@partial(
    jax.jit,
    static_argnames=("model", "start", "mesh"),
    donate_argnames=("cache", "logits_BV"),
)
def extend(
    model: GPT2,
    params: Params,
    cache: KVCache,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    logits_BV: jax.Array,
    start: int,
    mesh: Mesh | None,
) -> tuple[KVCache, jax.Array]:
    """Runs T more tokens of right-padded prompts through the model.

    Args:
      length_B: lengths of the whole prompts.
      logits_BV: the logits after prompts that ended in earlier tokens.
      start: tokens that the cache holds, in every row.

    Returns:
      The cache with these tokens in it, and the logits with those of prompts that end
      in these tokens.
    """
    cache = cache.replace(start=start)
    last_B = length_B - 1 - cache.length_B
    T = tokens_BT.shape[1]
    hidden_BTD, cache = extend_hidden(model, params, tokens_BT, cache)
    at_B11 = jnp.clip(last_B, 0, T - 1)[:, None, None]
    last_B1D = jnp.take_along_axis(hidden_BTD, at_B11, axis=1)
    last_BV = unembed(model, params, last_B1D)[:, 0]
    here_B1 = ((last_B >= 0) & (last_B < T))[:, None]
    return _constrain((cache, jnp.where(here_B1, last_BV, logits_BV)), mesh)


@partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def first_token(
    state: DecodeState,
    logits_BV: jax.Array,
    n_valid: jax.Array,
    table_QV: jax.Array | None,
    mesh: Mesh | None,
) -> DecodeState:
    """The state with a token drawn in each row that is running."""
    running_B = state.finish_B == RUNNING
    state, _ = _draw_tokens(state, logits_BV, n_valid, table_QV, running_B)
    return _constrain(state.rewind_caches(), mesh)


@partial(jax.jit, static_argnames=("size", "mesh"))
def resize(state: DecodeState, size: int, mesh: Mesh | None) -> DecodeState:
    """The state with room for `size` tokens a row."""
    h = state.history
    more = size - state.cache.size

    def pad(x):
        return jnp.pad(x, [(0, more if i == 1 else 0) for i in range(x.ndim)])

    state = state.replace(
        history=h.replace(tokens_BS=pad(h.tokens_BS)),
        logprob_BS=pad(state.logprob_BS),
        top_BSN=pad(state.top_BSN),
        top_logprob_BSN=pad(state.top_logprob_BSN),
        cache=state.cache.resize(size),
        draft_cache=state.draft_cache and state.draft_cache.resize(size),
    )
    return _constrain(state, mesh)


@partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def insert(
    state: DecodeState, rows: DecodeState, slot_R: jax.Array, mesh: Mesh | None
) -> DecodeState:
    """The state with R rows written into their slots."""
    words = state.sampling.bad_words_BWL, rows.sampling.bad_words_BWL
    W, L = (max(x.shape[axis] for x in words) for axis in (1, 2))

    def make_room(s: DecodeState) -> DecodeState:
        x = s.sampling.bad_words_BWL
        pads = ((0, 0), (0, W - x.shape[1]), (L - x.shape[2], 0))
        x = jnp.pad(x, pads, constant_values=-1)
        return s.replace(sampling=s.sampling.replace(bad_words_BWL=x))

    state, rows = make_room(state), make_room(rows)
    state = jax.tree.map(lambda x, r: x.at[slot_R].set(r), state, rows)
    return _constrain(state, mesh)


def _constrain(tree: Tree, mesh: Mesh | None) -> Tree:
    """The tree with its rows sharded over the mesh."""
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, row_shardings(tree, mesh))


@partial(
    jax.jit,
    static_argnames=("model", "draft_model", "n_draft", "mesh"),
    donate_argnames="state",
)
def decode(
    model: GPT2,
    params: Params,
    state: DecodeState,
    n_valid: jax.Array,
    n_steps: jax.Array,
    until_end: jax.Array,
    table_QV: jax.Array | None,
    *,
    draft_model: GPT2 | None,
    draft_params: Params | None,
    n_draft: int,
    mesh: Mesh | None,
) -> tuple[DecodeState, jax.Array]:
    """Decodes until every row has ended or the host is needed; at most `n_steps`.

    A step runs the model on the last token of each row and draws the next one. With
    drafts it runs on `n_draft` guesses too, and goes on drawing while each guess is the
    token that was drawn: the tokens do not depend on the guesses.

    Args:
      until_end: return as soon as a row has ended, for its slot to be filled.

    Returns:
      The state, and the number of steps.
    """
    n_positions = model.cfg.n_positions
    n_running = jnp.sum(state.finish_B == RUNNING)

    def go_on(carry):
        s, n, pause = carry
        h, running_B = s.history, s.finish_B == RUNNING
        fits_B = h.length_B + 1 + n_draft <= s.cache.size
        fits_B &= h.length_B < n_positions
        fits = (fits_B | ~running_B).all()
        ended = until_end & (running_B.sum() < n_running)
        return running_B.any() & fits & (n < n_steps) & ~pause & ~ended

    def step(carry):
        s, n, pause = carry
        last_B = s.history.last_token_B
        s, guess_BG = guess_tokens(
            s, n_valid, table_QV, draft_model, draft_params, n_draft
        )
        tokens_BT = jnp.concatenate([last_B[:, None], guess_BG], axis=1)
        logits_BTV, cache = extend_logits(model, params, tokens_BT, s.cache)
        s = s.replace(cache=cache)

        def draw(i, carry):
            s, going_B, pause = carry
            before_B = s.history.length_B
            s, pause_B = _draw_tokens(s, logits_BTV[:, i], n_valid, table_QV, going_B)
            if n_draft:
                guess_B = guess_BG[:, jnp.minimum(i, n_draft - 1)]
                going_B &= s.history.last_token_B == guess_B
            going_B &= s.history.length_B > before_B
            going_B &= (s.finish_B == RUNNING) & ~pause_B
            going_B &= s.history.length_B < n_positions
            return s, going_B, pause | pause_B.any()

        carry = (s, s.finish_B == RUNNING, pause)
        if n_draft:
            s, _, pause = jax.lax.fori_loop(0, 1 + n_draft, draw, carry)
        else:
            s, _, pause = draw(0, carry)
        return s.rewind_caches(), n + 1, pause

    state, n, _ = jax.lax.while_loop(go_on, step, (state, jnp.int32(0), False))
    return _constrain(state, mesh), n


def _draw_tokens(
    s: DecodeState,
    logits_BV: jax.Array,
    n_valid: jax.Array,
    table_QV: jax.Array | None,
    where_B: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """Draws a token in the rows `where_B`; a row may end with it.

    Returns:
      The state, and whether the host has to look at the new token of each row.
    """
    h, rows_B = s.history, jnp.arange(where_B.shape[0])
    logits_BV = forbid_padding(logits_BV, n_valid)
    broken_B = ~(logits_BV.max(axis=-1) < jnp.inf)  # NaN is not less
    edited_BV = edit_logits(logits_BV, h, s.sampling, table_QV)
    token_B = sample(edited_BV, s.sampling, draw_keys(s.draw_B3, h.n_new_B))
    stuck_B = (edited_BV.max(axis=-1) == -jnp.inf) | broken_B
    end_B = s.sampling.ends_BV[rows_B, token_B] & ~stuck_B
    grown_B = where_B & ~stuck_B & ~end_B
    at_B = jnp.where(grown_B, h.length_B, s.logprob_BS.shape[1])
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    n_top = s.top_BSN.shape[-1]
    if n_top:
        values_BN, ids_BN = jax.lax.top_k(logp_BV, n_top)
        s = s.replace(
            top_BSN=s.top_BSN.at[rows_B, at_B].set(ids_BN, mode="drop"),
            top_logprob_BSN=s.top_logprob_BSN.at[rows_B, at_B].set(
                values_BN, mode="drop"
            ),
        )
    h = h.append(token_B, grown_B, table_QV)
    why_B = jnp.where(broken_B, NOT_FINITE, EXHAUSTED)
    finish_B = jnp.where(where_B & stuck_B, why_B, s.finish_B)
    finish_B = jnp.where(where_B & end_B, STOP, finish_B)
    finish_B = jnp.where(grown_B & (h.n_new_B >= s.limit_B), LENGTH, finish_B)
    s = s.replace(
        history=h,
        finish_B=finish_B,
        logprob_BS=s.logprob_BS.at[rows_B, at_B].set(
            logp_BV[rows_B, token_B], mode="drop"
        ),
    )
    return s, grown_B & s.pause_BV[rows_B, token_B]
