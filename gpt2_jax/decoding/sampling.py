"""From logits to a token: filters that compose, then one draw.

The order is: logit bias, repetition, presence and frequency penalty, no-repeat
n-grams, bad words, the table of allowed tokens, minimum length; temperature; top-k,
top-p, min-p, typical-p; draw. Every value is an array with an entry a row, so that one
compiled program serves every mixture of options in a batch. Tokens that a filter takes
out get a logit of -inf.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


class Sampling(flax.struct.PyTreeNode):
    """What each row of a batch asks for; `options.Options` says what it means."""

    temperature_B: Array  # float32; 0: greedy
    top_k_B: Array  # int32; 0: off
    top_p_B: Array  # float32; 1: off
    min_p_B: Array  # float32; 0: off
    typical_p_B: Array  # float32; 1: off
    repetition_penalty_B: Array  # float32; 1: off
    presence_penalty_B: Array  # float32; 0: off
    frequency_penalty_B: Array  # float32; 0: off
    no_repeat_ngram_size_B: Array  # int32; 0: off
    min_new_tokens_B: Array  # int32
    bias_BV: Array  # float32, added to the logits; -inf: never drawn
    ends_BV: Array  # bool, tokens that end the row
    # int32: W sequences of two tokens or more, each with -1 before it; none: all -1
    bad_words_BWL: Array

    @classmethod
    def create(cls, batch: int, vocab_size: int, **values: Any) -> "Sampling":
        """All options off, but for those given by name (without _B) for all rows."""
        neutral: dict[str, Any] = dict(
            temperature=np.float32(1),
            top_k=np.int32(0),
            top_p=np.float32(1),
            min_p=np.float32(0),
            typical_p=np.float32(1),
            repetition_penalty=np.float32(1),
            presence_penalty=np.float32(0),
            frequency_penalty=np.float32(0),
            no_repeat_ngram_size=np.int32(0),
            min_new_tokens=np.int32(0),
        )
        if unknown := values.keys() - neutral.keys():
            raise TypeError(f"unknown sampling option {min(unknown)!r}")
        rows = {
            f"{name}_B": np.full(batch, values.get(name, off), off.dtype)
            for name, off in neutral.items()
        }
        return cls(
            **rows,
            bias_BV=np.zeros((batch, vocab_size), np.float32),
            ends_BV=np.zeros((batch, vocab_size), bool),
            bad_words_BWL=np.full((batch, *MIN_BAD_WORDS), -1, np.int32),
        )


MIN_BAD_WORDS = (8, 8)  # room for words and tokens a word, before another compilation


class History(flax.struct.PyTreeNode):
    """What the edits of the logits depend on: the tokens of each row so far."""

    tokens_BS: jax.Array  # int32: prompt, then what was drawn
    length_B: jax.Array  # int32: tokens in the row
    n_new_B: jax.Array  # int32: of these, drawn (those that slid out count too)
    prompt_BV: jax.Array  # bool: the prompt holds this token
    counts_BV: jax.Array  # int32: how often it was drawn
    state_B: jax.Array  # int32: row of the table of allowed tokens

    @property
    def last_token_B(self) -> jax.Array:
        """The last token of each row, int32."""
        at_B1 = jnp.maximum(self.length_B - 1, 0)[:, None]
        return jnp.take_along_axis(self.tokens_BS, at_B1, axis=1)[:, 0]

    def append(
        self, token_B: jax.Array, grown_B: jax.Array, table_QV: jax.Array | None
    ) -> "History":
        """With one more token in each row where `grown_B` is true."""
        rows_B = jnp.arange(token_B.shape[0])
        at_B = jnp.where(grown_B, self.length_B, self.tokens_BS.shape[1])
        grown = grown_B.astype(jnp.int32)
        state_B = self.state_B
        if table_QV is not None:
            state_B = jnp.where(grown_B, table_QV[state_B, token_B], state_B)
        return self.replace(
            tokens_BS=self.tokens_BS.at[rows_B, at_B].set(token_B, mode="drop"),
            length_B=self.length_B + grown,
            n_new_B=self.n_new_B + grown,
            counts_BV=self.counts_BV.at[rows_B, token_B].add(grown),
            state_B=state_B,
        )


# --- Edits of the logits, before temperature ------------------------------------------


def forbid_padding(logits_BV: jax.Array, n_valid: jax.Array) -> jax.Array:
    """-inf for ids >= n_valid, which only pad the vocabulary."""
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < n_valid, logits_BV, -jnp.inf)


def penalize_repetition(
    logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: Array
) -> jax.Array:
    """Logits of seen tokens divided by the penalty if > 0, multiplied if < 0.

    Source: CTRL, https://arxiv.org/abs/1909.05858, section 4.1, in the form for
    logits of either sign that is in general use.
    """
    penalty_B1 = penalty_B[:, None]
    penalized_BV = jnp.where(
        logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1
    )
    return _bounded(jnp.where(seen_BV, penalized_BV, logits_BV), logits_BV)


def penalize_counts(
    logits_BV: jax.Array, counts_BV: jax.Array, presence_B: Array, frequency_B: Array
) -> jax.Array:
    """Minus `presence` for a token that was drawn, and `frequency` for each time."""
    drawn_BV = (counts_BV > 0).astype(logits_BV.dtype)
    penalized_BV = (
        logits_BV
        - presence_B[:, None] * drawn_BV
        - frequency_B[:, None] * counts_BV.astype(logits_BV.dtype)
    )
    return _bounded(penalized_BV, logits_BV)


def _bounded(edited_BV: jax.Array, before_BV: jax.Array) -> jax.Array:
    """What overflows stays finite, so that no penalty forbids a token by rounding."""
    greatest = jnp.finfo(edited_BV.dtype).max
    bounded_BV = jnp.clip(edited_BV, -greatest, greatest)
    return jnp.where(before_BV == -jnp.inf, -jnp.inf, bounded_BV)


def forbid_repeated_ngrams(
    logits_BV: jax.Array, tokens_BS: jax.Array, length_B: jax.Array, n_B: Array
) -> jax.Array:
    """No token that would make an n-gram of the row occur a second time; n = 0: all.

    Source: Paulus et al., https://arxiv.org/abs/1705.04304, section 2.5.
    """
    at_S = jnp.arange(tokens_BS.shape[1])
    n_B1 = n_B[:, None]

    # A token at position e is out if the n - 1 tokens before it are the row's last.
    def same_m_before(m, match_BS):
        last_B1 = jnp.take_along_axis(
            tokens_BS, jnp.maximum(length_B - m, 0)[:, None], axis=1
        )
        same_BS = (jnp.roll(tokens_BS, m, axis=1) == last_B1) & (at_S >= m)
        return match_BS & (same_BS | (m >= n_B1))

    match_BS = (at_S < length_B[:, None]) & (n_B1 > 0)
    last = jnp.minimum(jnp.max(n_B), tokens_BS.shape[1] + 1)  # then none matches
    match_BS = jax.lax.fori_loop(1, last, same_m_before, match_BS)
    return _forbid(logits_BV, jnp.where(match_BS, tokens_BS, -1))


def forbid_bad_words(
    logits_BV: jax.Array,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    words_BWL: Array,
) -> jax.Array:
    """No token that would complete one of the sequences (padded with -1 in front)."""
    n_before = words_BWL.shape[2] - 1
    at_BL = length_B[:, None] - n_before + jnp.arange(n_before)
    recent_BL = jnp.take_along_axis(tokens_BS, jnp.maximum(at_BL, 0), axis=1)
    recent_BL = jnp.where(at_BL < 0, -2, recent_BL)
    before_BWL, last_BW = words_BWL[..., :-1], words_BWL[..., -1]
    same_BWL = (before_BWL == recent_BL[:, None]) | (before_BWL == -1)
    return _forbid(logits_BV, jnp.where(same_BWL.all(-1), last_BW, -1))


def _forbid(logits_BV: jax.Array, ids_BN: jax.Array) -> jax.Array:
    """-inf for these ids; -1 stands for none."""
    B, V = logits_BV.shape
    ids_BN = jnp.where(ids_BN < 0, V, ids_BN)
    return logits_BV.at[jnp.arange(B)[:, None], ids_BN].set(-jnp.inf, mode="drop")


def edit_logits(
    logits_BV: jax.Array,
    history: History,
    sampling: Sampling,
    table_QV: jax.Array | None = None,
) -> jax.Array:
    """All that comes before temperature, in order; what no row asks for costs nothing.

    Args:
      table_QV: int32, for each state and token the next state, -1: not allowed.
    """
    h, s = history, sampling
    logits_BV = logits_BV + s.bias_BV
    logits_BV = _if_any(
        s.repetition_penalty_B != 1,
        lambda x: penalize_repetition(
            x, h.prompt_BV | (h.counts_BV > 0), s.repetition_penalty_B
        ),
        logits_BV,
    )
    logits_BV = _if_any(
        (s.presence_penalty_B != 0) | (s.frequency_penalty_B != 0),
        lambda x: penalize_counts(
            x, h.counts_BV, s.presence_penalty_B, s.frequency_penalty_B
        ),
        logits_BV,
    )
    logits_BV = _if_any(
        s.no_repeat_ngram_size_B > 0,
        lambda x: forbid_repeated_ngrams(
            x, h.tokens_BS, h.length_B, s.no_repeat_ngram_size_B
        ),
        logits_BV,
    )
    logits_BV = _if_any(
        s.bad_words_BWL >= 0,
        lambda x: forbid_bad_words(x, h.tokens_BS, h.length_B, s.bad_words_BWL),
        logits_BV,
    )
    if table_QV is not None:
        logits_BV = jnp.where(table_QV[h.state_B] >= 0, logits_BV, -jnp.inf)
    too_short_B = h.n_new_B < s.min_new_tokens_B
    return jnp.where(too_short_B[:, None] & s.ends_BV, -jnp.inf, logits_BV)


# --- Filters, after temperature -------------------------------------------------------


def keep_top_k(logits_BV: jax.Array, k_B: Array) -> jax.Array:
    """Only the k largest logits of a row stay (and their equals); k = 0: all."""
    kept_BV = _largest(logits_BV, jnp.ones_like(logits_BV), k_B)
    return jnp.where(kept_BV | (k_B <= 0)[:, None], logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p_B: Array) -> jax.Array:
    """Only the most probable tokens that together reach p stay; p = 1: all.

    The token that crosses p stays too (and its equals), so at least one does.
    Source: Holtzman et al., https://arxiv.org/abs/1904.09751, section 3.1.
    """
    kept_BV = _largest(logits_BV, jax.nn.softmax(logits_BV, axis=-1), p_B)
    return jnp.where(kept_BV | (p_B >= 1)[:, None], logits_BV, -jnp.inf)


def keep_min_p(logits_BV: jax.Array, p_B: Array) -> jax.Array:
    """Only tokens of at least p times the greatest probability stay; p = 0: all.

    Source: Nguyen et al., https://arxiv.org/abs/2407.01082.
    """
    below_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    return jnp.where(below_BV >= jnp.log(p_B)[:, None], logits_BV, -jnp.inf)


def keep_typical_p(logits_BV: jax.Array, p_B: Array) -> jax.Array:
    """Tokens stay whose surprise is nearest to the mean one, until they reach p.

    The token that crosses p stays too; p = 1: all. Source: Meister et al., locally
    typical sampling, https://arxiv.org/abs/2202.00666.
    """
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    probs_BV = jnp.exp(logp_BV)
    finite_BV = jnp.where(probs_BV > 0, logp_BV, 0.0)
    entropy_B1 = -jnp.sum(probs_BV * finite_BV, axis=-1, keepdims=True)
    kept_BV = _largest(-jnp.abs(logp_BV + entropy_B1), probs_BV, p_B)
    return jnp.where(kept_BV | (p_B >= 1)[:, None], logits_BV, -jnp.inf)


def _largest(values_BV: jax.Array, weights_BV: jax.Array, target_B: Array) -> jax.Array:
    """bool: the fewest of the largest values whose weights reach the target together.

    Floats keep their order as integers, so the smallest value to stay is found bit by
    bit, in 32 passes: on CPU ten times faster than a sort of the vocabulary.
    """
    values_BV = jnp.where(values_BV == 0, 0.0, values_BV.astype(jnp.float32))  # no -0
    bits_BV = jax.lax.bitcast_convert_type(values_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # No subnormal target: compared as 0, it would be reached without any value.
    target_B = jnp.maximum(target_B, jnp.finfo(jnp.float32).tiny)
    order_BV = jnp.where(bits_BV & sign, ~bits_BV, bits_BV | sign)

    def raise_bit(i, least_B):
        higher_B = least_B | (sign >> i.astype(jnp.uint32))
        above_BV = order_BV >= higher_B[:, None]
        enough_B = jnp.sum(jnp.where(above_BV, weights_BV, 0), -1) >= target_B
        return jnp.where(enough_B, higher_B, least_B)

    least_B = jax.lax.fori_loop(
        0, 32, raise_bit, jnp.zeros(values_BV.shape[0], jnp.uint32)
    )
    return order_BV >= least_B[:, None]


def filter_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Temperature and all filters after it, in order.

    What becomes of a row with temperature 0 is of no use: its token is the argmax of
    the logits as they were.
    """
    s = sampling
    drawn_B = s.temperature_B > 0
    temperature_B1 = jnp.where(drawn_B, s.temperature_B, 1.0)[:, None]
    # Divided by less than 1 logits may overflow; from 0 downward that does no harm.
    greatest_B1 = _greatest(logits_BV)
    logits_BV = logits_BV - jnp.where(temperature_B1 < 1, greatest_B1, 0.0)
    logits_BV = logits_BV / temperature_B1
    filters: tuple[tuple[Array, Callable[[jax.Array], jax.Array]], ...] = (
        (s.top_k_B > 0, lambda x: keep_top_k(x, s.top_k_B)),
        (s.top_p_B < 1, lambda x: keep_top_p(x, s.top_p_B)),
        (s.min_p_B > 0, lambda x: keep_min_p(x, s.min_p_B)),
        (s.typical_p_B < 1, lambda x: keep_typical_p(x, s.typical_p_B)),
    )
    for asked_B, keep in filters:
        logits_BV = _if_any(drawn_B & asked_B, keep, logits_BV)
    return logits_BV


def _greatest(logits_BV: jax.Array) -> jax.Array:
    """The greatest of each row, [B, 1]; finite where all are -inf, to be subtracted."""
    lowest = jnp.finfo(logits_BV.dtype).min
    return jnp.maximum(logits_BV.max(axis=-1, keepdims=True), lowest)


def _if_any(
    asked: Array, fn: Callable[[jax.Array], jax.Array], x: jax.Array
) -> jax.Array:
    return jax.lax.cond(jnp.any(asked), fn, lambda x: x, x)


def sample(logits_BV: jax.Array, sampling: Sampling, key_B: jax.Array) -> jax.Array:
    """One token a row, int32 [B], of edited logits: the argmax at temperature 0, else
    a draw after all filters.

    Args:
      key_B: a PRNG key a row, so that no row depends on its batch mates.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1)
    drawn_B = sampling.temperature_B > 0

    def draw():
        filtered_BV = filter_logits(logits_BV, sampling)
        return jnp.where(drawn_B, draw_token(filtered_BV, key_B), greedy_B)

    return jax.lax.cond(jnp.any(drawn_B), draw, lambda: greedy_B).astype(jnp.int32)


def draw_keys(draw_B3: jax.Array, n_new_B: jax.Array) -> jax.Array:
    """A PRNG key for the next draw of each row.

    Args:
      draw_B3: uint32: seed, row, sequence.
      n_new_B: how many tokens the row has drawn before.
    """

    def key(draw_3, n):
        key = jax.random.key(draw_3[0])
        for x in (draw_3[1], draw_3[2], n):
            key = jax.random.fold_in(key, x)
        return key

    return jax.vmap(key)(draw_B3, n_new_B)


LANES = 128


def draw_token(logits_BV: jax.Array, key_B: jax.Array) -> jax.Array:
    """A token a row, int32 [B], with the probabilities that its logits stand for.

    Tokens are dealt out to lanes; the lane is drawn, and then one of its tokens. So
    LANES + V / LANES random numbers do, and not V, which on a CPU take longer to make
    than all filters. Rows that have no finite logit get any token.
    """
    greatest_B1 = _greatest(logits_BV)
    padding = ((0, 0), (0, -logits_BV.shape[1] % LANES))
    x_BV = jnp.pad(logits_BV - greatest_B1, padding, constant_values=-jnp.inf)
    x_BNL = x_BV.reshape(x_BV.shape[0], -1, LANES)
    lane_BL = jnp.log(jnp.exp(x_BNL).sum(axis=1))

    def of_row(key, x_NL, lane_L):
        lane_key, token_key = jax.random.split(key)
        lane = jax.random.categorical(lane_key, lane_L)
        # Keyed by the lane: two models that draw the same one go on alike.
        key = jax.random.fold_in(token_key, lane)
        return LANES * jax.random.categorical(key, x_NL[:, lane]) + lane

    return jax.vmap(of_row)(key_B, x_BNL, lane_BL)
