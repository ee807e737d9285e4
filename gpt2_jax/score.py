"""Log-probabilities of given tokens: batched by length, no logits held.

Logits are made for the targets alone, some at a time.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2_jax import sharding
from gpt2_jax.attention import cache_dtype
from gpt2_jax.cache import KVCache
from gpt2_jax.generate import apply, power_of_two
from gpt2_jax.losses import token_log_probs
from gpt2_jax.model import GPT2, Params


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of given tokens.

    Attributes:
      token_ids: int32 [n].
      logprobs: float32 [n], in nats, of each given those before it.
      is_greedy: bool [n], whether no token is more probable in its place.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    is_greedy: np.ndarray

    @property
    def total(self) -> float:
        """Log-probability of all tokens in nats, summed in float64."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token; NaN without one."""
        if not len(self.logprobs):
            return math.nan
        return float(np.exp(-self.total / len(self.logprobs)))


class Row(NamedTuple):
    """Ids of which the last `n_scored` are scored, each given all before it."""

    ids: Sequence[int] | np.ndarray
    n_scored: int


def sliding_rows(
    ids: Sequence[int] | np.ndarray, n_positions: int, stride: int
) -> list[Row]:
    """All of `ids` but the first as targets, once each, in windows.

    The first window scores `n_positions` targets, each later one `stride` more (the
    last: what is left), given as many tokens before them as the context holds.

    Raises:
      ValueError: when stride isn't in [1, n_positions].
    """
    if not 1 <= stride <= n_positions:
        raise ValueError(f"{stride=} must be in [1, {n_positions}], the context")
    rows, done, n = [], 0, len(ids) - 1
    while done < n:
        end = min(n, done + stride if done else n_positions)
        rows.append(Row(ids[max(0, end - n_positions) : end + 1], end - done))
        done = end
    return rows


def batch_tokens() -> int:
    """That go through the model at a time: on a CPU, enough to keep it busy."""
    return 2**9 if jax.default_backend() == "cpu" else 2**15


def score_rows(
    model: GPT2,
    params: Params,
    rows: Sequence[Row],
    *,
    n_valid: int,
    mesh: Mesh | None = None,
    batch_size: int | None = None,
) -> Iterator[tuple[int, Score]]:
    """(index, score) of each row, in the order in which they are done.

    Rows whose ids before the scored ones are the same go together, and what these have
    in common goes through the model once.

    Args:
      rows: of at most n_positions ids before the last, `n_scored` >= 1 of them targets.
      n_valid: ids from here on pad the vocabulary and have no probability.
      batch_size: rows at a time; None: as many as suit their length and the device.

    Raises:
      ValueError: on a row that is too long or has too few ids, before anything runs.
    """
    limit = model.cfg.n_positions
    for i, row in enumerate(rows):
        if len(row.ids) - 1 > limit:
            raise ValueError(
                f"row {i}: {len(row.ids) - 1} tokens before the last exceed "
                f"n_positions={limit}"
            )
        if not 1 <= row.n_scored < len(row.ids):
            raise ValueError(f"row {i}: {row.n_scored} of {len(row.ids)} ids scored")
    scorer = _Scorer(model, params, n_valid, mesh, batch_size)
    waiting: tuple[list[int], tuple[jax.Array, jax.Array]] | None = None
    for some, result in scorer.run(rows):
        if waiting is not None:  # one batch runs, one waits
            yield from _collect(rows, *waiting)
        waiting = some, result
    if waiting is not None:
        yield from _collect(rows, *waiting)


def _collect(
    rows: Sequence[Row], indices: list[int], result: tuple[jax.Array, jax.Array]
) -> Iterator[tuple[int, Score]]:
    logprob_BS, is_greedy_BS = map(np.asarray, result)
    for b, i in enumerate(indices):
        ids, n = rows[i]
        targets = np.asarray(ids[-n:], np.int32)
        yield i, Score(targets, logprob_BS[b, :n].copy(), is_greedy_BS[b, :n].copy())


def length_bucket(length: int, limit: int, *, per_octave: int = 8) -> int:
    """The least of `per_octave` lengths between powers of two that will do: a multiple
    of 8, or the limit."""
    step = max(8, power_of_two(length) // 2 // per_octave)
    return min(-(-length // step) * step, limit)


_Batches = Iterator[tuple[list[int], tuple[jax.Array, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class _Scorer:
    model: GPT2
    params: Params
    n_valid: int
    mesh: Mesh | None
    batch_size: int | None

    def run(self, rows: Sequence[Row]) -> _Batches:
        """Indices of rows with their log-probabilities [B, S], on the left of each row,
        and whether they are greedy; rows of B beyond the indices pad it."""
        groups: dict[bytes, list[int]] = {}
        for i, (ids, n) in enumerate(rows):
            groups.setdefault(np.asarray(ids[:-n], np.int64).tobytes(), []).append(i)
        shared = [g for g in groups.values() if len(g) > 1 and _n_before(rows[g[0]])]
        taken = {i for group in shared for i in group}
        yield from self._alone(rows, [i for i in range(len(rows)) if i not in taken])
        yield from self._shared(rows, shared)

    def _alone(self, rows: Sequence[Row], indices: list[int]) -> _Batches:
        limit = self.model.cfg.n_positions
        order = sorted(indices, key=lambda i: -len(rows[i].ids))
        start = 0
        while start < len(order):
            T = length_bucket(len(rows[order[start]].ids) - 1, limit)
            B = self.batch_size or max(1, min(batch_tokens() // T, len(order)))
            some = order[start : start + B]
            start += B
            B = self._spread(B)
            tokens_BT = _padded([rows[i].ids[:-1] for i in some], B, T)
            S = min(power_of_two(max(rows[i].n_scored for i in some)), T)
            at_BS = _padded(
                [
                    np.arange(len(ids) - 1 - n, len(ids) - 1)
                    for ids, n in (rows[i] for i in some)
                ],
                *(B, S),
            )
            hidden_BTD = _hidden(self.model, self.params, *self._place(tokens_BT))
            yield some, self._log_probs([rows[i] for i in some], hidden_BTD, at_BS)

    def _shared(self, rows: Sequence[Row], groups: list[list[int]]) -> _Batches:
        """Each group's common ids but the last go into a cache first."""
        limit = self.model.cfg.n_positions

        def size(group: list[int]) -> tuple[int, int]:
            longest = max(rows[i].n_scored for i in group)
            before = length_bucket(_n_before(rows[group[0]]), limit, per_octave=2)
            return length_bucket(longest, limit, per_octave=2), before

        order = sorted(groups, key=size, reverse=True)
        while order:
            (K, P), n_rows = size(order[0]), len(order[0])
            most = self.batch_size or batch_tokens() // (K + P // n_rows)
            G = self._spread(max(1, min(most // n_rows, len(groups))))
            some: list[list[int]] = []
            while (
                order
                and len(some) < G
                and sum(map(len, some)) + len(order[0]) <= G * n_rows
                and size(order[0])[0] == K
            ):
                some.append(order.pop(0))
            indices = [i for group in some for i in group]
            R = G * n_rows
            befores = [
                rows[group[0]].ids[: _n_before(rows[group[0]])] for group in some
            ]
            inputs_RK = _padded(
                [rows[i].ids[_n_before(rows[i]) : -1] for i in indices], R, K
            )
            owner_R, length_R = np.zeros((2, R), np.int32)
            owner_R[: len(indices)] = [g for g, group in enumerate(some) for _ in group]
            length_R[: len(indices)] = [_n_before(rows[i]) for i in indices]
            cache = _prefill(
                self.model, self.params, *self._place(_padded(befores, G, P)), self.mesh
            )
            hidden_RKD = _extend(
                self.model,
                self.params,
                cache,
                *self._place(inputs_RK, owner_R, length_R),
                self.mesh,
            )
            at_RK = np.broadcast_to(np.arange(K, dtype=np.int32), (R, K))
            yield (
                indices,
                self._log_probs([rows[i] for i in indices], hidden_RKD, at_RK),
            )

    def _log_probs(
        self, rows: Sequence[Row], hidden_BTD: jax.Array, at_BS: np.ndarray
    ) -> tuple[jax.Array, jax.Array]:
        targets_BS = _padded([ids[-n:] for ids, n in rows], *at_BS.shape)
        arrays = self._place(at_BS, targets_BS)
        wte = self.params["wte"]
        return _log_probs(wte, hidden_BTD, *arrays, self.n_valid, self.mesh)

    def _spread(self, n: int) -> int:
        """At least n, and a multiple of the devices that rows lie on."""
        shards = 1 if self.mesh is None else sharding.n_batch_shards(self.mesh)
        return -(-n // shards) * shards

    def _place(self, *arrays: np.ndarray) -> tuple[Any, ...]:
        if self.mesh is None:
            return arrays
        return jax.device_put(arrays, sharding.row_shardings(arrays, self.mesh))


def _n_before(row: Row) -> int:
    """Ids before the one that the first target is predicted from."""
    return len(row.ids) - row.n_scored - 1


def _padded(rows: Sequence[Any], B: int, T: int) -> np.ndarray:
    """int32 [B, T]."""
    array_BT = np.zeros((B, T), np.int32)
    for b, row in enumerate(rows):
        array_BT[b, : len(row)] = row
    return array_BT


# --- Compiled programs ----------------------------------------------------------------


@partial(jax.jit, static_argnames="model")
def _hidden(model, params, tokens_BT):
    """[B, T, D]. On a CPU as prompts are, by blocks that look at no later keys."""
    B, T = tokens_BT.shape
    cache = None
    if jax.default_backend() == "cpu":
        empty = KVCache.empty(model.cfg, B, T, cache_dtype(model.dtype))
        cache = empty.replace(start=0)
    return apply(model, params, tokens_BT, cache, method="hidden")[0]


@partial(jax.jit, static_argnames=("model", "mesh"))
def _prefill(model, params, tokens_GP, mesh):
    G, P = tokens_GP.shape
    empty = KVCache.empty(model.cfg, G, P, cache_dtype(model.dtype))
    cache = empty.replace(start=0)
    _, cache = apply(model, params, tokens_GP, cache, method="hidden")
    return _constrain(cache.replace(start=None), mesh)


@partial(jax.jit, static_argnames=("model", "mesh"))
def _extend(model, params, cache, tokens_RK, owner_R, length_R, mesh):
    """[R, K, D], each row after `length_R` tokens of the row `owner_R` of the cache."""
    own = jax.tree.map(lambda x: jnp.take(x, owner_R, axis=0), cache)
    own = own.resize(cache.size + tokens_RK.shape[1]).replace(length_B=length_R)
    own = _constrain(own, mesh)
    return apply(model, params, tokens_RK, own, method="hidden")[0]


def _constrain(tree: Any, mesh: Mesh | None) -> Any:
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, sharding.row_shardings(tree, mesh))


@partial(jax.jit, static_argnames=("n_valid", "mesh"))
def _log_probs(wte, hidden_BTD, at_BS, targets_BS, n_valid, mesh):
    """Of targets that are predicted from the places `at_BS` of the rows."""
    hidden_BSD = jnp.take_along_axis(hidden_BTD, at_BS[..., None], axis=1)
    result = token_log_probs(
        hidden_BSD,
        wte["embedding"],
        targets_BS,
        scale_V=wte.get("scale"),
        n_valid=n_valid,
        mesh=mesh,
    )
    if mesh is None:
        return result
    return jax.lax.with_sharding_constraint(result, sharding.replicated(mesh))
