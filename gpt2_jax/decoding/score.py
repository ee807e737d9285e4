"""Log-probabilities of given tokens: packed into windows, no logits held.

Many rows share a window, as segments that don't see each other, and what rows begin
with in common stands in it once. Logits are made for the targets alone, some at a time.
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

from gpt2_jax.checks import integer, is_list, items, shown, token_ids
from gpt2_jax.data.sft import pack
from gpt2_jax.decoding.buckets import power_of_two
from gpt2_jax.decoding.requests import check_ids
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2
from gpt2_jax.ops.losses import token_log_probs
from gpt2_jax.runtime import sharding
from gpt2_jax.runtime.platform import on_cpu


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
    stride = integer("stride", stride)
    if not 1 <= stride <= n_positions:
        raise ValueError(f"{stride=} must be in [1, {n_positions}], the context")
    rows, done, n = [], 0, len(ids) - 1
    while done < n:
        end = min(n, done + stride if done else n_positions)
        rows.append(Row(ids[max(0, end - n_positions) : end + 1], end - done))
        done = end
    return rows


WINDOW = 512  # tokens, where nothing is longer
MIN_WINDOW = 32


def _tokens() -> int:
    """Tokens of all windows that go through a device together."""
    return 2**10 if on_cpu() else 2**15


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

    Rows whose ids before the scored ones are the same go together, and these ids go
    through the model once.

    Args:
      rows: of at most n_positions ids before the last, `n_scored` >= 1 of them targets.
      n_valid: ids from here on pad the vocabulary and have no probability.
      batch_size: windows at a time; None: as many as suit the device.

    Raises:
      ValueError: on a row that is too long or has too few ids, before anything runs.
    """
    limit = model.cfg.n_positions
    rows = [_checked_row(i, row, n_valid) for i, row in enumerate(items("rows", rows))]
    if batch_size is not None and integer("batch_size", batch_size) < 1:
        raise ValueError(f"{batch_size=} must be >= 1")
    for i, row in enumerate(rows):
        if len(row.ids) - 1 > limit:
            raise ValueError(
                f"row {i}: {len(row.ids) - 1} tokens before the last exceed "
                f"n_positions={limit}"
            )
        if not 1 <= row.n_scored < len(row.ids):
            raise ValueError(f"row {i}: {row.n_scored} of {len(row.ids)} ids scored")
    stems = _stems(rows, limit)
    lengths = [stem.length for stem in stems]
    short = min(limit, max(MIN_WINDOW, power_of_two(min(WINDOW, sum(lengths)))))
    waiting: tuple[list[_Place], tuple[jax.Array, jax.Array]] | None = None
    for T, is_long in ((limit, True), (short, False)):
        held = [s for s in stems if (s.length > short) == is_long]
        packed = pack([stem.length for stem in held], T)
        B = max(1, min(batch_size or _tokens() // T, len(packed)))
        shards = 1 if mesh is None else sharding.n_batch_shards(mesh)
        B = -(-B // shards) * shards
        for first in range(0, len(packed), B):
            windows = [[held[i] for i in w] for w in packed[first : first + B]]
            arrays, places = _lay_out(rows, windows, B, T)
            if mesh is not None:
                arrays = jax.device_put(arrays, sharding.row_shardings(arrays, mesh))
            tokens_BT, segment_BT2, *targets = arrays
            hidden_BTD = _hidden(model, params, tokens_BT, segment_BT2)
            result = _log_probs(params["wte"], hidden_BTD, *targets, n_valid, mesh)
            if waiting is not None:  # one batch runs, one waits
                yield from _collect(rows, *waiting)
            waiting = places, result
    if waiting is not None:
        yield from _collect(rows, *waiting)


def _checked_row(i: int, row: Any, n_valid: int) -> Row:
    if not is_list(row) or len(row) != 2:
        raise ValueError(f"row {i}: {shown(row)} is not (ids, number of scored ones)")
    ids = token_ids(f"row {i}: ids", row[0])
    check_ids(ids, n_valid)
    return Row(ids, integer(f"row {i}: n_scored", row[1]))


class _Stem(NamedTuple):
    """Rows with the same ids before their first target's, and how long they are
    together."""

    indices: list[int]
    length: int


class _Place(NamedTuple):
    """Where a row's targets are in a batch's results."""

    row: int
    b: int
    start: int


def _stems(rows: Sequence[Row], limit: int) -> list[_Stem]:
    """What does not fit into `limit` tokens is cut into several."""
    groups: dict[bytes | int, list[int]] = {}
    for i, (ids, n) in enumerate(rows):
        before = np.asarray(ids[: -n - 1], np.int64).tobytes()
        groups.setdefault(before or i, []).append(i)  # nothing is nothing in common
    stems = []
    for group in groups.values():
        n_before = _n_before(rows[group[0]])
        indices, length = list[int](), n_before
        for i in group:
            if length + rows[i].n_scored > limit:
                stems.append(_Stem(indices, length))
                indices, length = [], n_before
            indices.append(i)
            length += rows[i].n_scored
        stems.append(_Stem(indices, length))
    return stems


def _n_before(row: Row) -> int:
    """Ids before the one that the first target is predicted from."""
    return len(row.ids) - row.n_scored - 1


def _lay_out(
    rows: Sequence[Row], windows: list[list[_Stem]], B: int, T: int
) -> tuple[tuple[np.ndarray, ...], list[_Place]]:
    """Tokens [B, T], segments [B, T, 2], targets and their places [B, S]."""
    most = max(sum(rows[i].n_scored for s in w for i in s.indices) for w in windows)
    S = min(T, -(-most // (step := max(8, power_of_two(most) // 8))) * step)
    tokens_BT, (targets_BS, at_BS) = np.zeros((B, T), int), np.zeros((2, B, S), int)
    segment_BT2 = np.full((B, T, 2), -1)
    places = []
    for b, window in enumerate(windows):
        at, start, segment = 0, 0, 0
        for stem in window:
            before, trunk = rows[stem.indices[0]], segment
            n = _n_before(before)
            tokens_BT[b, at : at + n] = before.ids[:n]
            segment_BT2[b, at : at + n] = trunk
            at += n
            for i in stem.indices:
                ids, n = rows[i]
                segment += 1
                tokens_BT[b, at : at + n] = ids[-n - 1 : -1]
                segment_BT2[b, at : at + n] = segment, trunk
                targets_BS[b, start : start + n] = ids[-n:]
                at_BS[b, start : start + n] = np.arange(at, at + n)
                places.append(_Place(i, b, start))
                at, start = at + n, start + n
            segment += 1
    arrays = tokens_BT, segment_BT2, targets_BS, at_BS
    return tuple(x.astype(np.int32) for x in arrays), places


def _collect(
    rows: Sequence[Row], places: list[_Place], result: tuple[jax.Array, jax.Array]
) -> Iterator[tuple[int, Score]]:
    logprob_BS, is_greedy_BS = map(np.asarray, result)
    for i, b, start in places:
        ids, n = rows[i]
        there = b, slice(start, start + n)
        logprobs = logprob_BS[there].copy()
        if np.isnan(logprobs).any():  # comparisons would choose one in silence
            raise ValueError(
                f"row {i}: the model gives log-probabilities that are not numbers; are "
                "its parameters finite?"
            )
        scored = np.asarray(ids[-n:], np.int32)
        yield i, Score(scored, logprobs, is_greedy_BS[there].copy())


# Apart, for the model is compiled for each shape of windows alone.


@partial(jax.jit, static_argnames="model")
def _hidden(model, params, tokens_BT, segment_BT2):
    kept = {"segment_BT": segment_BT2, "method": "hidden"}
    return model.apply({"params": params}, tokens_BT, **kept)[0]


@partial(jax.jit, static_argnames=("n_valid", "mesh"))
def _log_probs(wte, hidden_BTD, targets_BS, at_BS, n_valid, mesh):
    """Scores targets that are predicted from the positions `at_BS` of the windows."""
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
