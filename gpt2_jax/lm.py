"""load(...) -> LanguageModel: text in, text out."""

import dataclasses
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.checks import integer, is_list, items, shown
from gpt2_jax.checks import token_ids as as_ids
from gpt2_jax.config import GPT2Config
from gpt2_jax.decoding.beam import Hypothesis, beam_search
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.prompts import read_prompts
from gpt2_jax.decoding.requests import Continuation, Request, check_ids, check_request
from gpt2_jax.decoding.scheduler import Decoder
from gpt2_jax.decoding.score import Row as ScoredRow
from gpt2_jax.decoding.score import Score, score_rows, sliding_rows
from gpt2_jax.decoding.speculative import NO_DRAFT, Draft
from gpt2_jax.decoding.state import batch_sampling
from gpt2_jax.decoding.text import TextStream, completing_tokens
from gpt2_jax.decoding.weights import (
    INT8,
    build_model,
    check_dtype,
    quantize,
    transpose_kernels,
)
from gpt2_jax.formats.open_model import open_model
from gpt2_jax.interpret.explain import Explanation, explain
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2, abstract_params
from gpt2_jax.runtime.sharding import on_device, tree_shardings
from gpt2_jax.tokenizers.boundaries import before_text, encode_prompt
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer

Ids = Sequence[int] | np.ndarray
Prompt = str | Ids


def load(
    model: str | Path,
    *,
    step: int | str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> "LanguageModel":
    """Loads a GPT-2 for generation and scoring, whoever wrote it.

    Args:
      model: a run's folder (workdir) or the folder of one of its steps; a Hugging Face
        folder, or the name of a model on its hub; the folder of an OpenAI checkpoint;
        a nanoGPT checkpoint (`ckpt.pt`); an llm.c model (`.bin`).
      step: of a run: its number, or "best", that of least validation loss; None: the
        latest.
      revision: of a model on the hub; None: the main one.
      dtype: float32 or bfloat16, of the parameters and the computation; or int8, of the
        weights (see `gpt2_jax.decoding.weights`).
      mesh: where the parameters shall live; None: on the first device.

    Raises:
      FileNotFoundError: when there is no such model, or no such step.
      ValueError: when what is there isn't whole, or isn't a GPT-2 that can be run
        here, naming what and where.
    """
    check_dtype(dtype)
    if not isinstance(mesh, Mesh | None):
        raise ValueError(f"mesh={shown(mesh)} must be a jax.sharding.Mesh")
    source = open_model(model, step=step, revision=revision)
    cfg = source.config
    abstract = abstract_params(cfg)
    if mesh is None:
        shardings = on_device(abstract, jax.devices()[0])
    else:
        shardings = tree_shardings(abstract, mesh)
    module = build_model(cfg, dtype)
    if dtype == INT8:
        params = quantize(source.load(jnp.float32, shardings))
    else:
        params = source.load(module.param_dtype, shardings)
    return LanguageModel(module, params, source.tokenizer, source.step, mesh)


@dataclasses.dataclass(frozen=True)
class Completion:
    """A text that was generated, and how.

    Attributes:
      index: of the prompt or request that it follows.
      text: what follows the prompt, without what ended it; None without a tokenizer.
      token_ids: its ids. Where a stop string ended it, those that begin before that.
      logprobs: of each id, in nats, under the model's own distribution: before
        temperature, penalties and filters.
      top_logprobs: for each id the most probable ones in its place with theirs, as
        many as were asked for.
      finish_reason: "stop": end of text, a stop string or a stop id; "length";
        "exhausted": no token was allowed.
      n_prompt_tokens: of the prompt.
      first_token_seconds, seconds: until the first token and the end, from when the
        request got its slot.
      score: of beam search: the sum of log-probabilities over length ** length_penalty.
    """

    index: int
    text: str | None
    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish_reason: str
    n_prompt_tokens: int
    first_token_seconds: float
    seconds: float
    score: float | None = None

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of a token, in nats."""
        return sum(self.logprobs) / max(1, len(self.logprobs))


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A GPT-2 with its parameters and tokenizer.

    Attributes:
      model: the Linen module.
      params: plain nested dict (see `gpt2_jax.model`). The first generation on a CPU
        makes a second copy of the kernels, which is faster to decode with.
      tokenizer: text <-> ids.
      step: of a run's checkpoint; None for other models.
      mesh: where the parameters live; None: on one device.
    """

    model: GPT2
    params: Params
    tokenizer: Tokenizer
    step: int | None
    mesh: Mesh | None = None
    _pauses: dict[tuple[str, ...], np.ndarray] = dataclasses.field(
        default_factory=dict, repr=False
    )

    @property
    def config(self) -> GPT2Config:
        return self.model.cfg

    def logits(self, token_ids: Ids | Sequence[Ids]) -> jax.Array:
        """Float32 logits [B, T, V] of int ids [B, T], in an array or lists.

        Raises:
          ValueError: on another shape or type, rows of different lengths, an id outside
            the vocabulary, or T over n_positions.
        """
        rows = items("token_ids", token_ids)
        lengths = {len(row) if is_list(row) else 0 for row in rows}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(
                f"token_ids={shown(token_ids)} must have shape [B, T] with B, T >= 1, "
                "all rows of one length"
            )
        ids_BT = [as_ids("token_ids", row) for row in rows]
        for ids in ids_BT:
            check_ids(ids, self.config.vocab_size)
        return _logits(self.model, self.params, np.array(ids_BT, np.int32))

    def explain(self, prompt: Prompt, *, top_k: int = 10) -> Explanation:
        """What the model made of a text: probabilities, entropies, attention.

        `explain(prompt).save("page.html")` makes a page of it; in a notebook it shows
        itself.

        Args:
          prompt: one text, or its token ids.
          top_k: alternatives to keep for each token.

        Raises:
          ValueError: on a bad id, a text over n_positions, or one that is too long for
            a page (see `gpt2_jax.interpret.explain`).
        """
        ids = self._encode_one("explain", prompt)
        check_ids(ids, self._n_valid)
        has_text = not isinstance(self.tokenizer, NoTokenizer)
        return explain(
            self.model,
            self.params,
            ids,
            self.tokenizer.token_bytes if has_text else None,
            n_valid=self._n_valid,
            top_k=top_k,
        )

    def score(
        self, text: Prompt | Sequence[Prompt], *, stride: int | None = None
    ) -> Any:
        """The log-probability of each token of a text, or of each of a list of texts.

        The first token follows the end-of-text token, as a document's does, or what
        else the model's texts begin with; where there is no such token, it is not
        scored. A text that is longer than the context is gone through in windows (see
        `score.sliding_rows`).

        Args:
          text: text, a list of texts, token ids, or a list of token ids.
          stride: by how many tokens a window advances: the less, the more context
            tokens have, and the longer it takes. None: half of the context.

        Returns:
          A `Score`; a list for a list.

        Raises:
          ValueError: on a bad id, and a stride outside [1, n_positions].
        """
        texts, is_batch = self._encode("text", text, self.tokenizer.encode)
        limit, before = self.config.n_positions, before_text(self.tokenizer)
        stride = max(1, limit // 2) if stride is None else integer("stride", stride)
        rows: list[ScoredRow] = []
        counts = []
        for ids in texts:
            check_ids(ids, self._n_valid)
            windows = sliding_rows([*before, *ids], limit, stride)
            counts.append(len(windows))
            rows += windows
        found = iter(self._score(rows))
        scores = [_joined([next(found) for _ in range(n)]) for n in counts]
        return scores if is_batch else scores[0]

    def logprobs(
        self, prompt: Prompt | Sequence[Prompt], completion: Prompt | Sequence[Prompt]
    ) -> Any:
        """The log-probability of each token of a completion, given its prompt.

        The two are tokenized apart, as `generate` does; nothing is put between them.

        Args:
          prompt: as of `generate`; one, or as many as there are completions.
          completion: likewise: one, or a list.

        Returns:
          A `Score` of the completion; a list where prompt or completion is a list.

        Raises:
          ValueError: on a bad id, an empty completion, lists of different lengths, and
            where all but the last token exceed n_positions.
        """
        prompts, many_prompts = self._encode("prompt", prompt)
        encode = self.tokenizer.encode
        completions, many = self._encode("completion", completion, encode)
        n = max(len(prompts), len(completions))
        prompts = prompts if many_prompts else prompts * n
        completions = completions if many else completions * n
        if len(prompts) != len(completions):
            raise ValueError(
                f"{len(prompts)} prompts do not go with {len(completions)} completions"
            )
        rows = []
        for i, (before, ids) in enumerate(zip(prompts, completions, strict=True)):
            check_ids([*before, *ids], self._n_valid)
            if not len(before) or not len(ids):
                which = "completion" if len(before) else "prompt"
                raise ValueError(f"{which} {i} is empty")
            rows.append(ScoredRow([*before, *ids], len(ids)))
        scores = self._score(rows)
        return scores if many_prompts or many else scores[0]

    def _score(self, rows: list[ScoredRow]) -> list[Score]:
        """In the order of the rows."""
        scored = dict(self.score_rows(rows))
        return [scored[i] for i in range(len(rows))]

    def score_rows(
        self, rows: Sequence[ScoredRow], *, batch_size: int | None = None
    ) -> Iterator[tuple[int, Score]]:
        """`score.score_rows` with this model: (index, score), the long ones first."""
        return score_rows(
            self.model,
            self.params,
            rows,
            n_valid=self._n_valid,
            mesh=self.mesh,
            batch_size=batch_size,
        )

    def generate(self, prompt: Prompt | Sequence[Prompt], **options: Any) -> Any:
        """Continues a prompt, or each of a list of prompts of any lengths.

        Args:
          prompt: text, a list of texts, token ids, or a list of token ids. Empty
            text stands for the beginning of a document.
          options: see `gpt2_jax.decoding.options.Options`; and `draft`, `n_draft`, see
            `complete`.

        Returns:
          What follows the prompt, without it and without what ended it: text for text,
          ids for ids, a list for a list, and where `num_return_sequences` is given a
          list for each prompt.

        Raises:
          ValueError: before anything is compiled, on an option out of its range, a
            bad id, or prompt + new tokens over n_positions.
          TypeError: on an unknown option.
        """
        is_text = bool(read_prompts("prompt", prompt).texts)

        def plain(result: Any) -> Any:
            if isinstance(result, list):
                return [plain(r) for r in result]
            return result.text if is_text else result.token_ids

        return plain(self.complete(prompt, **options))

    def complete(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        draft: "str | LanguageModel | None" = None,
        n_draft: int = 4,
        **options: Any,
    ) -> Any:
        """As `generate`, but all there is to know: a `Completion` for each text.

        Args:
          draft: guesses tokens, which are then checked several at once; what comes out
            is the same, only sooner. A smaller model of the same vocabulary, or
            "prompt_lookup": what followed the last tokens when they last occurred.
          n_draft: guesses a step.
        """
        prompts, is_batch = self._encode("prompt", prompt)
        asked = Options(**options)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        drafting = self._draft(draft, n_draft)
        n = asked.best_of or asked.num_return_sequences
        requests = [
            self._request(i, ids, asked, (seed, i, j))
            for i, ids in enumerate(prompts)
            for j in range(1 if asked.num_beams > 1 else n)
        ]
        if asked.num_beams > 1:
            if draft is not None:
                raise ValueError(f"num_beams={asked.num_beams} and draft: give one")
            found = self._search(requests, asked)
        else:
            done = self._run(requests, len(requests), asked, drafting)
            flat = sorted(done, key=lambda c: c.index)
            found = [flat[i : i + n] for i in range(0, len(flat), n)]
        if asked.best_of:
            best = lambda c: -c.mean_logprob  # noqa: E731
            found = [sorted(c, key=best)[: asked.num_return_sequences] for c in found]
        results: list[Any] = [
            [dataclasses.replace(c, index=i) for c in completions]
            for i, completions in enumerate(found)
        ]
        if asked.num_return_sequences == 1:
            results = [completions[0] for completions in results]
        return results if is_batch else results[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        draft: "str | LanguageModel | None" = None,
        n_draft: int = 4,
        **options: Any,
    ) -> Iterator[Any]:
        """The text that follows one prompt, in pieces as they come.

        A piece never ends within a character, and nothing of a stop string comes out.
        Without a tokenizer the pieces are ids, one at a time. Closing the iterator
        stops the work. Arguments are as of `complete`, and are checked at once; one
        text is all that can be streamed.
        """
        ids = self._encode_one("stream", prompt)
        asked = _one_sequence(Options(**options), "stream")
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        decoder = self._decoder(1, asked, self._draft(draft, n_draft))
        request = self._request(0, ids, asked, (seed, 0, 0))
        has_text = not isinstance(self.tokenizer, NoTokenizer)
        text = self._text_stream(asked) if has_text else None

        def pieces() -> Iterator[Any]:
            n_given = 0
            for (row,) in decoder.run([request], n_steps=1):
                new, n_given = row.ids[n_given:], len(row.ids)
                if text is None:
                    yield from new
                    continue
                piece = text.push(new)
                if text.stopped:
                    row.finish = "stop"
                if row.finish and not text.stopped:
                    piece += text.finish()
                if piece:
                    yield piece

        return pieces()

    def generate_many(
        self,
        requests: Iterable[Prompt | Mapping[str, Any]],
        *,
        n_slots: int = 8,
        draft: "str | LanguageModel | None" = None,
        n_draft: int = 4,
        **options: Any,
    ) -> "Iterator[Completion]":
        """Continues prompts from an iterator, `n_slots` at a time, as slots get free.

        A slot whose text has ended takes the next request, and nothing is compiled for
        it. `Completion.index` tells which request a text belongs to: they come in the
        order in which they end.

        Args:
          requests: a list or an iterator of prompts, or of dicts of a `prompt` and
            options of its own. A request that has no seed of its own draws with (seed,
            its index).
          options: of all requests. `logprobs` and a table of `allowed_tokens` can
            only be given here.

        Raises:
          ValueError: at once on options of all requests; on a request, with its index,
            when a slot is there for it.
        """
        asked = _one_sequence(Options(**options), "generate_many")
        n_slots = integer("n_slots", n_slots)
        if n_slots < 1:
            raise ValueError(f"{n_slots=} must be >= 1")
        waiting = _numbered(requests)
        drafting = self._draft(draft, n_draft)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed

        def read() -> Iterator[Request]:
            for i, item in waiting:
                own = dict(item) if isinstance(item, Mapping) else {"prompt": item}
                if "prompt" not in own:
                    raise ValueError(f"request {i} has no prompt")
                ids = self._encode_one(f"request {i}", own.pop("prompt"))
                if "logprobs" in own:
                    raise ValueError(f"request {i}: logprobs is for all requests")
                merged = _one_sequence(Options(**{**options, **own}), "generate_many")
                if merged.table is not asked.table and "allowed_tokens" in own:
                    raise ValueError(
                        f"request {i}: allowed_tokens is for all requests where it is "
                        "a table"
                    )
                draw = (seed, i, 0)
                if own.get("seed") is not None:
                    draw = (integer("seed", own["seed"]), 0, 0)
                yield self._request(i, ids, merged, draw)

        return self._run(read(), n_slots, asked, drafting)

    def _run(
        self,
        requests: Iterable[Request],
        n_slots: int,
        options: Options,
        draft: Draft,
    ) -> "Iterator[Completion]":
        """Completions in the order in which they end."""
        decoder = self._decoder(n_slots, options, draft)
        texts: dict[int, TextStream] = {}
        given: dict[int, int] = {}
        for rows in decoder.run(requests):
            for row in rows:
                if row.request.options.stop:
                    options = row.request.options
                    text = texts.setdefault(row.index, self._text_stream(options))
                    text.push(row.ids[given.get(row.index, 0) :])
                    given[row.index] = len(row.ids)
                    if text.stopped:
                        row.finish = "stop"
                if row.finish:
                    yield self._completion(row, texts.pop(row.index, None))
                    given.pop(row.index, None)

    def _completion(self, row: Continuation, text: TextStream | None) -> "Completion":
        n = len(row.ids)
        if text is not None and text.stopped:
            n = text.n_tokens
        return Completion(
            index=row.index,
            text=self._text(row.ids, row.request.options),
            token_ids=row.ids[:n],
            logprobs=row.logprobs[:n],
            top_logprobs=row.top_logprobs[:n],
            finish_reason=row.finish,
            n_prompt_tokens=len(row.request.prompt),
            first_token_seconds=row.first - row.started,
            seconds=time.perf_counter() - row.started,
        )

    def _text_stream(self, options: Options) -> TextStream:
        table = self.tokenizer.token_bytes
        return TextStream(table, options.stop, options.min_new_tokens)

    def _text(self, ids: Sequence[int], options: Options) -> str | None:
        if isinstance(self.tokenizer, NoTokenizer):
            return None
        text = self._text_stream(options)
        whole = text.push(ids)
        return whole if text.stopped else whole + text.finish()

    def _search(
        self, requests: Sequence[Request], options: Options
    ) -> "list[list[Completion]]":
        """Beam search: for each request its best hypotheses."""
        start = time.perf_counter()
        found = beam_search(
            self.model,
            self._weights,
            [r.prompt for r in requests],
            batch_sampling(requests, len(requests), self.config.vocab_size),
            num_beams=options.num_beams,
            num_return_sequences=options.num_return_sequences,
            max_new_tokens=[r.options.new_tokens(len(r.prompt)) for r in requests],
            length_penalty=options.length_penalty,
            early_stopping=options.early_stopping,
            n_valid=self._n_valid,
            table_QV=self._table(options),
        )
        seconds = time.perf_counter() - start
        nothing = Hypothesis([], -math.inf, "exhausted", [])
        return [
            [
                Completion(
                    index=i,
                    text=self._text(h.ids, options),
                    token_ids=h.ids,
                    logprobs=h.logprobs,
                    top_logprobs=[],
                    finish_reason=h.finish_reason,
                    n_prompt_tokens=len(request.prompt),
                    first_token_seconds=seconds,
                    seconds=seconds,
                    score=h.score,
                )
                for h in hypotheses or [nothing]
            ]
            for i, (request, hypotheses) in enumerate(zip(requests, found, strict=True))
        ]

    def _request(
        self, i: int, ids: list[int], options: Options, draw: tuple[int, int, int]
    ) -> Request:
        """Raises ValueError when the model can't do it."""
        encode = self.tokenizer.encode
        words: list[tuple[int, ...]] = []
        for word in options.bad_words:
            if isinstance(word, str):
                words += {tuple(encode(word)), tuple(encode(" " + word))}
            else:
                words.append(tuple(word))
        request = Request(
            ids,
            options,
            draw,
            end_ids=(*self.tokenizer.end_ids, *options.stop_token_ids),
            bad_words=tuple(words),
            pause_V=self._pause(tuple(options.stop)) if options.stop else None,
        )
        try:
            check_request(request, self.config, self._n_valid)
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from None
        return request

    def _pause(self, stop: tuple[str, ...]) -> np.ndarray:
        if stop not in self._pauses:
            self._pauses[stop] = completing_tokens(self.tokenizer.token_bytes, stop)
        return self._pauses[stop]

    @cached_property
    def _weights(self) -> Params:
        """The parameters for decoding: on a CPU with each kernel transposed."""
        on_cpu = jax.default_backend() == "cpu" and self.mesh is None
        return transpose_kernels(self.params) if on_cpu else self.params

    @property
    def _n_valid(self) -> int:
        """Ids from here on pad the vocabulary."""
        return self.tokenizer.vocab_size

    def _decoder(self, n_slots: int, options: Options, draft: Draft) -> Decoder:
        return Decoder(
            self.model,
            self._weights,
            n_slots=n_slots,
            n_valid=self._n_valid,
            table_QV=self._table(options),
            n_top=options.logprobs,
            draft=draft,
            mesh=self.mesh,
        )

    def _table(self, options: Options) -> np.ndarray | None:
        if options.table is None:
            return None
        padding = self.config.vocab_size - options.table.shape[1]
        return np.pad(options.table, ((0, 0), (0, padding)), constant_values=-1)

    def _draft(self, draft: "str | LanguageModel | None", n_draft: int) -> Draft:
        n_draft = integer("n_draft", n_draft)
        if not 1 <= n_draft <= 32:
            raise ValueError(f"{n_draft=} must be in [1, 32]")
        if draft is None:
            return NO_DRAFT
        if isinstance(draft, str) and draft == "prompt_lookup":
            return Draft(n_draft)
        if not isinstance(draft, LanguageModel):
            raise ValueError(
                f"draft={shown(draft)} must be a LanguageModel or 'prompt_lookup'"
            )
        for name in ("vocab_size", "n_positions"):
            ours, theirs = getattr(self.config, name), getattr(draft.config, name)
            if theirs < ours or (name == "vocab_size" and theirs != ours):
                raise ValueError(f"the draft's {name}={theirs} does not suit {ours}")
        return Draft(n_draft, draft.model, draft._weights)

    def _encode(
        self, name: str, prompt: Any, encode: Callable[[str], list[int]] | None = None
    ) -> tuple[list[list[int]], bool]:
        """Prompts as ids, and whether there was a list of them."""
        prompts = read_prompts(name, prompt)
        ids = prompts.ids + [(encode or self._encode_text)(t) for t in prompts.texts]
        return ids, prompts.is_batch

    def _encode_one(self, what: str, prompt: Any) -> list[int]:
        prompts, is_batch = self._encode(f"prompt of {what}", prompt)
        if is_batch:
            raise ValueError(f"{what} takes one prompt, not a list of {len(prompts)}")
        return prompts[0]

    def _encode_text(self, text: str) -> list[int]:
        return encode_prompt(self.tokenizer, text)


def _joined(parts: Sequence[Score]) -> Score:
    """The scores of the windows of a text, which may be none."""
    nothing = Score(*(np.zeros(0, kind) for kind in (np.int32, np.float32, bool)))
    fields = (vars(part).values() for part in (nothing, *parts))
    return Score(*map(np.concatenate, zip(*fields, strict=True)))


_UNORDERED = (str, bytes, bytearray, memoryview, Mapping, Set)


def _numbered(requests: Any) -> Iterator[tuple[int, Any]]:
    """Numbers and requests of what has an order of its own."""
    try:
        if isinstance(requests, _UNORDERED):
            raise TypeError
        return enumerate(requests)
    except TypeError:
        kind = type(requests).__name__
        raise ValueError(
            f"requests={shown(requests)} must be a list or an iterator, not {kind}"
        ) from None


def _one_sequence(options: Options, what: str) -> Options:
    """Raises ValueError on what gives several texts for a prompt."""
    for name, one in (("num_return_sequences", 1), ("best_of", 0), ("num_beams", 1)):
        if getattr(options, name) != one:
            raise ValueError(f"{what} has no {name}={getattr(options, name)}")
    return options


@partial(jax.jit, static_argnames="model")
def _logits(model: GPT2, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens_BT)[0]
