"""Decoding over a KV cache: tokens in, tokens out.

A batch is a number of slots. A request is prefilled into a free slot, all slots decode
together in a jitted loop, and a slot whose row has ended takes the next request. The
loop comes back to the host when all rows have ended, when a row must be looked at (its
last token may complete a stop string), or when a row needs a larger cache.

Shapes are bucketed and everything else is traced: another prompt of the same bucket,
another seed or other options run the same compiled programs.
"""

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.cache import KVCache
from gpt2_jax.checks import shown, token_ids
from gpt2_jax.config import GPT2Config
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.sampling import (
    MIN_BAD_WORDS,
    History,
    Sampling,
    edit_logits,
    sample,
)
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2
from gpt2_jax.ops.attention import cache_dtype
from gpt2_jax.runtime import sharding

MIN_BUCKET = 32  # tokens of a prompt
MIN_CACHE = 128  # tokens of a cache
CHUNK = 512  # tokens of a prompt that go through the model at once
PREFILL_TOKENS = 8192  # of all rows that are prefilled together

RUNNING, STOP, LENGTH, EXHAUSTED, NOT_FINITE = range(5)
FINISH_REASONS = ("", "stop", "length", "exhausted")
NO_NUMBERS = (
    "the model's logits are not finite: its parameters are damaged, or too large for "
    "their dtype"
)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and what is asked for.

    Attributes:
      prompt: ids, at least one.
      options: `num_return_sequences`, `best_of`, beams and seed are not for here.
      draw: (seed, row, sequence): what its draws are a function of, besides logits.
      end_ids: a row ends before these.
      bad_words: lists of ids, where options has text.
      pause_V: bool; after these tokens the caller is asked whether the row ends.
    """

    prompt: list[int]
    options: Options
    draw: tuple[int, int, int]
    end_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    pause_V: np.ndarray | None = None


@dataclasses.dataclass
class Row:
    """A request that is being decoded, or has been.

    Attributes:
      index: the request's place among all.
      ids: what was drawn, without the ending token.
      logprobs: of each, in nats, under the model's own distribution.
      top_logprobs: the most probable tokens in its place, {id: log-probability}.
      finish: of FINISH_REASONS; "" while it runs. The caller may set it to end the row.
      started, first, ended: times of `time.perf_counter`.
    """

    index: int
    request: Request
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    finish: str = ""
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    window: int = 0  # where in prompt + ids the slot's tokens begin

    @property
    def length(self) -> int:
        """Tokens that the slot holds."""
        return len(self.request.prompt) + len(self.ids) - self.window


class DecodeState(flax.struct.PyTreeNode):
    """All that a decoding step reads and writes; the first axis is that of the rows."""

    history: History
    sampling: Sampling
    pause_BV: jax.Array  # bool: tokens after which the loop comes back
    limit_B: jax.Array  # int32: a row ends with so many new tokens
    finish_B: jax.Array  # int32: RUNNING, or why it ended
    draw_B3: jax.Array  # uint32: seed, row, sequence
    logprob_BS: jax.Array  # float32, of the tokens that were drawn
    top_BSN: jax.Array  # int32: the N most probable tokens in their place
    top_logprob_BSN: jax.Array  # float32
    cache: KVCache  # of all tokens but the last
    draft_cache: KVCache | None  # the same of the draft model


@dataclasses.dataclass(frozen=True)
class Draft:
    """Who guesses the next tokens, for the model to check several at once.

    Attributes:
      n_tokens: how many a step.
      model, params: a smaller model of the same vocabulary; None: the tokens that
        followed the row's last ones when they last occurred.
    """

    n_tokens: int
    model: GPT2 | None = None
    params: Params | None = None


NO_DRAFT = Draft(0)


def check(request: Request, cfg: GPT2Config, n_valid: int) -> None:
    """Raises ValueError on what can't be decoded: before anything is compiled."""
    prompt, options = request.prompt, request.options
    if not prompt:
        raise ValueError("the prompt is empty")
    check_ids(prompt, cfg.vocab_size)
    options.check_ids(n_valid)
    n = options.new_tokens(len(prompt))
    if options.overflow == "error" and len(prompt) + n > cfg.n_positions:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens + max_new_tokens={n} exceeds "
            f"n_positions={cfg.n_positions}; overflow='slide' goes on past it"
        )


class Decoder:
    """Decodes requests in a fixed number of slots.

    Args:
      n_slots: rows that decode together.
      n_valid: ids from here on are padding of the vocabulary and never drawn.
      table_QV: int32, next states; for all requests. None: all tokens are allowed.
      n_top: alternatives that are recorded with each token.
      draft: by default, one token is decoded at a time.
      mesh: where the parameters live; rows are spread over its batch axes.
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
        shards = 1 if mesh is None else sharding.n_batch_shards(mesh)
        self.n_slots = -(-n_slots // shards) * shards
        self.n_valid = np.int32(n_valid)
        self.table_QV = table_QV
        self.n_top = n_top
        self.size = 0  # of the cache
        self.steps = 0  # of the loop, all calls together

    def run(
        self, requests: Iterable[Request], *, n_steps: int = 2**30
    ) -> Iterator[list[Row]]:
        """Yields the rows that have changed, at least every `n_steps` tokens.

        A row comes for the last time when its `finish` is set. Between two calls the
        caller may set it, and shorten `ids`: the row ends then.

        Raises:
          ValueError: when the model gives logits that are NaN or infinite.
        """
        waiting: Iterator[tuple[int, Request]] | None = enumerate(requests)
        slots: list[Row | None] = [None] * self.n_slots
        state: DecodeState | None = None
        while True:
            new = set()
            for slot in [slot for slot, row in enumerate(slots) if row is None]:
                index, request = next(waiting or iter(()), (0, None))
                if request is None:
                    waiting = None
                    break
                slots[slot] = Row(index, request, started=time.perf_counter())
                new.add(slot)
            rows = {slot: row for slot, row in enumerate(slots) if row is not None}
            if not rows:
                return
            new |= {slot for slot, row in rows.items() if self._slide(row)}
            state = self._make_room(state, rows, new)
            if new or state is None:
                state = self._fill(state, rows, new)
            else:
                state, n = self._decode(state, n_steps, waiting is not None)
                self.steps += int(n)
            finish_B = self._collect(state, rows)
            yield list(rows.values())
            for slot, row in rows.items():
                if row.finish:
                    slots[slot] = None
                    row.ended = row.ended or time.perf_counter()
            if any(row.finish and finish_B[s] == RUNNING for s, row in rows.items()):
                ended_B = np.array([row is None for row in slots])
                finish_B = np.where(ended_B, np.maximum(finish_B, STOP), finish_B)
                finish_B = jax.device_put(finish_B, state.finish_B.sharding)
                state = state.replace(finish_B=finish_B)

    def _decode(
        self, state: DecodeState, n_steps: int, until_end: bool
    ) -> tuple[DecodeState, Any]:
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

    def _slide(self, row: Row) -> bool:
        """Whether a row is at the end of the context: it goes on from its last half."""
        limit = self.model.cfg.n_positions
        full = row.length >= limit
        if full:
            row.window += row.length - limit // 2
        return full

    def _make_room(
        self, state: DecodeState | None, rows: dict[int, Row], new: set[int]
    ) -> DecodeState | None:
        """The state with a cache that is large enough for another step of all rows.

        None when all that it holds is about to be replaced.
        """
        self.size = bucket(
            max(row.length for row in rows.values()) + 1 + self.draft.n_tokens,
            self.model.cfg.n_positions + self.draft.n_tokens,
            at_least=MIN_CACHE,
        )
        if state is None or len(new) == self.n_slots:
            return None
        self.size = max(self.size, state.cache.size)
        if self.size > state.cache.size:
            state = resize(state, self.size, mesh=self.mesh)
        return state

    def _fill(
        self, state: DecodeState | None, rows: dict[int, Row], new: set[int]
    ) -> DecodeState:
        """The state with the new rows in their slots, the first token of each drawn."""
        shards = 1 if self.mesh is None else sharding.n_batch_shards(self.mesh)
        order = sorted(new)
        group = shards  # later rows come one by one, so that there is one shape
        if state is None:
            longest = bucket(max(row.length for row in rows.values()), CHUNK)
            group = max(1, PREFILL_TOKENS // longest // shards) * shards
            if len(order) == self.n_slots <= group:
                return self._prefill([rows[slot] for slot in order])
            group = min(group, -(-len(order) // shards) * shards)
            state = self._place(
                self._host_state([], self.n_slots).replace(
                    **{
                        name: empty_cache(m, self.n_slots, self.size, mesh=self.mesh)
                        for name, m, _ in self._models
                    }
                )
            )
        for start in range(0, len(order), group):
            # The last group reaches back, so that all have one shape.
            some = order[max(0, min(start, len(order) - group)) :][:group]
            some += some[-1:] * (group - len(some))
            part = self._prefill([rows[slot] for slot in some])
            state = insert(state, part, np.array(some, np.int32), mesh=self.mesh)
        return state

    def _prefill(self, rows: Sequence[Row]) -> DecodeState:
        """The state of these rows, the first token of each drawn."""
        state = self._host_state(rows, len(rows))
        length_B = state.history.length_B
        logits = []
        for name, model, params in self._models:
            cache = empty_cache(model, len(rows), self.size, mesh=self.mesh)
            logits_BV = jnp.zeros((len(rows), model.cfg.vocab_size), jnp.float32)
            for start in range(0, int(length_B.max()), CHUNK):
                T = bucket(min(int(length_B.max()) - start, CHUNK), CHUNK)
                cache, logits_BV = extend(
                    model,
                    params,
                    cache,
                    state.history.tokens_BS[:, start : start + T],
                    length_B,
                    logits_BV,
                    start=start,
                    mesh=self.mesh,
                )
            state = state.replace(**{name: cache.replace(length_B=length_B)})
            logits.append(logits_BV)
        return first_token(
            self._place(state),
            logits[0],
            self.n_valid,
            self.table_QV,
            mesh=self.mesh,
        )

    @property
    def _models(self) -> list[tuple[str, GPT2, Params]]:
        models = [("cache", self.model, self.params)]
        if self.draft.model is not None and self.draft.params is not None:
            models.append(("draft_cache", self.draft.model, self.draft.params))
        return models

    def _place(self, tree: Any) -> Any:
        """On the devices, rows spread over the mesh."""
        if self.mesh is None:
            return jax.device_put(tree, jax.tree.leaves(self.params)[0].sharding)
        return jax.device_put(tree, sharding.row_shardings(tree, self.mesh))

    def _host_state(self, rows: Sequence[Row], batch: int) -> DecodeState:
        """All but the caches, as numpy arrays; rows beyond those given have ended."""
        B, size, V = batch, self.size, self.model.cfg.vocab_size
        cache: Any = None  # to be computed
        tokens_BS: Any = np.zeros((B, size), np.int32)
        counts_BV: Any = np.zeros((B, V), np.int32)
        draw_B3: Any = np.zeros((B, 3), np.uint32)
        top_BSN: Any = np.zeros((B, size, self.n_top), np.int32)
        of_rows: Any = np.zeros((4, B), np.int32)
        length_B, n_new_B, limit_B, state_B = of_rows
        of_tokens: Any = np.zeros((2, B, V), bool)
        prompt_BV, pause_BV = of_tokens
        for b, row in enumerate(rows):
            request, prompt = row.request, row.request.prompt
            window = [*prompt, *row.ids][row.window :]
            tokens_BS[b, : len(window)] = window
            length_B[b], n_new_B[b] = len(window), len(row.ids)
            limit_B[b] = request.options.new_tokens(len(prompt))
            prompt_BV[b, prompt] = True
            np.add.at(counts_BV[b], row.ids, 1)
            if request.pause_V is not None:
                pause_BV[b, : len(request.pause_V)] = request.pause_V
            draw_B3[b] = request.draw
            if self.table_QV is not None:
                for i in row.ids:
                    state_B[b] = self.table_QV[state_B[b], i]
        return DecodeState(
            history=History(
                tokens_BS, length_B, n_new_B, prompt_BV, counts_BV, state_B
            ),
            sampling=sampling_of([row.request for row in rows], B, V),
            pause_BV=pause_BV,
            limit_B=limit_B,
            finish_B=LENGTH * (n_new_B >= limit_B).astype(np.int32),
            draw_B3=draw_B3,
            logprob_BS=tokens_BS.astype(np.float32) * 0,
            top_BSN=top_BSN,
            top_logprob_BSN=top_BSN.astype(np.float32),
            cache=cache,
            draft_cache=None,
        )

    def _collect(self, state: DecodeState, rows: dict[int, Row]) -> np.ndarray:
        """Brings what was drawn to the rows. Returns finish_B, all slots'."""
        now = time.perf_counter()
        h = state.history
        tokens_BS, length_B, finish_B, logprob_BS, top_BSN, top_logprob_BSN = (
            jax.device_get(
                (
                    *(h.tokens_BS, h.length_B, state.finish_B, state.logprob_BS),
                    *(state.top_BSN, state.top_logprob_BSN),
                )
            )
        )
        for slot, row in rows.items():
            if finish_B[slot] == NOT_FINITE:
                raise ValueError(f"prompt {row.index}: {NO_NUMBERS}")
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


def generate(
    model: GPT2,
    params: Params,
    prompts: Sequence[Sequence[int]],
    options: Options,
    *,
    seed: int,
    end_ids: Sequence[int] = (),
    n_valid: int | None = None,
    draft: Draft = NO_DRAFT,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Continues each prompt; all rows decode together.

    Args:
      prompts: lists of ids, of any lengths >= 1.
      seed: row i draws with keys of (seed, i): neither the batch size nor the other
        rows have a part in it.
      end_ids: a row ends before these; and n_valid, draft, mesh as of `Decoder`.

    Returns:
      The new ids of each.

    Raises:
      ValueError: before anything is compiled, on an empty prompt, an id outside the
        vocabulary, or a length over n_positions.
    """
    n_valid = model.cfg.vocab_size if n_valid is None else n_valid
    requests = []
    for i, prompt in enumerate(prompts):
        ids = token_ids(f"prompt {i}", prompt)
        request = Request(ids, options, (seed, i, 0), tuple(end_ids))
        check(request, model.cfg, n_valid)
        requests.append(request)
    if not requests:
        raise ValueError("no prompt given")
    decoder = Decoder(
        model, params, n_slots=len(requests), n_valid=n_valid, draft=draft, mesh=mesh
    )
    new_ids = {row.index: row.ids for rows in decoder.run(requests) for row in rows}
    return [new_ids[i] for i in range(len(requests))]


def sampling_of(requests: Sequence[Request], batch: int, vocab_size: int) -> Sampling:
    """A row a request; all off where there are none."""
    s = Sampling.create(batch, vocab_size)
    W, L = MIN_BAD_WORDS
    words = [[w for w in r.bad_words if len(w) > 1] for r in requests]
    W = power_of_two(max([W, *map(len, words)]))
    L = power_of_two(max([L, *(len(w) for row in words for w in row)]))
    bad_words_BWL = np.full((batch, W, L), -1, np.int32)
    for b, request in enumerate(requests):
        o = request.options
        for field in dataclasses.fields(Sampling):
            name = field.name.removesuffix("_B")
            if hasattr(o, name):
                getattr(s, field.name)[b] = getattr(o, name)
        if not o.draws:
            s.temperature_B[b] = 0
        bias_V = s.bias_BV[b]
        if o.allowed_ids is not None:
            bias_V[:] = -np.inf
            bias_V[o.allowed_ids] = 0
        for i, x in o.logit_bias.items():
            bias_V[i] += x
        bias_V[[w[0] for w in request.bad_words if len(w) == 1]] = -np.inf
        s.ends_BV[b, list(request.end_ids)] = True
        for w, word in enumerate(words[b]):
            bad_words_BWL[b, w, L - len(word) :] = word
    return s.replace(bad_words_BWL=bad_words_BWL)


def power_of_two(n: int) -> int:
    """The least one >= n."""
    return 1 << (n - 1).bit_length()


def bucket(length: int, limit: int, *, at_least: int = MIN_BUCKET) -> int:
    """The least power of two >= length and >= at_least, but at most `limit`."""
    return min(max(at_least, power_of_two(length)), limit)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError that names the first id outside [0, vocab_size)."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id {shown(i)} is outside [0, {vocab_size=})")


def apply(model: GPT2, params: Params, *args: Any, **kwargs: Any) -> Any:
    """`model.apply` on a plain params tree."""
    return model.apply({"params": params}, *args, **kwargs)


# --- Compiled programs ----------------------------------------------------------------


@partial(jax.jit, static_argnames=("model", "batch", "size", "mesh"))
def empty_cache(model: GPT2, batch: int, size: int, mesh: Mesh | None) -> KVCache:
    return _constrain(
        KVCache.empty(model.cfg, batch, size, cache_dtype(model.dtype)), mesh
    )


@partial(
    jax.jit,
    static_argnames=("model", "start", "mesh"),
    donate_argnames=("cache", "logits_BV"),
)
def extend(
    model: GPT2,
    params: Params,
    cache: KVCache,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    logits_BV: jax.Array,
    start: int,
    mesh: Mesh | None,
) -> tuple[KVCache, jax.Array]:
    """T more tokens of right-padded prompts, and the logits of rows that end in them.

    Args:
      length_B: of the whole prompts.
      logits_BV: of rows that ended before.
      start: tokens that the cache holds, in every row.
    """
    cache = cache.replace(start=start)
    last_B = length_B - 1 - cache.length_B
    T = tokens_BT.shape[1]
    hidden_BTD, cache = apply(model, params, tokens_BT, cache, method="hidden")
    at_B11 = jnp.clip(last_B, 0, T - 1)[:, None, None]
    last_B1D = jnp.take_along_axis(hidden_BTD, at_B11, axis=1)
    last_BV = apply(model, params, last_B1D, method="unembed")[:, 0]
    here_B1 = ((last_B >= 0) & (last_B < T))[:, None]
    return _constrain((cache, jnp.where(here_B1, last_BV, logits_BV)), mesh)


@partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def first_token(
    state: DecodeState,
    logits_BV: jax.Array,
    n_valid: jax.Array,
    table_QV: jax.Array | None,
    mesh: Mesh | None,
) -> DecodeState:
    """The state with a token drawn in each row that is running."""
    running_B = state.finish_B == RUNNING
    state, _ = _draw(state, logits_BV, n_valid, table_QV, running_B)
    return _constrain(_rewind(state), mesh)


def _rewind(s: DecodeState) -> DecodeState:
    """The caches hold all tokens but the last; what lies beyond is written again."""
    length_B = s.history.length_B - 1
    draft = s.draft_cache and s.draft_cache.replace(length_B=length_B)
    return s.replace(cache=s.cache.replace(length_B=length_B), draft_cache=draft)


@partial(jax.jit, static_argnames=("size", "mesh"))
def resize(state: DecodeState, size: int, mesh: Mesh | None) -> DecodeState:
    """The state with room for `size` tokens a row."""
    h = state.history
    more = size - state.cache.size

    def pad(x):
        return jnp.pad(x, [(0, more if i == 1 else 0) for i in range(x.ndim)])

    state = state.replace(
        history=h.replace(tokens_BS=pad(h.tokens_BS)),
        logprob_BS=pad(state.logprob_BS),
        top_BSN=pad(state.top_BSN),
        top_logprob_BSN=pad(state.top_logprob_BSN),
        cache=state.cache.resize(size),
        draft_cache=state.draft_cache and state.draft_cache.resize(size),
    )
    return _constrain(state, mesh)


@partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def insert(
    state: DecodeState, rows: DecodeState, slot_R: jax.Array, mesh: Mesh | None
) -> DecodeState:
    """The state with R rows put into their slots."""
    words = state.sampling.bad_words_BWL, rows.sampling.bad_words_BWL
    W, L = (max(x.shape[axis] for x in words) for axis in (1, 2))

    def room(s: DecodeState) -> DecodeState:
        x = s.sampling.bad_words_BWL
        pads = ((0, 0), (0, W - x.shape[1]), (L - x.shape[2], 0))
        x = jnp.pad(x, pads, constant_values=-1)
        return s.replace(sampling=s.sampling.replace(bad_words_BWL=x))

    state = jax.tree.map(lambda x, r: x.at[slot_R].set(r), room(state), room(rows))
    return _constrain(state, mesh)


def _constrain(tree: Any, mesh: Mesh | None) -> Any:
    if mesh is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, sharding.row_shardings(tree, mesh))


@partial(
    jax.jit,
    static_argnames=("model", "draft_model", "n_draft", "mesh"),
    donate_argnames="state",
)
def decode(
    model: GPT2,
    params: Params,
    state: DecodeState,
    n_valid: jax.Array,
    n_steps: jax.Array,
    until_end: jax.Array,
    table_QV: jax.Array | None,
    *,
    draft_model: GPT2 | None,
    draft_params: Params | None,
    n_draft: int,
    mesh: Mesh | None,
) -> tuple[DecodeState, jax.Array]:
    """Decodes until every row has ended or the host is needed; at most `n_steps`.

    A step runs the model on the last token of each row and draws the next one. With
    drafts it runs on `n_draft` guesses too, and draws on as long as the guesses are
    what was drawn: what comes out does not depend on them.

    Args:
      until_end: come back as soon as a row has ended, for its slot to be filled.

    Returns:
      The state, and how many steps were done.
    """
    n_positions = model.cfg.n_positions
    n_running = jnp.sum(state.finish_B == RUNNING)

    def go_on(carry):
        s, n, pause = carry
        h, running_B = s.history, s.finish_B == RUNNING
        fits_B = h.length_B + 1 + n_draft <= s.cache.size
        fits_B &= h.length_B < n_positions
        fits = (fits_B | ~running_B).all()
        ended = until_end & (running_B.sum() < n_running)
        return running_B.any() & fits & (n < n_steps) & ~pause & ~ended

    def step(carry):
        s, n, pause = carry
        last_B = _last_token(s.history)
        s, guess_BG = _guess(s, n_valid, table_QV, draft_model, draft_params, n_draft)
        tokens_BT = jnp.concatenate([last_B[:, None], guess_BG], axis=1)
        logits_BTV, cache = apply(model, params, tokens_BT, s.cache)
        s = s.replace(cache=cache)

        def draw(i, carry):
            s, going_B, pause = carry
            before_B = s.history.length_B
            s, pause_B = _draw(s, logits_BTV[:, i], n_valid, table_QV, going_B)
            if n_draft:
                guess_B = guess_BG[:, jnp.minimum(i, n_draft - 1)]
                going_B &= _last_token(s.history) == guess_B
            going_B &= s.history.length_B > before_B
            going_B &= (s.finish_B == RUNNING) & ~pause_B
            going_B &= s.history.length_B < n_positions
            return s, going_B, pause | pause_B.any()

        carry = (s, s.finish_B == RUNNING, pause)
        if n_draft:
            s, _, pause = jax.lax.fori_loop(0, 1 + n_draft, draw, carry)
        else:
            s, _, pause = draw(0, carry)
        return _rewind(s), n + 1, pause

    state, n, _ = jax.lax.while_loop(go_on, step, (state, jnp.int32(0), False))
    return _constrain(state, mesh), n


def _last_token(history: History) -> jax.Array:
    at_B1 = jnp.maximum(history.length_B - 1, 0)[:, None]
    return jnp.take_along_axis(history.tokens_BS, at_B1, axis=1)[:, 0]


def _draw(
    s: DecodeState,
    logits_BV: jax.Array,
    n_valid: jax.Array,
    table_QV: jax.Array | None,
    where_B: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """A token is drawn in the rows `where_B`, which may end by it.

    Returns:
      The state, and in which rows the host wants to look at the new token.
    """
    h, rows_B = s.history, jnp.arange(where_B.shape[0])
    logits_BV = jnp.where(
        jnp.arange(logits_BV.shape[-1]) < n_valid, logits_BV, -jnp.inf
    )
    broken_B = ~(logits_BV.max(axis=-1) < jnp.inf)  # NaN is not less
    edited_BV = edit_logits(logits_BV, h, s.sampling, table_QV)
    token_B = sample(edited_BV, s.sampling, _keys(s.draw_B3, h.n_new_B))
    stuck_B = (edited_BV.max(axis=-1) == -jnp.inf) | broken_B
    end_B = s.sampling.ends_BV[rows_B, token_B] & ~stuck_B
    grown_B = where_B & ~stuck_B & ~end_B
    at_B = jnp.where(grown_B, h.length_B, s.logprob_BS.shape[1])
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    n_top = s.top_BSN.shape[-1]
    if n_top:
        values_BN, ids_BN = jax.lax.top_k(logp_BV, n_top)
        s = s.replace(
            top_BSN=s.top_BSN.at[rows_B, at_B].set(ids_BN, mode="drop"),
            top_logprob_BSN=s.top_logprob_BSN.at[rows_B, at_B].set(
                values_BN, mode="drop"
            ),
        )
    h = h.append(token_B, grown_B, table_QV)
    why_B = jnp.where(broken_B, NOT_FINITE, EXHAUSTED)
    finish_B = jnp.where(where_B & stuck_B, why_B, s.finish_B)
    finish_B = jnp.where(where_B & end_B, STOP, finish_B)
    finish_B = jnp.where(grown_B & (h.n_new_B >= s.limit_B), LENGTH, finish_B)
    s = s.replace(
        history=h,
        finish_B=finish_B,
        logprob_BS=s.logprob_BS.at[rows_B, at_B].set(
            logp_BV[rows_B, token_B], mode="drop"
        ),
    )
    return s, grown_B & s.pause_BV[rows_B, token_B]


def _keys(draw_B3: jax.Array, n_new_B: jax.Array) -> jax.Array:
    """A key for each draw: of seed, row, sequence and how many were drawn before."""

    def key(draw_3, n):
        key = jax.random.key(draw_3[0])
        for x in (draw_3[1], draw_3[2], n):
            key = jax.random.fold_in(key, x)
        return key

    return jax.vmap(key)(draw_B3, n_new_B)


def _guess(
    s: DecodeState,
    n_valid: jax.Array,
    table_QV: jax.Array | None,
    model: GPT2 | None,
    params: Params | None,
    n: int,
) -> tuple[DecodeState, jax.Array]:
    """`n` guesses of what follows each row, int32 [B, n]."""
    if model is None or params is None:
        return s, _look_up(s.history, n)
    guesses = []
    h, cache = s.history, s.draft_cache
    for i in range(n + 1):
        # The draft draws with the same noise, so that it often draws the same.
        logits_B1V, cache = apply(model, params, _last_token(h)[:, None], cache)
        if i == n:
            break  # this was to have the last guess in the cache
        logits_BV = jnp.where(
            jnp.arange(logits_B1V.shape[-1]) < n_valid, logits_B1V[:, 0], -jnp.inf
        )
        edited_BV = edit_logits(logits_BV, h, s.sampling, table_QV)
        token_B = sample(edited_BV, s.sampling, _keys(s.draw_B3, h.n_new_B))
        guesses.append(token_B)
        h = h.append(token_B, jnp.ones_like(token_B, bool), table_QV)
    return s.replace(draft_cache=cache), jnp.stack(guesses, axis=1)


LOOKED_UP = 3  # tokens that are compared


def _look_up(history: History, n: int) -> jax.Array:
    """The `n` tokens that followed the row's last ones the last time, int32 [B, n].

    The longest match of up to LOOKED_UP tokens counts, and of these the last.
    Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding
    """
    tokens_BS, length_B1 = history.tokens_BS, history.length_B[:, None]
    at_S = jnp.arange(tokens_BS.shape[1])
    same_BS = at_S < length_B1 - 1
    score_BS = jnp.where(same_BS, at_S, -1)
    for m in range(LOOKED_UP):
        last_B1 = jnp.take_along_axis(
            tokens_BS, jnp.maximum(length_B1 - 1 - m, 0), axis=1
        )
        same_BS &= (jnp.roll(tokens_BS, m, axis=1) == last_B1) & (at_S >= m)
        score_BS += same_BS * tokens_BS.shape[1]
    from_B1 = jnp.argmax(score_BS, axis=1)[:, None] + 1
    at_BG = jnp.minimum(from_B1 + jnp.arange(n), jnp.maximum(length_B1 - 1, 0))
    return jnp.take_along_axis(tokens_BS, at_BG, axis=1)
