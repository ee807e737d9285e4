"""What a model made of a text: probability, entropy and attention, as one HTML page."""

import base64
import dataclasses
import html
import json
import math
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.checks import integer
from gpt2_jax.config import GPT2Config
from gpt2_jax.decoding.forward import NOT_FINITE_MESSAGE
from gpt2_jax.layout import LAYER, Params
from gpt2_jax.model import GPT2
from gpt2_jax.ops.attention import causal_weights
from gpt2_jax.runtime.files import user_path

MOST_WEIGHTS = 2**23  # of attention in a page, a byte each: in base64 11 MB
MOST_ALTERNATIVES = 100


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """What a model made of a text of T tokens.

    In a notebook it shows itself.

    Attributes:
      config: of the model.
      vocab_size: tokens that have a probability: without padding.
      token_ids: int32 [T].
      tokens: what each is written as; bytes that are no character as \\xNN.
      logprobs: float32 [T - 1], in nats, of each token but the first one.
      ranks: int32 [T - 1], of the same tokens; 1: none was more probable.
      entropies: float32 [T], in nats, of what the model expects after each token.
      top_ids: int32 [T, k], the most probable tokens after each token.
      top_tokens: how those are written.
      top_logprobs: float32 [T, k].
      attention: float32 [N, H, T, T], for each layer and head how much a position (row)
        takes from each position up to its own. A row sums to 1.
    """

    config: GPT2Config
    vocab_size: int
    token_ids: np.ndarray
    tokens: list[str]
    logprobs: np.ndarray
    ranks: np.ndarray
    entropies: np.ndarray
    top_ids: np.ndarray
    top_tokens: list[list[str]]
    top_logprobs: np.ndarray
    attention: np.ndarray

    def to_html(self) -> str:
        """One page that needs nothing else: no request goes out.

        Attention is rounded to multiples of 1/255.
        """
        lower = np.tril_indices(len(self.tokens))
        weights = np.rint(255 * self.attention[:, :, *lower]).astype(np.uint8)
        top = zip(self.top_ids, self.top_tokens, self.top_logprobs, strict=True)
        data = {
            "model": _describe(self.config),
            "layers": self.config.n_layer,
            "heads": self.config.n_head,
            "vocabulary": self.vocab_size,
            "ids": self.token_ids.tolist(),
            "tokens": self.tokens,
            "logprobs": _short(self.logprobs),
            "ranks": self.ranks.tolist(),
            "entropies": _short(self.entropies),
            "top": [
                list(zip(ids.tolist(), tokens, _short(logprobs), strict=True))
                for ids, tokens, logprobs in top
            ],
            "attention": base64.b64encode(weights.tobytes()).decode(),
        }
        template = (
            resources.files("gpt2_jax.interpret")
            .joinpath("explain.html")
            .read_text("utf-8")
        )
        return template.replace("__DATA__", _json_in_html(data))

    def save(self, path: str | Path) -> None:
        """Writes the page of `to_html`."""
        user_path(path).write_text(self.to_html(), encoding="utf-8")

    def __repr__(self) -> str:
        return f"<Explanation of {len(self.tokens)} tokens>"

    def _repr_html_(self) -> str:
        page = html.escape(self.to_html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="explanation" '
            'style="width:100%;height:60em;border:0"></iframe>'
        )


def explain(
    model: GPT2,
    params: Params,
    token_ids: Sequence[int],
    token_bytes: Sequence[bytes] | None,
    *,
    n_valid: int,
    top_k: int = 10,
) -> Explanation:
    """Runs the model over a text once and keeps what it computed.

    Args:
      token_ids: of the text, T >= 1.
      token_bytes: what each id stands for; None: ids are shown as numbers.
      n_valid: ids from here on pad the vocabulary and have no probability.
      top_k: alternatives to keep for each token.

    Raises:
      ValueError: when T exceeds n_positions; when attention has more than MOST_WEIGHTS
        weights in all; when top_k is not in [1, MOST_ALTERNATIVES]; when the model
        gives logits that are NaN or infinite.
    """
    cfg, T = model.cfg, len(token_ids)
    top_k = integer("top_k", top_k)
    if not 1 <= top_k <= MOST_ALTERNATIVES:
        raise ValueError(f"{top_k=} must be in [1, {MOST_ALTERNATIVES}]")
    if T > cfg.n_positions:
        raise ValueError(f"{T} tokens exceed n_positions={cfg.n_positions}")
    heads = cfg.n_layer * cfg.n_head
    if heads * T * (T + 1) // 2 > MOST_WEIGHTS:
        most = (math.isqrt(8 * (MOST_WEIGHTS // heads) + 1) - 1) // 2
        raise ValueError(
            f"{T} tokens exceed the {most} whose attention in {cfg.n_layer} layers of "
            f"{cfg.n_head} heads a page can hold"
        )
    ids_T = np.asarray(token_ids, np.int32)
    top_k = min(top_k, n_valid)
    kept = _explain(model, params, ids_T, n_valid=n_valid, top_k=top_k)
    logprobs, ranks, entropies, top_logprobs, top_ids, attention = map(np.asarray, kept)
    if not np.isfinite(entropies).all():
        raise ValueError(NOT_FINITE_MESSAGE)
    write = partial(_written, token_bytes)
    return Explanation(
        config=cfg,
        vocab_size=n_valid,
        token_ids=ids_T,
        tokens=[write(i) for i in ids_T.tolist()],
        logprobs=logprobs,
        ranks=ranks,
        entropies=entropies,
        top_ids=top_ids,
        top_tokens=[[write(i) for i in row] for row in top_ids.tolist()],
        top_logprobs=top_logprobs,
        attention=attention,
    )


@partial(jax.jit, static_argnames=("model", "n_valid", "top_k"))
def _explain(model, params, ids_T, *, n_valid, top_k):
    logits_BTV, attention_NBHTT = attention_weights(model, params, ids_T[None])
    logp_TV = jax.nn.log_softmax(logits_BTV[0, :, :n_valid], axis=-1)
    entropies = -jnp.sum(jnp.exp(logp_TV) * logp_TV, axis=-1)
    text = jnp.take_along_axis(logp_TV[:-1], ids_T[1:, None], axis=1)
    ranks = 1 + jnp.sum(logp_TV[:-1] > text, axis=1)
    top = jax.lax.top_k(logp_TV, top_k)
    return text[:, 0], ranks, entropies, *top, attention_NBHTT[:, 0]


def _written(token_bytes: Sequence[bytes] | None, i: int) -> str:
    if token_bytes is None:
        return f"{i} "
    return token_bytes[i].decode("utf-8", errors="backslashreplace")


def _describe(cfg: GPT2Config) -> str:
    return (
        f"{cfg.n_layer} layers, {cfg.n_head} heads, width {cfg.n_embd}, "
        f"vocabulary {cfg.vocab_size}"
    )


def _short(x: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in x]


def _json_in_html(data: dict[str, Any]) -> str:
    """JSON that holds none of the characters that HTML gives a meaning to."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@partial(jax.jit, static_argnames="model")
def attention_weights(
    model: GPT2, params: Params, tokens_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits [B, T, V] and attention [N, B, H, T, T] of whole sequences, in float32.

    What `c_attn` gives is captured as the model runs, and scores and softmax are
    computed from it once more: no backend of attention keeps them. Row t of a head says
    how much position t takes from each position up to its own.

    Raises:
      ValueError: when T exceeds n_positions.
    """
    layers = model.clone(scan_layers=False, remat="none")
    (logits_BTV, _), kept = layers.apply(
        {"params": params},
        tokens_BT,
        capture_intermediates=lambda module, _: module.name == "c_attn",
        mutable=["intermediates"],
    )
    blocks, weights = kept["intermediates"], []
    for i in range(model.cfg.n_layer):
        (qkv_BT3HK,) = blocks[f"{LAYER}{i}"]["attn"]["c_attn"]["__call__"]
        q_BTHK, k_BTHK = qkv_BT3HK[:, :, 0], qkv_BT3HK[:, :, 1]
        scale = model.cfg.attention_scale(i)
        weights.append(causal_weights(q_BTHK, k_BTHK, scale=scale))
    return logits_BTV, jnp.stack(weights)
