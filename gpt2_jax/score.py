"""Log-probabilities of given tokens: batched by length, no logits held."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2_jax import sharding
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
    return 2**10 if jax.default_backend() == "cpu" else 2**15


def score_rows(
    model: GPT2,
    params: Params,
    rows: Sequence[Row],
    *,
    n_valid: int,
    mesh: Mesh | None = None,
    batch_size: int | None = None,
) -> Iterator[tuple[int, Score]]:
    """(index, score) of each row, the longest first.

    Args:
      rows: of 1 to n_positions + 1 ids before the last, `n_scored` of them targets.
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
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    shards = 1 if mesh is None else sharding.n_batch_shards(mesh)
    waiting: tuple[list[int], tuple[jax.Array, jax.Array]] | None = None
    start = 0
    while start < len(order):
        T = length_bucket(len(rows[order[start]].ids) - 1, limit)
        B = batch_size or max(1, batch_tokens() // T)
        some = order[start : start + B]
        start += B
        result = _score_batch(
            model, params, [rows[i] for i in some], T, -(-B // shards) * shards,
            n_valid, mesh,
        )  # fmt: skip
        if waiting is not None:  # one batch runs, one waits
            yield from _collect(rows, *waiting)
        waiting = some, result
    if waiting is not None:
        yield from _collect(rows, *waiting)


def length_bucket(length: int, limit: int) -> int:
    """The least of eight lengths an octave, multiples of 8, that will do."""
    step = max(8, power_of_two(length) // 16)
    return min(-(-length // step) * step, limit)


def _score_batch(
    model: GPT2,
    params: Params,
    rows: Sequence[Row],
    T: int,
    B: int,
    n_valid: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [B, S] and whether greedy, each row's on the left."""
    S = min(power_of_two(max(row.n_scored for row in rows)), T)
    tokens_BT = np.zeros((B, T), np.int32)
    at_BS, targets_BS = np.zeros((2, B, S), np.int32)
    for b, (ids, n) in enumerate(rows):
        tokens_BT[b, : len(ids) - 1] = ids[:-1]
        at_BS[b, :n] = np.arange(len(ids) - 1 - n, len(ids) - 1)
        targets_BS[b, :n] = ids[-n:]
    arrays = tokens_BT, at_BS, targets_BS
    if mesh is not None:
        arrays = jax.device_put(arrays, sharding.row_shardings(arrays, mesh))
    tokens_BT, at_BS, targets_BS = arrays
    hidden_BTD = _hidden(model, params, tokens_BT, mesh)
    return _log_probs(params["wte"], hidden_BTD, at_BS, targets_BS, n_valid, mesh)


@partial(jax.jit, static_argnames=("model", "mesh"))
def _hidden(model, params, tokens_BT, mesh):
    hidden_BTD, _ = apply(model, params, tokens_BT, method="hidden")
    return sharding.constrain(hidden_BTD, mesh, sharding.BATCH)


@partial(jax.jit, static_argnames=("n_valid", "mesh"))
def _log_probs(wte, hidden_BTD, at_BS, targets_BS, n_valid, mesh):
    """Of targets whose places in the rows are `at_BS`."""
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


def _collect(
    rows: Sequence[Row], indices: list[int], result: tuple[jax.Array, jax.Array]
) -> Iterator[tuple[int, Score]]:
    logprob_BS, is_greedy_BS = map(np.asarray, result)
    for b, i in enumerate(indices):
        ids, n = rows[i]
        targets = np.asarray(ids[-n:], np.int32)
        yield i, Score(targets, logprob_BS[b, :n].copy(), is_greedy_BS[b, :n].copy())
