"""The model's forward pass over a cache, typed: Flax's `apply` returns Any."""

from typing import cast

import jax

from gpt2_jax.cache import KVCache
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2

NOT_FINITE_MESSAGE = (
    "the model's logits are not finite: its parameters are damaged, or too large for "
    "their dtype"
)


def extend_logits(
    model: GPT2, params: Params, tokens_BT: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Logits [B, T, V] after each of T more tokens, and the cache with these in it."""
    out = model.apply({"params": params}, tokens_BT, cache)
    return cast(tuple[jax.Array, KVCache], out)


def extend_hidden(
    model: GPT2, params: Params, tokens_BT: jax.Array, cache: KVCache
) -> tuple[jax.Array, KVCache]:
    """Hidden states [B, T, D] of T more tokens, and the cache with these in it."""
    out = model.apply({"params": params}, tokens_BT, cache, method="hidden")
    return cast(tuple[jax.Array, KVCache], out)


def unembed(model: GPT2, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Logits [B, T, V] of hidden states."""
    out = model.apply({"params": params}, hidden_BTD, method="unembed")
    return cast(jax.Array, out)
