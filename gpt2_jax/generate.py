"""Decoding: prefill, then one `while_loop` over a KV cache; tokens in, tokens out.

Shapes are bucketed and everything else is traced: another prompt of the same
bucket, another seed or other sampling values run the same compiled programs.
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
from gpt2_jax.model import GPT2, Params
from gpt2_jax.sampling import Sampling, sample

MIN_BUCKET = 32


def generate(
    model: GPT2,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    eot_id: int | None = None,
    n_valid: int | None = None,
) -> list[list[int]]:
    """Continues each prompt by up to `max_new_tokens` tokens.

    Args:
      prompts: B lists of ids, of any lengths >= 1.
      sampling: options, a value a row.
      seed: row i draws with a key of (seed, i): neither the batch size nor the
        other rows have a part in it.
      eot_id: a row ends before this token; None: never.
      n_valid: ids from here on are padding of the vocabulary and never drawn;
        None: all of the model's vocabulary is valid.

    Returns:
      B lists of new ids, end-of-text excluded.

    Raises:
      ValueError: before anything is compiled, on an empty prompt, an id outside
        the vocabulary, or a length over n_positions.
    """
    cfg = model.cfg
    n_valid = cfg.vocab_size if n_valid is None else n_valid
    if not prompts:
        raise ValueError("no prompt given")
    if isinstance(max_new_tokens, bool) or max_new_tokens != int(max_new_tokens):
        raise ValueError(f"max_new_tokens={max_new_tokens} must be an integer")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be >= 0")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty")
        check_ids(prompt, n_valid)
        if len(prompt) + max_new_tokens > cfg.n_positions:
            raise ValueError(
                f"prompt {row} of {len(prompt)} tokens + {max_new_tokens=} exceeds "
                f"n_positions={cfg.n_positions}"
            )
    if max_new_tokens == 0:
        return [[] for _ in prompts]

    longest = max(map(len, prompts))
    tokens_BT = np.zeros((len(prompts), bucket(longest, cfg.n_positions)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, : len(prompt)] = prompt
    length_B = np.array([len(p) for p in prompts], np.int32)
    size = bucket(longest + max_new_tokens, cfg.n_positions)

    state = prefill(model, params, tokens_BT, length_B, np.uint32(seed % 2**32), size)
    state = decode(
        model,
        params,
        state,
        sampling,
        np.int32(max_new_tokens),
        np.int32(-1 if eot_id is None else eot_id),
        np.int32(n_valid),
    )
    tokens_BS, n_new_B = jax.device_get((state.tokens_BS, state.n_new_B))
    return [
        tokens_BS[row, start : start + n].tolist()
        for row, (start, n) in enumerate(zip(length_B, n_new_B, strict=True))
    ]


def bucket(length: int, limit: int) -> int:
    """The least power of two >= length and >= MIN_BUCKET, but at most `limit`."""
    return min(max(MIN_BUCKET, 1 << (length - 1).bit_length()), limit)


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int) -> None:
    """Raises ValueError that names the first id outside [0, vocab_size)."""
    array = np.asarray(ids)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"token ids must be integers, not {array.dtype}")
    bad = array[(array < 0) | (array >= vocab_size)]
    if bad.size:
        raise ValueError(f"token id {bad.flat[0]} is outside [0, {vocab_size=})")


def apply(model: GPT2, params: Params, *args: Any, **kwargs: Any) -> Any:
    """`model.apply` on a plain params tree."""
    return model.apply({"params": params}, *args, **kwargs)


@flax.struct.dataclass
class DecodeState:
    """All that a decoding step reads and writes."""

    tokens_BS: jax.Array  # int32: prompt, then what was drawn
    length_B: jax.Array  # int32: tokens in a row so far
    n_new_B: jax.Array  # int32: of these, drawn
    done_B: jax.Array  # bool
    seen_BV: jax.Array  # bool: the row holds this token
    key_B: jax.Array  # a PRNG key a row
    logits_BV: jax.Array  # float32, for the next token
    cache: KVCache


@partial(jax.jit, static_argnames=("model", "size"))
def prefill(
    model: GPT2,
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    seed: jax.Array,
    size: int,
) -> DecodeState:
    """One pass over right-padded prompts, into a fresh cache of `size` tokens."""
    cfg, (B, T) = model.cfg, tokens_BT.shape
    empty = KVCache.empty(cfg, B, size, model.dtype)
    hidden_BTD, cache = apply(model, params, tokens_BT, empty, method="hidden")
    last_B1D = jnp.take_along_axis(hidden_BTD, (length_B - 1)[:, None, None], axis=1)
    logits_B1V = apply(model, params, last_B1D, method="unembed")
    rows_B = jnp.arange(B)
    padding_BT = jnp.arange(T) >= length_B[:, None]
    # A padded position "sees" an id past the vocabulary, which `drop` discards.
    ids_BT = jnp.where(padding_BT, cfg.vocab_size, tokens_BT)
    seen_BV = jnp.zeros((B, cfg.vocab_size), bool)
    return DecodeState(
        tokens_BS=jnp.zeros((B, size), jnp.int32).at[:, :T].set(tokens_BT),
        length_B=length_B,
        n_new_B=jnp.zeros((B,), jnp.int32),
        done_B=jnp.zeros((B,), bool),
        seen_BV=seen_BV.at[rows_B[:, None], ids_BT].set(True, mode="drop"),
        key_B=jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(rows_B),
        logits_BV=logits_B1V[:, 0],
        cache=dataclasses.replace(cache, length_B=length_B),
    )


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def decode(
    model: GPT2,
    params: Params,
    state: DecodeState,
    sampling: Sampling,
    max_new_tokens: jax.Array,
    eot_id: jax.Array,
    n_valid: jax.Array,
) -> DecodeState:
    """Draws until every row is done or has `max_new_tokens` more tokens."""
    rows_B = jnp.arange(state.done_B.shape[0])
    valid_V = jnp.arange(model.cfg.vocab_size) < n_valid

    def unfinished(s: DecodeState) -> jax.Array:
        return ~jnp.all(s.done_B)

    def step(s: DecodeState) -> DecodeState:
        logits_BV = jnp.where(valid_V, s.logits_BV, -jnp.inf)
        key_B = jax.vmap(jax.random.fold_in)(s.key_B, s.n_new_B)
        token_B = sample(logits_BV, s.seen_BV, sampling, key_B)
        ended_B = s.done_B | (token_B == eot_id)
        # A finished row goes through the same motions, and nothing of it is kept.
        at_B = jnp.where(ended_B, s.tokens_BS.shape[1], s.length_B)
        grown_B = jnp.where(ended_B, 0, 1)
        n_new_B = s.n_new_B + grown_B
        done_B = ended_B | (n_new_B >= max_new_tokens)

        def forward():
            logits_B1V, cache = apply(model, params, token_B[:, None], s.cache)
            length_B = s.cache.length_B + grown_B
            return logits_B1V[:, 0], dataclasses.replace(cache, length_B=length_B)

        logits_BV, cache = jax.lax.cond(
            jnp.all(done_B), lambda: (s.logits_BV, s.cache), forward
        )
        return dataclasses.replace(
            s,
            tokens_BS=s.tokens_BS.at[rows_B, at_B].set(token_B, mode="drop"),
            length_B=s.length_B + grown_B,
            n_new_B=n_new_B,
            done_B=done_B,
            seen_BV=s.seen_BV.at[rows_B, token_B].set(True),
            logits_BV=logits_BV,
            cache=cache,
        )

    return jax.lax.while_loop(unfinished, step, state)
