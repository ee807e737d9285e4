"""Speculative decoding: guesses of the next tokens, for the model to check at once.

A guess never changes a result. The model draws from its own logits, and a guess counts
only where it is the token that was drawn.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gpt2_jax.decoding.forward import extend_logits
from gpt2_jax.decoding.sampling import (
    History,
    draw_keys,
    edit_logits,
    forbid_padding,
    sample,
)
from gpt2_jax.decoding.state import DecodeState
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2

LOOKUP_TOKENS = 3  # last tokens of a row that are searched for in it


@dataclasses.dataclass(frozen=True)
class Draft:
    """The source of guesses.

    Attributes:
      n_tokens: guesses per step; 0: one token is decoded at a time.
      model, params: a smaller model of the same vocabulary; None: the tokens that
        followed the row's last ones when they last occurred.
    """

    n_tokens: int
    model: GPT2 | None = None
    params: Params | None = None


NO_DRAFT = Draft(0)


def guess_tokens(
    s: DecodeState,
    n_valid: jax.Array,
    table_QV: jax.Array | None,
    model: GPT2 | None,
    params: Params | None,
    n: int,
) -> tuple[DecodeState, jax.Array]:
    """The state, and `n` guesses of what follows each row, int32 [B, n]."""
    if model is None or params is None or s.draft_cache is None:
        return s, look_up(s.history, n)
    guesses = []
    h, cache = s.history, s.draft_cache
    for i in range(n + 1):
        # The draft draws with the same noise, so that it often draws the same.
        last_B1 = h.last_token_B[:, None]
        logits_B1V, cache = extend_logits(model, params, last_B1, cache)
        if i == n:
            break  # The last guess had to be written into the cache.
        logits_BV = forbid_padding(logits_B1V[:, 0], n_valid)
        edited_BV = edit_logits(logits_BV, h, s.sampling, table_QV)
        token_B = sample(edited_BV, s.sampling, draw_keys(s.draw_B3, h.n_new_B))
        guesses.append(token_B)
        h = h.append(token_B, jnp.ones_like(token_B, bool), table_QV)
    return s.replace(draft_cache=cache), jnp.stack(guesses, axis=1)


def look_up(history: History, n: int) -> jax.Array:
    """The `n` tokens that followed the row's last ones the last time, int32 [B, n].

    The longest match of up to LOOKUP_TOKENS tokens counts, and the last one of these.
    Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding
    """
    tokens_BS, length_B1 = history.tokens_BS, history.length_B[:, None]
    at_S = jnp.arange(tokens_BS.shape[1])
    same_BS = at_S < length_B1 - 1
    score_BS = jnp.where(same_BS, at_S, -1)
    for m in range(LOOKUP_TOKENS):
        last_B1 = jnp.take_along_axis(
            tokens_BS, jnp.maximum(length_B1 - 1 - m, 0), axis=1
        )
        same_BS &= (jnp.roll(tokens_BS, m, axis=1) == last_B1) & (at_S >= m)
        score_BS += same_BS * tokens_BS.shape[1]
    from_B1 = jnp.argmax(score_BS, axis=1)[:, None] + 1
    at_BG = jnp.minimum(from_B1 + jnp.arange(n), jnp.maximum(length_B1 - 1, 0))
    return jnp.take_along_axis(tokens_BS, at_BG, axis=1)
