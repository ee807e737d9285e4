"""What a model is worth on published sets: figures with their protocol.

A task reads its files into examples: rows of ids of which some are scored (see
`gpt2_jax.decoding.score`), and which of the rows is the right one. All figures are
computed from the log-probabilities of the rows, so these are what is kept of an
evaluation.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from gpt2_jax.checks import check_choice, shown
from gpt2_jax.data.records import Records, lacks, text_of, texts_of
from gpt2_jax.data.records import Row as Record
from gpt2_jax.data.sources import (
    RECORD_SUFFIXES,
    Document,
    documents,
    streams_stored,
)
from gpt2_jax.decoding.detokenize import detokenize
from gpt2_jax.decoding.score import Row, sliding_rows
from gpt2_jax.fields import check_types
from gpt2_jax.lm import LanguageModel
from gpt2_jax.tokenizers.boundaries import before_text
from gpt2_jax.tokenizers.protocol import Tokenizer

T = TypeVar("T")
TARGETS = ("word", "token")
BLANK = "XXXXX"


class Figure(NamedTuple):
    """A value, and in words what it is of and how it came about."""

    value: float
    protocol: str


class Example(NamedTuple):
    """Rows that are scored, and the place of the right one among them."""

    rows: tuple[Row, ...]
    answer: int = 0


class RowScores(NamedTuple):
    """The scores of an example, one entry a row."""

    logprobs: list[float]  # sums, in nats
    is_greedy: list[bool]  # all of its targets


@dataclasses.dataclass(frozen=True)
class Options:
    """How a task is done; None: not given.

    Attributes:
      stride: of `perplexity` and `wikitext`: by how many tokens a window advances;
        by default half of the context.
      detokenizer: of `gpt2_jax.decoding.detokenize`; by default none.
      target: of `lambada`: "word", the last one with the space before it, which is the
        default, or "token", the last token, as OpenAI did.
    """

    stride: int | None = None
    detokenizer: str | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        detokenize("", self.detokenizer or "none")
        if self.target is not None:
            check_choice("target", self.target, TARGETS)


DEFAULT = Options()


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Examples, and what makes figures of what was found for each."""

    examples: list[Example]
    figures: Callable[[list[RowScores]], dict[str, Figure]]


class Reader:
    """Text to rows that a model can score."""

    def __init__(self, tokenizer: Tokenizer, n_positions: int, options: Options):
        self.tokenizer, self.n_positions = tokenizer, n_positions
        self.options = options
        self.n_cut = 0

    def detokenize(self, text: str) -> str:
        return detokenize(text, self.options.detokenizer or "none")

    def text_rows(self, text: str) -> list[Row]:
        """All tokens of a text, the first one after an end of text if there is one."""
        ids = [*before_text(self.tokenizer), *self.tokenizer.encode(text)]
        stride = self.options.stride
        if stride is None:
            stride = max(1, self.n_positions // 2)
        return sliding_rows(ids, self.n_positions, stride)

    def row(self, context: str, continuation: str) -> Row:
        """The tokens of both together, of which those beyond the context's are scored.

        What does not fit is cut from the left.
        """
        ids = self.tokenizer.encode(context + continuation)
        before = self.tokenizer.encode(context)
        n = 0
        while n < min(len(ids), len(before)) and ids[n] == before[n]:
            n += 1
        return self.cut(ids, len(ids) - n)

    def cut(self, ids: list[int], n_scored: int) -> Row:
        if n_scored == len(ids):
            before = before_text(self.tokenizer)
            if not before:
                raise ValueError("nothing comes before what is scored")
            ids = [*before, *ids]
        if not 0 < n_scored <= self.n_positions:
            raise ValueError(
                f"{n_scored} tokens to score must be in [1, {self.n_positions}], the "
                "context"
            )
        self.n_cut += len(ids) > self.n_positions + 1
        return Row(ids[-self.n_positions - 1 :], n_scored)

    @property
    def how(self) -> str:
        """What all protocols end with."""
        text = f"detokenizer {self.options.detokenizer or 'none'}"
        if self.n_cut:
            text += f", {self.n_cut} rows cut on the left to fit {self.n_positions}"
        return text


# --- Files ----------------------------------------------------------------------------

Sources = Sequence[Document | Records]
Where = str  # file and line, of errors


def rows_of(found: Sources, *columns: str) -> Iterator[tuple[Where, Record]]:
    """The records of all files.

    Raises:
      ValueError: on a file of text.
    """
    for source in found:
        if not isinstance(source, Records):
            raise ValueError(
                f"{source.name} is read as text, not as rows: names of files with rows "
                f"end in {', '.join(RECORD_SUFFIXES)}"
            )
        for row, place in source.rows(columns=columns):
            yield source.where(place.number), row


def examples_of(
    rows: Iterable[tuple[Where, T]], make: Callable[[T], Example]
) -> list[Example]:
    """What `make` makes of each; its errors get the place in front."""
    examples = []
    for where, row in rows:
        try:
            examples.append(make(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return examples


# --- Tasks ----------------------------------------------------------------------------


def perplexity(found: Sources, reader: Reader) -> Prepared:
    """Scores each document by itself: what `data.path` may be."""
    texts: list[str] = []
    for source in found:  # a file of one document, or of many
        one = isinstance(source, Document)
        texts += ["".join(source.texts())] if one else source.texts()
    return _perplexity(texts, reader, f"{len(texts)} documents apart")


def wikitext(found: Sources, reader: Reader) -> Prepared:
    """A file of tokens, or rows that are its lines: one text."""
    if isinstance(found[0], Document):
        text = "".join(part for source in found for part in source.texts())
        return _perplexity([text], reader, "all text in one")
    lines = []

    def add(row: Record) -> Example:
        lines.append(text_of(row, "text").removesuffix("\n"))
        return Example(())

    examples_of(rows_of(found, "text"), add)
    # As the lines of the file: an empty row stands for a lone space.
    text = "".join(f"{line or ' '}\n" for line in lines)
    return _perplexity([text], reader, "all rows in one text")


def _perplexity(texts: Sequence[str], reader: Reader, of: str) -> Prepared:
    n_words = sum(len(text.split()) for text in texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    rows = [row for text in texts for row in reader.text_rows(reader.detokenize(text))]
    n_tokens = sum(row.n_scored for row in rows)
    if not n_words:  # white space alone has no perplexity a word
        rows = []
    limit, stride = reader.n_positions, reader.options.stride
    stride = max(1, limit // 2) if stride is None else stride
    first = "given end of text" if before_text(reader.tokenizer) else "not scored"
    how = (
        f"{of}, each token once, windows of {limit} tokens that advance by {stride}, "
        f"first token {first}, {reader.how}"
    )
    published = "of the text as published"

    def figures(found: list[RowScores]) -> dict[str, Figure]:
        total = -math.fsum(x for f in found for x in f.logprobs)
        return {
            "token_perplexity": Figure(
                _exp(total / n_tokens), f"over {n_tokens} tokens: {how}"
            ),
            "word_perplexity": Figure(
                _exp(total / n_words), f"over {n_words} words {published}: {how}"
            ),
            "byte_perplexity": Figure(
                _exp(total / n_bytes), f"over {n_bytes} bytes {published}: {how}"
            ),
            "bits_per_byte": Figure(
                total / n_bytes / math.log(2),
                f"over {n_bytes} bytes {published}: {how}",
            ),
        }

    return Prepared([Example((row,)) for row in rows], figures)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def lambada(found: Sources, reader: Reader) -> Prepared:
    """The end of each passage: of lines of plain text, or of the field `text`."""
    target = reader.options.target or "word"

    def example(row: Record) -> Example:
        text = reader.detokenize(text_of(row, "text").rstrip())
        if target == "token":
            ids = reader.tokenizer.encode(text)
            return Example((reader.cut(ids, min(1, len(ids))),))
        words = text.rsplit(None, 1)
        if len(words) < 2:
            raise ValueError(f"{shown(text, 40)} has no word before its last")
        context = text[: -len(words[1])].rstrip()
        return Example((reader.row(context, text[len(context) :]),))

    examples = examples_of(_passages(found), example)
    rule = {
        "word": "the last word with the space before it, all tokens of it",
        "token": "the last token, as OpenAI did",
    }[target]
    how = f"over {len(examples)} passages: target {rule}; {reader.how}"

    def figures(found: list[RowScores]) -> dict[str, Figure]:
        mean = math.fsum(f.logprobs[0] for f in found) / len(found)
        return {
            "accuracy": Figure(
                float(np.mean([f.is_greedy[0] for f in found])), f"greedy, {how}"
            ),
            "perplexity": Figure(_exp(-mean), f"of a {target}, {how}"),
        }

    return Prepared(examples, figures)


def _passages(found: Sources) -> Iterator[tuple[Where, Record]]:
    for source in found:
        if isinstance(source, Records):
            yield from rows_of([source], "text")
        else:
            lines = source.lines()
            yield from ((where, {"text": x}) for where, x in lines if x.strip())


def hellaswag(found: Sources, reader: Reader) -> Prepared:
    """The ending of greatest probability, of rows with ctx, endings and label."""

    def example(row: Record) -> Example:
        context = reader.detokenize(text_of(row, "ctx"))
        endings = [" " + reader.detokenize(x) for x in texts_of(row, "endings")]
        if not endings:
            raise ValueError("'endings' is []")
        if "label" not in row:
            raise lacks("label", row)
        label = row["label"]
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(f"'label' is {shown(label, 40)}")
        places = [str(i) for i in range(len(endings))]
        if str(label) not in places:
            raise ValueError(
                f"label {shown(label, 40)} is not in [0, {len(endings)}), the endings"
            )
        rows = tuple(reader.row(context, ending) for ending in endings)
        return Example(rows, places.index(str(label)))

    examples = examples_of(rows_of(found, "ctx", "endings", "label"), example)
    how = f"over {len(examples)} examples: completion of ctx, a space, {reader.how}"
    return Prepared(examples, lambda found: _choice(examples, found, how, "ending"))


def cloze(found: Sources, reader: Reader) -> Prepared:
    """The candidate for the blank that makes it and the rest of its sentence likeliest.

    Blocks of 20 numbered lines and a 21st of question, answer and candidates, as the
    Children's Book Test is published; or rows of sentences, question, answer, options.
    """

    def example(row: Record | list[str]) -> Example:
        row = _numbered(row) if isinstance(row, list) else row
        question, answer = text_of(row, "question"), text_of(row, "answer")
        candidates = texts_of(row, "options")
        sentences = [*texts_of(row, "sentences"), question]
        if question.count(BLANK) != 1:
            raise ValueError(f"{shown(question, 40)} must have one {BLANK}")
        if answer not in candidates:
            raise ValueError(f"{shown(answer, 40)} is not among {shown(candidates)}")
        texts = [
            reader.detokenize(" ".join(sentences).replace(BLANK, x)) for x in candidates
        ]
        # What all have before the blank; a detokenizer may join it to what is there.
        whole = reader.detokenize(" ".join(sentences))
        context = whole[: whole.index(BLANK)].rstrip()
        rows = tuple(reader.row(context, text[len(context) :]) for text in texts)
        return Example(rows, candidates.index(answer))

    examples = examples_of(_blanks(found), example)
    how = (
        f"over {len(examples)} questions: sentences joined by spaces, candidate and "
        f"rest of its sentence given all before, {reader.how}"
    )
    return Prepared(examples, lambda found: _choice(examples, found, how, "candidate"))


def _blanks(found: Sources) -> Iterator[tuple[Where, Record | list[str]]]:
    """Rows, or of a text the lines of each block; empty lines are between them."""
    for source in found:
        if isinstance(source, Records):
            yield from rows_of([source], "sentences", "question", "answer", "options")
            continue
        block: list[tuple[Where, str]] = []
        for where, line in source.lines():
            if line.strip():
                block.append((where, line))
            elif block:
                yield block[0][0], [line for _, line in block]
                block = []
        if block:
            yield block[0][0], [line for _, line in block]


def _numbered(lines: list[str]) -> Record:
    """The row that a block of 21 lines stands for."""
    numbered = [line.split(" ", 1) for line in lines]
    if [number for number, *_ in numbered] != [str(i) for i in range(1, 22)]:
        raise ValueError("no block of 21 lines numbered 1 to 21")
    *sentences, last = (" ".join(rest).strip() for _, *rest in numbered)
    fields = last.split("\t")
    if len(fields) < 3:
        raise ValueError(
            "line 21 of a block is no question, answer and candidates with tabs between"
        )
    options = fields[-1].split("|")
    names = ("sentences", "question", "answer", "options")
    return dict(zip(names, (sentences, fields[0], fields[1], options), strict=True))


def _choice(
    examples: list[Example], found: list[RowScores], how: str, unit: str
) -> dict[str, Figure]:
    def accuracy(score: Callable[[float, Row], float]) -> float:
        best = (
            int(np.argmax([score(*x) for x in zip(f.logprobs, e.rows, strict=True)]))
            for e, f in zip(examples, found, strict=True)
        )
        right = [i == e.answer for i, e in zip(best, examples, strict=True)]
        return float(np.mean(right))

    return {
        "acc": Figure(
            accuracy(lambda x, row: x), f"{unit} of greatest log-probability, {how}"
        ),
        "acc_norm": Figure(
            accuracy(lambda x, row: x / row.n_scored),
            f"{unit} of greatest log-probability a token, {how}",
        ),
    }


TASKS: dict[str, Callable[[Sources, Reader], Prepared]] = {
    "perplexity": perplexity,
    "wikitext": wikitext,
    "lambada": lambada,
    "hellaswag": hellaswag,
    "cloze": cloze,
}
TAKES_STRIDE = ("perplexity", "wikitext")


def prepare(task: str, path: str, lm: LanguageModel, options: Options) -> Prepared:
    """The examples of a task as this model sees them.

    Raises:
      ValueError, OSError: on an unknown task, an option that it does not have, and
        files that are not there, empty or not in its form.
    """
    check_choice("task", task, TASKS)
    if options.stride is not None and task not in TAKES_STRIDE:
        raise ValueError(f"stride={options.stride}: {task} has no windows")
    if options.target is not None and task != "lambada":
        raise ValueError(f"target={shown(options.target)} is of lambada, not of {task}")
    reader = Reader(lm.tokenizer, lm.config.n_positions, options)
    with streams_stored(path) as files:
        prepared = TASKS[task](documents(files), reader)
    if not prepared.examples:
        raise ValueError(f"{path}: no example in it, or white space alone")
    return prepared
