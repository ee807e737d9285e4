"""Supervised fine-tuning: JSON Lines of prompts and completions -> batches.

A line is {"prompt": text, "completion": text}, or {"messages": [{"role": name,
"content": text}, ...]}, of which the last is the assistant's. Prompt and completion are
tokenized apart, as they are where text is generated, and an end of text follows. Only
what the model shall write counts as a target: the completion, or each content of the
assistant's with what the template puts after it, and the end of text.

Examples are packed whole into windows, as few as come out of putting the longest first
where it fits best. They don't see each other: each is a segment. Which windows there
are is a function of the file; an epoch goes through them in an order of its own.
"""

import functools
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2_jax.checks import check_text, shown
from gpt2_jax.data.loader import Batch, InOrder
from gpt2_jax.data.records import Records, Row, text_of
from gpt2_jax.data.shards import SPLITS
from gpt2_jax.data.sources import documents, form_of
from gpt2_jax.runtime.files import check_regular, user_path
from gpt2_jax.tokenizers.boundaries import end_of_text
from gpt2_jax.tokenizers.protocol import Tokenizer

ASSISTANT = "assistant"
CONTENT = "{content}"
NEEDS_END = "prompts and completions need an end of text"


class Example(NamedTuple):
    """Tokens int32 [n], end of text the last; and bool [n]: which are targets."""

    tokens: np.ndarray
    counts: np.ndarray


def check_template(template: str) -> None:
    """Raises ValueError unless it names {content} once, and else {role} alone."""
    check_text("data.template", template)
    rest = template.replace(CONTENT, "").replace("{role}", "")
    if template.count(CONTENT) != 1 or "{" in rest or "}" in rest:
        raise ValueError(
            f"data.template={shown(template)} must have {CONTENT} once, and may have "
            "{role}: no other braces"
        )


def read_examples(
    path: str | Path, tokenizer: Tokenizer, *, block_size: int, template: str = ""
) -> tuple[list[Example], int]:
    """The examples of a file, and how many were cut.

    One that is longer than block_size + 1 loses tokens of its beginning, as long as its
    last completion is whole and a token is left before it.

    Args:
      template: of a message, with {role} and {content}.

    Raises:
      FileNotFoundError: when there is no such file.
      ValueError: on a tokenizer without an end of text; on a line that holds no
        example, or a completion that does not fit, naming file and line; and on a file
        without any.
    """
    eot_id = end_of_text(tokenizer, NEEDS_END)
    path = user_path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file of examples: {path}")
    check_regular(path)
    form = form_of(str(path))
    examples, n_cut = [], 0
    for source in documents(path, form="jsonl" if form == "text" else form):
        assert isinstance(source, Records)
        for row, place in source.rows():
            try:
                whole = _example(_pieces(row, template), tokenizer, eot_id)
                example = _cut(whole, block_size)
            except ValueError as error:
                raise ValueError(f"{source.where(place.number)}: {error}") from None
            n_cut += len(example.tokens) < len(whole.tokens)
            examples.append(example)
    if not examples:
        raise ValueError(f"{path} holds no example")
    return examples, n_cut


def _pieces(row: Row, template: str) -> list[tuple[str, bool]]:
    """Texts, and whether they are targets."""
    if "messages" not in row:
        prompt, completion = (text_of(row, x) for x in ("prompt", "completion"))
        return [(prompt, False), (completion, True)]
    if not template:
        raise ValueError("messages: data.template must say how they are written")
    messages = row["messages"]
    if not (isinstance(messages, list) and messages):
        raise ValueError("messages is not a list with a message")
    pieces = []
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError("a message is not an object")
        role, content = (text_of(message, x) for x in ("role", "content"))
        before, after = (x.replace("{role}", role) for x in template.split(CONTENT))
        is_target = role == ASSISTANT
        pieces += [(before, False), (content + after, is_target)]
    if role != ASSISTANT:
        raise ValueError(
            f"the last message is of role {shown(role)}, not {ASSISTANT!r}"
        )
    return pieces


def _example(
    pieces: Sequence[tuple[str, bool]], tokenizer: Tokenizer, eot_id: int
) -> Example:
    tokens: list[int] = []
    counts: list[bool] = []
    for is_target, group in groupby(pieces, key=lambda piece: piece[1]):
        ids = tokenizer.encode("".join(text for text, _ in group))
        if not tokens:  # an empty prompt is the beginning of a text
            ids = ids or [eot_id]
        tokens += ids
        counts += [is_target] * len(ids)
    tokens.append(eot_id)
    counts.append(True)
    return Example(np.array(tokens, np.int32), np.array(counts))


def _cut(example: Example, block_size: int) -> Example:
    excess = len(example.tokens) - (block_size + 1)
    if excess <= 0:
        return example
    completion = len(example.tokens) - 1 - np.flatnonzero(~example.counts)[-1]
    if completion > block_size:
        raise ValueError(
            f"a completion of {completion} tokens with its end exceeds {block_size=}"
        )
    return Example(example.tokens[excess:], example.counts[excess:])


def split_examples(
    examples: Sequence[Example], fractions: Sequence[float]
) -> dict[str, list[Example]]:
    """Train, validation and test, in an order that is always the same.

    Raises ValueError on bad fractions, and on a split that would be empty.
    """
    if len(fractions) != len(SPLITS) or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"data.splits={fractions} must be three that add up to 1")
    order = np.random.default_rng(0).permutation(len(examples))
    edges = np.round(np.cumsum([0, *fractions]) * len(examples)).astype(int)
    splits = {}
    for i, (name, fraction) in enumerate(zip(SPLITS, fractions, strict=True)):
        if fraction:
            splits[name] = [examples[j] for j in order[edges[i] : edges[i + 1]]]
            if not splits[name]:
                raise ValueError(
                    f"the {name} split, {fraction:g} of {len(examples)} examples, is "
                    "empty"
                )
    return splits


def sft_splits(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    template: str,
    fractions: Sequence[float],
    block_size: int,
    seed: int = 0,
) -> tuple[dict[str, "SftExamples"], int]:
    """The splits of a file, packed, and how many examples were cut.

    Args:
      seed: of the order of windows.

    Raises as `read_examples` and `split_examples`.
    """
    examples, n_cut = read_examples(
        path, tokenizer, block_size=block_size, template=template
    )
    eot_id = end_of_text(tokenizer, NEEDS_END)
    splits = {
        name: SftExamples(part, block_size=block_size, eot_id=eot_id, seed=seed)
        for name, part in split_examples(examples, fractions).items()
    }
    return splits, n_cut


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Windows of `room` tokens: which of the lengths are in each.

    The longest goes first, each where the least room is left that will do (best fit
    decreasing).
    """
    windows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room that is left, window), ascending
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(free, (lengths[i], 0))
        left, window = free.pop(at) if at < len(free) else (room, len(windows))
        if window == len(windows):
            windows.append([])
        windows[window].append(i)
        insort(free, (left - lengths[i], window))
    return windows


class SftExamples:
    """One split, packed; see `loader.Examples`."""

    def __init__(
        self, examples: Sequence[Example], *, block_size: int, eot_id: int, seed: int
    ):
        self._examples = examples
        self._block_size, self._eot_id, self._seed = block_size, eot_id, seed
        self.windows = pack([len(e.tokens) for e in examples], block_size + 1)

    def __len__(self) -> int:
        return sum(len(e.tokens) for e in self._examples)

    def train(self, numbers: np.ndarray) -> Batch:
        epochs, at = np.divmod(np.asarray(numbers, np.int64), len(self.windows))
        return self._rows(
            [
                _permutation(len(self.windows), self._seed, epoch)[i]
                for epoch, i in zip(epochs.tolist(), at.tolist(), strict=True)
            ]
        )

    def evaluation(self, max_examples: int | None = None) -> InOrder:
        """Windows in order, at most `max_examples` of them."""
        count = min(len(self.windows), max_examples or len(self.windows))

        def read(numbers: np.ndarray) -> Batch:
            return self._rows([i if i < count else None for i in numbers.tolist()])

        return InOrder(count, read)

    def _rows(self, windows: Sequence[int | None]) -> Batch:
        shape = len(windows), self._block_size + 1
        tokens = np.full(shape, self._eot_id, np.int32)
        counts, segments = np.zeros(shape, bool), np.zeros(shape, np.int32)
        for row, window in enumerate(windows):
            held = [] if window is None else self.windows[window]
            at = 0
            for number, i in enumerate(held):
                example = self._examples[i]
                end = at + len(example.tokens)
                tokens[row, at:end], segments[row, at:end] = example.tokens, number
                counts[row, at + 1 : end] = example.counts[1:]
                at = end
            segments[row, at:] = len(held)
        return Batch(tokens, counts[:, 1:], segments[:, :-1])


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)
