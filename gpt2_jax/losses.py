"""Cross-entropy over target tokens."""

import jax
import jax.numpy as jnp


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in nats, [B, T] float32."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    top_BT1 = jax.lax.stop_gradient(logits_BTV.max(-1, keepdims=True))
    shifted_BTV = logits_BTV - top_BT1
    log_sum_BT = jnp.log(jnp.exp(shifted_BTV).sum(-1))
    picked_BT = jnp.take_along_axis(shifted_BTV, targets_BT[..., None], -1)[..., 0]
    return log_sum_BT - picked_BT
