"""The host's side of decoding: requests take slots, and slots decode together.

A batch is a fixed number of slots. A request is prefilled into a free slot, all slots
decode together in a compiled loop, and a slot whose row has ended takes the next
request. The loop returns to the host when all rows have ended, when the host must look
at a row (its last token may complete a stop string), or when a row needs more cache.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.cache import KVCache
from gpt2_jax.decoding.buckets import MIN_CACHE, bucket, round_up
from gpt2_jax.decoding.forward import NOT_FINITE_MESSAGE
from gpt2_jax.decoding.programs import (
    decode,
    empty_cache,
    extend,
    first_token,
    insert,
    resize,
)
from gpt2_jax.decoding.requests import Continuation, Request
from gpt2_jax.decoding.speculative import NO_DRAFT, Draft
from gpt2_jax.decoding.state import (
    FINISH_REASONS,
    NOT_FINITE,
    RUNNING,
    STOP,
    DecodeState,
    new_state,
    pad_windows,
)
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2
from gpt2_jax.runtime.sharding import n_batch_shards, row_shardings

CHUNK = 512  # tokens of a prompt that go through the model at once
PREFILL_TOKENS = 8192  # tokens of all rows that are prefilled together


class Slots:
    """The rows of a batch; requests wait until one of them is free.

    Attributes:
      rows: the continuation in each slot, None where it is free.
      may_admit: whether requests may still be waiting.
    """

    def __init__(self, n_slots: int, requests: Iterable[Request]):
        self.rows: list[Continuation | None] = [None] * n_slots
        self.may_admit = True
        self._waiting = enumerate(requests)

    def admit(self) -> set[int]:
        """Moves requests into the free slots. Returns the slots they took."""
        admitted = set()
        free = [slot for slot, row in enumerate(self.rows) if row is None]
        for slot in free if self.may_admit else ():
            numbered = next(self._waiting, None)
            if numbered is None:
                self.may_admit = False
                break
            index, request = numbered
            started = time.perf_counter()
            self.rows[slot] = Continuation(index, request, started=started)
            admitted.add(slot)
        return admitted

    @property
    def occupied(self) -> dict[int, Continuation]:
        """The rows that are in a slot, by slot."""
        return {slot: row for slot, row in enumerate(self.rows) if row is not None}

    def release(self) -> None:
        """Frees the slots of rows that have ended."""
        for slot, row in self.occupied.items():
            if row.finish:
                row.ended = row.ended or time.perf_counter()
                self.rows[slot] = None


class Decoder:
    """Decodes requests in a fixed number of slots.

    Args:
      n_slots: rows that decode together.
      n_valid: ids from here on are padding of the vocabulary and never drawn.
      table_QV: int32, next states; for all requests. None: all tokens are allowed.
      n_top: alternatives that are recorded with each token.
      draft: the source of guesses; defaults to none: a token is decoded at a time.
      mesh: where the parameters live; rows are sharded over its batch axes.

    Attributes:
      steps: of the compiled loop, in all calls of `run` together.
    """

    def __init__(
        self,
        model: GPT2,
        params: Params,
        *,
        n_slots: int,
        n_valid: int,
        table_QV: np.ndarray | None = None,
        n_top: int = 0,
        draft: Draft = NO_DRAFT,
        mesh: Mesh | None = None,
    ):
        self.model, self.params, self.draft, self.mesh = model, params, draft, mesh
        self.n_shards = 1 if mesh is None else n_batch_shards(mesh)
        self.n_slots = round_up(n_slots, self.n_shards)
        self.n_valid = np.int32(n_valid)
        self.table_QV = table_QV
        self.n_top = n_top
        self.steps = 0

    def run(
        self, requests: Iterable[Request], *, n_steps: int = 2**30
    ) -> Iterator[list[Continuation]]:
        """Yields the rows that have changed, at least every `n_steps` tokens.

        A row comes for the last time when its `finish` is set. Between two calls the
        caller may set it, and shorten `ids`: the row ends then.

        Raises:
          ValueError: when the model gives logits that are NaN or infinite.
        """
        slots = Slots(self.n_slots, requests)
        state: DecodeState | None = None
        while True:
            new = slots.admit()
            rows = slots.occupied
            if not rows:
                return
            new |= {slot for slot, row in rows.items() if self._slide(row)}
            if len(new) == self.n_slots:
                state = None  # All that it holds is about to be replaced.
            size = self._cache_size(state, rows)
            if state is not None and size > state.cache.size:
                state = resize(state, size, mesh=self.mesh)
            if new or state is None:
                state = self._fill(state, rows, new, size)
            else:
                state, n = self._decode(state, n_steps, slots.may_admit)
                self.steps += int(n)
            finish_B = _collect(state, rows)
            yield list(rows.values())
            slots.release()
            if any(row.finish and finish_B[s] == RUNNING for s, row in rows.items()):
                ended_B = np.array([row is None for row in slots.rows])
                finish_B = np.where(ended_B, np.maximum(finish_B, STOP), finish_B)
                finish_B = jax.device_put(finish_B, state.finish_B.sharding)
                state = state.replace(finish_B=finish_B)

    def _slide(self, row: Continuation) -> bool:
        """Whether a row is at the end of the context: it goes on from its last half."""
        limit = self.model.cfg.n_positions
        full = row.length >= limit
        if full:
            row.window_start += row.length - limit // 2
        return full

    def _cache_size(
        self, state: DecodeState | None, rows: dict[int, Continuation]
    ) -> int:
        """Tokens for which the cache needs room in another step of all rows."""
        size = bucket(
            max(row.length for row in rows.values()) + 1 + self.draft.n_tokens,
            self.model.cfg.n_positions + self.draft.n_tokens,
            at_least=MIN_CACHE,
        )
        return size if state is None else max(size, state.cache.size)

    def _decode(
        self, state: DecodeState, n_steps: int, until_end: bool
    ) -> tuple[DecodeState, jax.Array]:
        return decode(
            self.model,
            self.params,
            state,
            self.n_valid,
            np.int32(n_steps),
            np.bool_(until_end),
            self.table_QV,
            draft_model=self.draft.model,
            draft_params=self.draft.params,
            n_draft=self.draft.n_tokens,
            mesh=self.mesh,
        )

    def _fill(
        self,
        state: DecodeState | None,
        rows: dict[int, Continuation],
        new: set[int],
        size: int,
    ) -> DecodeState:
        """The state with the new rows in their slots, the first token of each drawn."""
        order = sorted(new)
        group = self.n_shards  # Later rows come one by one, so that there is one shape.
        if state is None:
            longest = bucket(max(row.length for row in rows.values()), CHUNK)
            group = max(1, PREFILL_TOKENS // longest // group) * group
            if len(order) == self.n_slots <= group:
                return self._prefill([rows[slot] for slot in order], size)
            group = min(group, round_up(len(order), self.n_shards))
            state = self._empty_state(size)
        for start in range(0, len(order), group):
            # The last group reaches back, so that all have one shape.
            some = order[max(0, min(start, len(order) - group)) :][:group]
            some += some[-1:] * (group - len(some))
            part = self._prefill([rows[slot] for slot in some], size)
            state = insert(state, part, np.array(some, np.int32), mesh=self.mesh)
        return state

    def _empty_state(self, size: int) -> DecodeState:
        """The state of slots that are all free."""
        draft, draft_cache = self.draft, None
        cache = empty_cache(self.model, self.n_slots, size, mesh=self.mesh)
        if draft.model is not None:
            draft_cache = empty_cache(draft.model, self.n_slots, size, mesh=self.mesh)
        return self._new_state([], cache, draft_cache)

    def _prefill(self, rows: Sequence[Continuation], size: int) -> DecodeState:
        """The state of these rows, the first token of each drawn."""
        tokens_BS, length_B = pad_windows(rows, len(rows), size)
        cache, logits_BV = self._prefill_cache(
            self.model, self.params, tokens_BS, length_B
        )
        draft, draft_cache = self.draft, None
        if draft.model is not None and draft.params is not None:
            draft_cache, _ = self._prefill_cache(
                draft.model, draft.params, tokens_BS, length_B
            )
        return first_token(
            self._new_state(rows, cache, draft_cache),
            logits_BV,
            self.n_valid,
            self.table_QV,
            mesh=self.mesh,
        )

    def _prefill_cache(
        self, model: GPT2, params: Params, tokens_BS: np.ndarray, length_B: np.ndarray
    ) -> tuple[KVCache, jax.Array]:
        """A cache of these tokens, and the logits [B, V] after the last of each row."""
        B, size = tokens_BS.shape
        longest = int(length_B.max())
        cache = empty_cache(model, B, size, mesh=self.mesh)
        logits_BV = jnp.zeros((B, model.cfg.vocab_size), jnp.float32)
        for start in range(0, longest, CHUNK):
            T = bucket(min(longest - start, CHUNK), CHUNK)
            cache, logits_BV = extend(
                model,
                params,
                cache,
                tokens_BS[:, start : start + T],
                length_B,
                logits_BV,
                start=start,
                mesh=self.mesh,
            )
        return cache.replace(length_B=length_B), logits_BV

    def _new_state(
        self,
        rows: Sequence[Continuation],
        cache: KVCache,
        draft_cache: KVCache | None,
    ) -> DecodeState:
        return new_state(
            rows,
            self._put(cache),
            self._put(draft_cache),
            vocab_size=self.model.cfg.vocab_size,
            n_top=self.n_top,
            table_QV=self.table_QV,
            put=self._put,
        )

    def _put(self, tree: Any) -> Any:
        """Transfers arrays to the devices, with their rows sharded over the mesh."""
        if self.mesh is None:
            return jax.device_put(tree, jax.tree.leaves(self.params)[0].sharding)
        return jax.device_put(tree, row_shardings(tree, self.mesh))


def _collect(state: DecodeState, rows: dict[int, Continuation]) -> np.ndarray:
    """Adds the tokens that were drawn to the rows. Returns finish_B of all slots."""
    now = time.perf_counter()
    h = state.history
    tokens_BS, length_B, finish_B, logprob_BS, top_BSN, top_logprob_BSN = (
        jax.device_get(
            (
                h.tokens_BS,
                h.length_B,
                state.finish_B,
                state.logprob_BS,
                state.top_BSN,
                state.top_logprob_BSN,
            )
        )
    )
    for slot, row in rows.items():
        if finish_B[slot] == NOT_FINITE:
            raise ValueError(f"prompt {row.index}: {NOT_FINITE_MESSAGE}")
        new = slice(row.length, int(length_B[slot]))
        row.ids += tokens_BS[slot, new].tolist()
        row.logprobs += logprob_BS[slot, new].tolist()
        n = row.request.options.logprobs
        for ids, values in zip(
            top_BSN[slot, new, :n], top_logprob_BSN[slot, new, :n], strict=True
        ):
            row.top_logprobs.append(
                dict(zip(ids.tolist(), values.tolist(), strict=True))
            )
        row.first = row.first or now
        row.finish = FINISH_REASONS[finish_B[slot]]
        row.ended = now if row.finish else 0.0
    return finish_B
