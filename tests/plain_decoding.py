"""What docs/sampling.md says, in plain Python: a row at a time, no cache, float64.

It knows the model's parameters, the tokenizer's table and the options as a dict. Of the
code under test it takes the draw itself (the key's derivation and `draw_token`), so
that drawn tokens can be compared; what may be drawn, it works out alone.
"""

import codecs
import dataclasses
import itertools
import math

import jax
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.decoding.sampling import draw_token

# Where two numbers that decide are nearer than this, float32 may rightly decide
# otherwise: logits are of size 5, and a sum of such in float32 is right to 1e-5.
NEAR = 2e-4


class Undecided(Exception):
    """Rounding decides here."""


# --- The model ------------------------------------------------------------------------


def reference_logits(cfg: GPT2Config, params, tokens):
    """GPT-2 written out in float64, independently of the model under test."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, w):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.layer_norm_epsilon)
        return x * w["scale"] + w["bias"]

    D, H, T = cfg.n_embd, cfg.n_head, tokens.shape[1]
    x = p["wte"]["embedding"][tokens] + p["wpe"]["embedding"][:T]
    for i in range(cfg.n_layer):
        h = p[f"h_{i}"]
        attn, mlp = h["attn"], h["mlp"]
        qkv = norm(x, h["ln_1"]) @ attn["c_attn"]["kernel"].reshape(D, 3 * D)
        q, k, v = np.split(qkv + attn["c_attn"]["bias"], 3, axis=-1)
        q, k, v = (
            y.reshape(*y.shape[:2], H, -1).transpose(0, 2, 1, 3) for y in (q, k, v)
        )
        s = q @ k.transpose(0, 1, 3, 2) / math.sqrt(D // H)
        s = np.where(np.tril(np.ones((T, T), bool)), s, -np.inf)
        s = np.exp(s - s.max(-1, keepdims=True))
        a = (s / s.sum(-1, keepdims=True)) @ v
        a = a.transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + a @ attn["c_proj"]["kernel"].reshape(D, D) + attn["c_proj"]["bias"]
        u = norm(x, h["ln_2"]) @ mlp["c_fc"]["kernel"] + mlp["c_fc"]["bias"]
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + u @ mlp["c_proj"]["kernel"] + mlp["c_proj"]["bias"]
    return norm(x, p["ln_f"]) @ p["wte"]["embedding"].T


class PlainModel:
    """`logits(ids)` are those of the next token."""

    def __init__(self, cfg, params):
        self.cfg, self.n_positions, self._known = cfg, cfg.n_positions, {}
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def logits(self, ids):
        assert 1 <= len(ids) <= self.n_positions
        key = tuple(ids)
        if key not in self._known:
            all_BTV = reference_logits(self.cfg, self.params, np.array([ids]))
            self._known[key] = all_BTV[0, -1]
        return self._known[key]


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def log_softmax(x):
    return x - x.max() - math.log(np.exp(x - x.max()).sum())


# --- Steps 2 to 8: edits --------------------------------------------------------------


def edit(x, o, tokenizer, ends, prompt, new, window, state, table):
    """The logits (of beams: log-probabilities) after the edits, by the page's order.

    Args:
      window: the tokens of prompt and text that are still in the context.
    """
    x = x.copy()
    if (allowed := o.get("allowed_tokens")) is not None and np.ndim(allowed) == 1:
        allowed = np.asarray(allowed)
        ids = np.flatnonzero(allowed) if allowed.dtype == bool else allowed
        x[[i for i in range(len(x)) if i not in ids]] = -np.inf
    for i, bias in o.get("logit_bias", {}).items():
        x[i] += bias
    words = []
    for word in o.get("bad_words", ()):
        if isinstance(word, str):
            words += [tokenizer.encode(word), tokenizer.encode(" " + word)]
        else:
            words.append(list(word))
    x[[word[0] for word in words if len(word) == 1]] = -np.inf
    penalty = o.get("repetition_penalty", 1.0)
    for i in {*prompt, *new}:
        x[i] = x[i] / penalty if x[i] > 0 else x[i] * penalty
    for i in set(new):
        x[i] -= o.get("presence_penalty", 0.0)
        x[i] -= o.get("frequency_penalty", 0.0) * new.count(i)
    n = o.get("no_repeat_ngram_size", 0)
    for at in range(len(window) - n + 1 if n else 0):
        *before, last = window[at : at + n]
        if before == window[len(window) - n + 1 :]:
            x[last] = -np.inf
    for *before, last in words:
        if before and window[-len(before) :] == before:
            x[last] = -np.inf
    if table is not None:
        x[table[state] < 0] = -np.inf
    if len(new) < o.get("min_new_tokens", 0):
        x[list(ends)] = -np.inf
    return x


# --- Steps 9 to 15: filters and the draw ----------------------------------------------


def _clear(values, threshold, near=NEAR):
    values = np.asarray(values)
    if (np.abs(values[np.isfinite(values)] - threshold) < near).any():
        raise Undecided


def _fewest(order, probs, p):
    """The first of `order` that reach p together."""
    total = np.cumsum(probs[order])
    _clear(total, p, 1e-5)
    return order[: int((total < p).sum()) + 1]


def filtered(x, o):
    """The logits that are drawn from."""
    x = x / o.get("temperature", 1.0)

    def keep(ids):
        kept = np.full_like(x, -np.inf)
        kept[ids] = x[ids]
        return kept

    k = o.get("top_k", 0)
    if 0 < k < np.isfinite(x).sum():
        ordered = np.sort(x)[::-1]
        if 0 < ordered[k - 1] - ordered[k] < NEAR:
            raise Undecided
        x = keep(np.flatnonzero(x >= ordered[k - 1]))
    if (p := o.get("top_p", 1.0)) < 1:
        order = np.argsort(-x, kind="stable")
        chosen = _fewest(order, softmax(x), p)
        if len(chosen) < len(x):
            _clear(x[order[len(chosen)]], x[chosen[-1]])
        x = keep(chosen)
    if (p := o.get("min_p", 0.0)) > 0:
        _clear(x - x.max(), math.log(p))
        x = keep(np.flatnonzero(x - x.max() >= math.log(p)))
    if (p := o.get("typical_p", 1.0)) < 1:
        probs = softmax(x)
        surprise = np.full_like(x, np.inf)
        surprise[probs > 0] = -np.log(probs[probs > 0])
        mean = (probs[probs > 0] * surprise[probs > 0]).sum()
        far = np.abs(surprise - mean)
        order = np.argsort(far, kind="stable")
        chosen = _fewest(order, probs, p)
        if len(chosen) < len(x):
            _clear(far[order[len(chosen)]], far[chosen[-1]])
        x = keep(chosen)
    return x


@jax.jit
def _draw(x_V, seed, row, sequence, n):
    key = jax.random.key(seed)
    for number in (row, sequence, n):
        key = jax.random.fold_in(key, number)
    return draw_token(x_V[None], key[None])[0]


def drawn(x, draw, n):
    """The token that the key of this draw chooses."""
    numbers = [np.uint32(i) for i in (*draw, n)]
    token = int(_draw(np.asarray(x, np.float32), *numbers))
    noise = np.random.default_rng(0)
    for _ in range(2):
        near = x + NEAR * noise.uniform(-1, 1, len(x))
        if int(_draw(np.asarray(near, np.float32), *numbers)) != token:
            raise Undecided
    return token


# --- A row ----------------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    """What comes of a prompt."""

    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[dict[int, float]] = dataclasses.field(default_factory=list)
    finish: str = ""
    text: str = ""
    n_followed: int = 0  # tokens at which rounding decides, taken as they came


def is_greedy(o):
    return o.get("do_sample") is False or o.get("temperature") == 0


def limit_of(o, prompt):
    if "max_length" in o:
        return o["max_length"] - len(prompt)
    return o.get("max_new_tokens", max(100, o.get("min_new_tokens", 0)))


def decode(model, tokenizer, prompt, o, draw, *, n_top=0, table=None, follow=()):
    """A row from its prompt to its end.

    Args:
      draw: (seed, number of the prompt, number of the text).
      follow: the tokens that the code under test gave: where rounding decides, its
        token is taken. Raises Undecided where it gave none.
    """
    V, row, state, start = tokenizer.vocab_size, Plain(), 0, 0
    ends = {tokenizer.eot_id, *o.get("stop_token_ids", ())} - {None}
    edges = [0]
    while True:
        if len(row.ids) >= limit_of(o, prompt):
            row.finish = "length"
            break
        window = (prompt + row.ids)[start:]
        if len(window) >= model.n_positions:
            start += len(window) - model.n_positions // 2
            window = (prompt + row.ids)[start:]
        logits = model.logits(window)[:V]
        x = edit(logits, o, tokenizer, ends, prompt, row.ids, window, state, table)
        if not np.isfinite(x).any():
            row.finish = "exhausted"
            break
        try:
            if is_greedy(o):
                ordered = np.sort(x)
                if 0 < ordered[-1] - ordered[-2] < NEAR:
                    raise Undecided
                token = int(x.argmax())
            else:
                token = drawn(filtered(x, o), draw, len(row.ids))
        except Undecided:
            if len(row.ids) >= len(follow):
                raise
            token = follow[len(row.ids)]
            assert x[token] > -np.inf
            row.n_followed += 1
        if token in ends:
            row.finish = "stop"
            break
        logp = log_softmax(logits)
        row.ids.append(token)
        row.logprobs.append(logp[token])
        best = np.argsort(-logp, kind="stable")[:n_top]
        row.top.append({int(i): logp[i] for i in best})
        state = 0 if table is None else table[state, token]
        edges.append(edges[-1] + len(tokenizer.token_bytes[token]))
        if (at := _stop(tokenizer, row.ids, edges, o)) is not None:
            n = sum(begin < at for begin in edges[:-1])
            row.ids, row.logprobs, row.top = row.ids[:n], row.logprobs[:n], row.top[:n]
            row.finish, row.text = "stop", _text(tokenizer, row.ids)[:at]
            # a character that is not whole is not given out before a stop string
            row.text = codecs.getincrementaldecoder("utf-8")("replace").decode(row.text)
            return row
    row.text = _text(tokenizer, row.ids).decode(errors="replace")
    return row


def _text(tokenizer, ids):
    return b"".join(tokenizer.token_bytes[i] for i in ids)


def _stop(tokenizer, ids, edges, o):
    """The byte at which the text ends, if a stop string is in it."""
    stops = o.get("stop", ())
    stops = [stops] if isinstance(stops, str) else stops
    first = edges[min(o.get("min_new_tokens", 0), len(ids))]
    text = _text(tokenizer, ids)
    found = [text.find(s.encode(), first) for s in stops]
    return min((at for at in found if at >= 0), default=None)


# --- Beams ----------------------------------------------------------------------------


def beams(model, tokenizer, prompt, o, *, table=None):
    """(score, ids, log-probabilities, finish) of hypotheses, best first."""
    V, M, n = tokenizer.vocab_size, o["num_beams"], limit_of(o, prompt)
    power, stopping = o.get("length_penalty", 1.0), o.get("early_stopping", False)
    ends = {tokenizer.eot_id, *o.get("stop_token_ids", ())} - {None}
    alive, pool = [(0.0, [], [], 0)], []
    for length in range(1, n + 1):
        children = []
        for total, new, logps, state in alive:
            window = prompt + new
            logp = log_softmax(model.logits(window)[:V])
            x = edit(logp, o, tokenizer, ends, prompt, new, window, state, table)
            children += [
                (
                    total + x[t],
                    [*new, t],
                    [*logps, logp[t]],
                    0 if table is None else table[state, t],
                )
                for t in np.flatnonzero(x > -np.inf).tolist()
            ]
        children.sort(key=lambda c: -c[0])
        _apart(children, M)
        for total, new, logps, _ in children[:M]:
            score = total / length**power
            if new[-1] in ends:
                pool.append((score, new[:-1], logps[:-1], "stop"))
            elif length == n:
                pool.append((score, new, logps, "length"))
        pool.sort(key=lambda h: -h[0])
        _apart(pool, M)
        pool = pool[:M]
        going = [c for c in children if c[1][-1] not in ends]
        _apart(going, M)
        alive = going[:M]
        if not alive:
            break
        if len(pool) == M:
            if stopping is True:
                break
            longest = n if stopping == "never" and power > 0 else length
            best = alive[0][0] / longest**power
            if abs(best - pool[-1][0]) < NEAR:
                raise Undecided
            if best < pool[-1][0]:
                break
    for better, worse in itertools.pairwise(pool):
        if better[0] - worse[0] < NEAR:
            raise Undecided
    return pool[: o.get("num_return_sequences", 1)]


def _apart(scored, n):
    if len(scored) > n and scored[n - 1][0] - scored[n][0] < NEAR:
        raise Undecided
