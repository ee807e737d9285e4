"""What can be asked of generation: one frozen dataclass, checked when it is made."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gpt2_jax.checks import (
    check_text,
    integer,
    is_array,
    is_list,
    items,
    number,
    shown,
    token_ids,
)

DEFAULT_NEW_TOKENS = 100
EARLY_STOPPING = (False, True, "never")
OVERFLOW = ("error", "slide")

INTEGERS = {  # least and greatest value
    "max_new_tokens": (0, 2**31 - 1),
    "max_length": (1, 2**31 - 1),
    "min_new_tokens": (0, 2**31 - 1),
    "num_return_sequences": (1, 1000),
    "top_k": (0, 2**31 - 1),
    "no_repeat_ngram_size": (0, 2**31 - 1),
    "num_beams": (1, 1000),
    "best_of": (0, 1000),
    "logprobs": (0, 100),
    "seed": (0, 2**32 - 1),
}
LEAST, GREATEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
FINITE = "finite in float32"
NUMBERS = {
    "temperature": (f"0, or > 0 and {FINITE}", lambda x: x == 0 or _positive(x)),
    "top_p": ("in (0, 1] (1: off)", lambda x: 0 < x <= 1),
    "min_p": ("in [0, 1] (0: off)", lambda x: 0 <= x <= 1),
    "typical_p": ("in (0, 1] (1: off)", lambda x: 0 < x <= 1),
    "repetition_penalty": (f"> 0 and {FINITE}", lambda x: _positive(x)),
    "presence_penalty": (FINITE, lambda x: abs(x) <= GREATEST),
    "frequency_penalty": (FINITE, lambda x: abs(x) <= GREATEST),
    "length_penalty": (FINITE, lambda x: abs(x) <= GREATEST),
}


def _positive(x: float) -> bool:
    return LEAST <= x <= GREATEST


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `lm.generate` and its kin; None stands for an option's default.

    Attributes:
      max_new_tokens: at most so many are drawn; by default 100.
      max_length: the same, the prompt counted too. Only one of the two.
      min_new_tokens: no end before so many, neither by an id nor by a stop string: one
        that begins in these tokens ends nothing.
      num_return_sequences: results a prompt, each with draws of its own.
      do_sample: False takes the most probable token each time; by default tokens are
        drawn, unless the temperature is 0 or there are beams.
      temperature: divides the logits; 0: the most probable token.
      top_k: draw from the k most probable tokens; 0: from all.
      top_p: draw from the fewest tokens that reach this probability; 1: from all.
      min_p: draw from tokens of at least this times the greatest probability.
      typical_p: draw from the tokens of most typical surprise that reach this
        probability; 1: from all.
      repetition_penalty: over 1 makes tokens of prompt and text less probable.
      presence_penalty: taken from the logits of tokens that were drawn.
      frequency_penalty: the same, times how often they were.
      no_repeat_ngram_size: no n-gram of this length a second time; 0: off.
      logit_bias: {token id: number that is added to its logit}.
      bad_words: texts or lists of ids that never come. A text stands for the ids of
        itself, and of itself after a space.
      allowed_tokens: the only ids that may come (a list of ids or bool [V]); or an
        int table [states, V] that gives the next state for each token, -1 where it is
        not allowed. A row starts in state 0.
      num_beams: over 1: beam search.
      length_penalty: of beams: the power of the length that divides the sum of
        log-probabilities.
      early_stopping: of beams: True ends with `num_beams` finished ones, False when
        better ones are improbable, "never" when they are impossible.
      best_of: draw so many, return the `num_return_sequences` of greatest mean
        log-probability.
      stop: texts before which a row ends, whatever the borders of tokens.
      stop_token_ids: ids before which a row ends, as it does before end of text.
      logprobs: how many alternatives come with each token.
      overflow: at the end of the context: "error" refuses it beforehand, "slide" goes
        on with the last half of the window as prompt.
      seed: the same seed gives the same text; by default another one each call.

    Raises:
      ValueError: on a value outside its range, or two that contradict each other,
        naming both.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    num_return_sequences: int = 1
    do_sample: bool | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    bad_words: Sequence[str | Sequence[int]] = ()
    allowed_tokens: Any = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    best_of: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int = 0
    overflow: str = "error"
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) is None:
                self._set(field.name, DEFAULTS[field.name])
        for name, (least, greatest) in INTEGERS.items():
            if getattr(self, name) is not None:
                value = integer(name, getattr(self, name))
                if not least <= value <= greatest:
                    raise ValueError(
                        f"{name}={shown(value)} must be in [{least}, {greatest}]"
                    )
                self._set(name, value)
        for name, (limits, allowed) in NUMBERS.items():
            x = number(name, getattr(self, name))
            if not allowed(x):
                raise ValueError(f"{name}={x} must be {limits}")
            self._set(name, x)
        for name, values in (
            ("do_sample", (None, True, False)),
            ("early_stopping", EARLY_STOPPING),
            ("overflow", OVERFLOW),
        ):
            value = getattr(self, name)
            if not isinstance(value, bool | str | None) or value not in values:
                raise ValueError(f"{name}={shown(value)} is not one of {values}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        self._set("stop", _words("stop", stop))
        self._set("bad_words", _bad_words(self.bad_words))
        ends = token_ids("stop_token_ids", self.stop_token_ids)
        self._set("stop_token_ids", tuple(ends))
        self._set("logit_bias", _bias(self.logit_bias))
        if self.allowed_tokens is not None:
            self._set("allowed_tokens", _allowed(self.allowed_tokens))
        for conflict in self._conflicts():
            raise ValueError(conflict)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _conflicts(self) -> Iterator[str]:
        def given(*names: str) -> Iterator[str]:
            for name in names:
                if getattr(self, name) != DEFAULTS[name]:
                    yield f"{name}={getattr(self, name)!r}"

        n, beams = self.num_return_sequences, self.num_beams
        if self.max_new_tokens is not None and self.max_length is not None:
            yield "max_new_tokens and max_length: give one of the two"
        if self.min_new_tokens > self.new_tokens_limit:
            yield (
                f"min_new_tokens={self.min_new_tokens} exceeds the "
                f"{self.new_tokens_limit} that are drawn at most"
            )
        if self.do_sample and not self.draws:
            yield f"do_sample=True and {self._greedy}: nothing would be drawn"
        if self.temperature > 0 and not self.draws:
            for name in given("temperature", "top_k", "top_p", "min_p", "typical_p"):
                yield f"{name} and {self._greedy}: nothing is drawn"
        if self.best_of and not self.draws:
            yield f"best_of={self.best_of} and {self._greedy}: nothing is drawn"
        if self.best_of and n > self.best_of:
            yield f"num_return_sequences={n} exceeds best_of={self.best_of}"
        if beams > 1:
            if n > beams:
                yield f"num_return_sequences={n} exceeds num_beams={beams}"
            for name in given("stop", "logprobs", "overflow"):
                yield f"{name} and num_beams={beams}: beam search has no such option"
        else:
            for name in given("length_penalty", "early_stopping"):
                yield f"{name} and num_beams=1: it is for beam search"
            if n > 1 and not self.draws:
                yield f"num_return_sequences={n} and {self._greedy}: all would be equal"

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn; else the most probable ones are taken."""
        return not self._greedy

    @property
    def _greedy(self) -> str:
        """The option for which nothing is drawn."""
        if self.num_beams > 1:
            return f"num_beams={self.num_beams}"
        if self.do_sample is False:
            return "do_sample=False"
        return "temperature=0" if self.temperature == 0 else ""

    @property
    def new_tokens_limit(self) -> int:
        """The most tokens that a row may draw, whatever its prompt."""
        if self.max_length is not None:
            return self.max_length - 1
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return max(DEFAULT_NEW_TOKENS, self.min_new_tokens)

    def new_tokens(self, prompt_length: int) -> int:
        """The most tokens that are drawn after a prompt of this length.

        Raises:
          ValueError: when the prompt leaves no room for min_new_tokens.
        """
        if self.max_length is None:
            return self.new_tokens_limit
        room = self.max_length - prompt_length
        if room < max(self.min_new_tokens, 0):
            raise ValueError(
                f"max_length={self.max_length} leaves no room for "
                f"min_new_tokens={self.min_new_tokens} after a prompt of "
                f"{prompt_length} tokens"
            )
        return room

    @property
    def table(self) -> np.ndarray | None:
        """int32 [states, V] of `allowed_tokens`, if that is what it is."""
        table = self.allowed_tokens
        return table if table is not None and table.ndim == 2 else None

    @property
    def allowed_ids(self) -> np.ndarray | None:
        """The ids of `allowed_tokens`, if it is ids or a mask."""
        allowed = self.allowed_tokens
        if allowed is None or allowed.ndim == 2:
            return None
        return np.flatnonzero(allowed) if allowed.dtype == bool else allowed

    def check_ids(self, vocab_size: int) -> None:
        """Raises ValueError that names the first id outside the vocabulary."""
        allowed = self.allowed_tokens
        if allowed is not None and allowed.dtype == bool and len(allowed) != vocab_size:
            raise ValueError(
                f"allowed_tokens is a mask of {len(allowed)} ids for {vocab_size=}"
            )
        words = (w for w in self.bad_words if not isinstance(w, str))
        for name, ids in (
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids),
            ("bad_words", itertools.chain(*words)),
            ("allowed_tokens", () if self.allowed_ids is None else self.allowed_ids),
        ):
            for i in ids:
                if not 0 <= i < vocab_size:
                    raise ValueError(
                        f"{name}: id {shown(int(i))} is outside [0, {vocab_size=})"
                    )
        if self.logprobs > vocab_size:
            raise ValueError(f"logprobs={self.logprobs} exceeds {vocab_size=}")
        if self.table is not None and self.table.shape[1] != vocab_size:
            raise ValueError(
                f"allowed_tokens has {self.table.shape[1]} columns for {vocab_size=}"
            )


DEFAULTS: dict[str, Any] = {
    field.name: {} if field.name == "logit_bias" else field.default
    for field in dataclasses.fields(Options)
}


def _words(name: str, value: Any) -> tuple[str, ...]:
    return tuple(_word(name, word) for word in items(name, value))


def _word(name: str, value: Any) -> str:
    if not check_text(name, value):
        raise ValueError(f"{name}={value!r} must be text, a character at least")
    return value


def _bad_words(value: Any) -> tuple[str | tuple[int, ...], ...]:
    words: list[str | tuple[int, ...]] = []
    for word in items("bad_words", value):
        is_text = isinstance(word, str)
        words.append(
            _word("bad_words", word) if is_text else tuple(token_ids("bad_words", word))
        )
        if not words[-1]:
            raise ValueError("bad_words has an empty word")
    return tuple(words)


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias={shown(value)} must map token ids to numbers")
    bias = {}
    for key, x in value.items():
        i = integer("logit_bias: id", key)
        bias[i] = number(f"logit_bias[{i}]", x)
        if bias[i] > GREATEST:
            raise ValueError(f"logit_bias[{i}]={bias[i]} must be at most {GREATEST}")
        if bias[i] < -GREATEST:
            bias[i] = -math.inf
    return bias


def _allowed(value: Any) -> np.ndarray:
    """Ids or a mask, of one dimension; or an int32 table of next states."""
    name = "allowed_tokens"
    wanted = f"{name} must be token ids, bool [V] or int [states, V], and not empty"
    rows = items(name, value)
    if not rows:
        raise ValueError(wanted)
    if set(map(type, rows)) == {bool}:
        if not any(rows):
            raise ValueError(f"{name} allows no token")
        return np.array(rows)
    if not any(map(is_list, rows)):
        ids = token_ids(name, rows)
        for i in ids:
            if not 0 <= i < 2**31:
                raise ValueError(f"{name}: id {shown(i)} is outside [0, vocab_size)")
        return np.array(ids)
    states = [
        np.asarray(row) if is_array(row) else np.array(token_ids(name, row))
        for row in rows
    ]
    if len({x.shape for x in states}) > 1 or states[0].ndim != 1 or not states[0].size:
        raise ValueError(wanted)
    table = np.stack(states)
    if table.dtype.kind not in "iuO":
        raise ValueError(f"{name} must be integers or bool, not {table.dtype}")
    outside = table[(table < -1) | (table >= len(table))]
    if outside.size:
        raise ValueError(
            f"{name}: next state {shown(int(outside[0]))} is outside [-1, {len(table)})"
        )
    stuck = np.flatnonzero((table < 0).all(axis=1))
    if stuck.size:
        raise ValueError(f"{name}: state {stuck[0]} allows no token")
    return table.astype(np.int32)
