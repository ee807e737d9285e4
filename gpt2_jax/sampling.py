"""From logits to a token: filters that compose, then one draw.

The order is: repetition penalty, temperature, top-k, top-p, draw. Every value is
an array with an entry a row, so that one compiled program serves every mixture
of options in a batch. Tokens that a filter takes out get a logit of -inf.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Sampling:
    """Options of each row of a batch, arrays of shape [B]."""

    temperature: Array  # float32; 0: greedy
    top_k: Array  # int32; 0: off
    top_p: Array  # float32; 1: off
    repetition_penalty: Array  # float32; 1: off

    @classmethod
    def create(
        cls,
        batch: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> "Sampling":
        """The same options for each of `batch` rows.

        Raises:
          ValueError: on a value outside its range, naming both.
        """
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature={temperature} must be finite and >= 0")
        if isinstance(top_k, bool) or top_k != int(top_k) or not 0 <= top_k < 2**31:
            raise ValueError(f"top_k={top_k} must be an integer >= 0 (0: off)")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must be in (0, 1] (1: off)")
        if not 0 < repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty={repetition_penalty} must be finite and > 0"
            )
        return cls(
            np.full(batch, temperature, np.float32),
            np.full(batch, top_k, np.int32),
            np.full(batch, top_p, np.float32),
            np.full(batch, repetition_penalty, np.float32),
        )


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
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def keep_top_k(logits_BV: jax.Array, k_B: Array) -> jax.Array:
    """Only the k largest logits of a row stay (and their equals); k = 0: all."""
    kept_BV = _keep_largest(logits_BV, jnp.ones_like(logits_BV), k_B)
    return jnp.where((k_B > 0)[:, None], kept_BV, logits_BV)


def keep_top_p(logits_BV: jax.Array, p_B: Array) -> jax.Array:
    """Only the most probable tokens that together reach p stay; p = 1: all.

    The token that crosses p stays too (and its equals), so at least one does.
    Source: Holtzman et al., https://arxiv.org/abs/1904.09751, section 3.1.
    """
    kept_BV = _keep_largest(logits_BV, jax.nn.softmax(logits_BV, axis=-1), p_B)
    return jnp.where((p_B < 1)[:, None], kept_BV, logits_BV)


def _keep_largest(
    logits_BV: jax.Array, weights_BV: jax.Array, target_B: Array
) -> jax.Array:
    """The fewest of the largest logits whose weights sum to at least the target.

    Floats keep their order as integers, so the smallest logit to stay is found bit
    by bit, in 32 passes: on CPU ten times faster than a sort of the vocabulary.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order_BV = jnp.where(bits_BV & sign, ~bits_BV, bits_BV | sign)

    def raise_bit(i, least_B):
        higher_B = least_B | (sign >> i.astype(jnp.uint32))
        above_BV = order_BV >= higher_B[:, None]
        enough_B = jnp.sum(jnp.where(above_BV, weights_BV, 0), -1) >= target_B
        return jnp.where(enough_B, higher_B, least_B)

    least_B = jax.lax.fori_loop(
        0, 32, raise_bit, jnp.zeros(logits_BV.shape[0], jnp.uint32)
    )
    return jnp.where(order_BV >= least_B[:, None], logits_BV, -jnp.inf)


def process_logits(
    logits_BV: jax.Array, seen_BV: jax.Array, sampling: Sampling
) -> jax.Array:
    """All filters in their order; a filter that no row asks for costs nothing.

    A row with temperature 0 keeps its logits undivided (its token is the argmax).
    """

    def if_any(asked_B, fn, x):
        return jax.lax.cond(jnp.any(asked_B), fn, lambda x: x, x)

    s = sampling
    logits_BV = if_any(
        s.repetition_penalty != 1,
        lambda x: penalize_repetition(x, seen_BV, s.repetition_penalty),
        logits_BV,
    )
    divisor_B = jnp.where(s.temperature > 0, s.temperature, 1.0)
    logits_BV = logits_BV / divisor_B[:, None]
    drawn_B = s.temperature > 0
    logits_BV = if_any(
        drawn_B & (s.top_k > 0), lambda x: keep_top_k(x, s.top_k), logits_BV
    )
    return if_any(drawn_B & (s.top_p < 1), lambda x: keep_top_p(x, s.top_p), logits_BV)


def sample(
    logits_BV: jax.Array, seen_BV: jax.Array, sampling: Sampling, key_B: jax.Array
) -> jax.Array:
    """One token a row, int32 [B]: the argmax at temperature 0, else a draw.

    Args:
      logits_BV: float32; ids that must not be drawn are at -inf.
      seen_BV: bool, the tokens that the repetition penalty is for.
      sampling: the options of each row.
      key_B: a PRNG key a row, so that no row depends on its batch mates.
    """
    logits_BV = process_logits(logits_BV, seen_BV, sampling)
    greedy_B = jnp.argmax(logits_BV, axis=-1)

    def draw():
        drawn_B = jax.vmap(jax.random.categorical)(key_B, logits_BV)
        return jnp.where(sampling.temperature > 0, drawn_B, greedy_B)

    any_drawn = jnp.any(sampling.temperature > 0)
    return jax.lax.cond(any_drawn, draw, lambda: greedy_B).astype(jnp.int32)
