"""The files of a byte-level BPE, read into a vocabulary and its merges."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gpt2_jax.checks import shown
from gpt2_jax.runtime.budget import Budget
from gpt2_jax.tokenizers.added_tokens import AddedToken
from gpt2_jax.tokenizers.token_roles import added_tokens, json_object, leading_ids

# The sets of files that a byte-level BPE comes in; the first complete one is read.
FILE_SETS: tuple[tuple[str, ...], ...] = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
)


def list_file_sets(file_sets: Iterable[Iterable[str]]) -> str:
    """Returns the sets as an error message lists them: `a, or b + c`."""
    return ", or ".join(" + ".join(names) for names in file_sets)


def choose_file_set(available: Iterable[str]) -> tuple[str, ...]:
    """Returns the first of FILE_SETS that is complete.

    Raises:
      ValueError: when none is.
    """
    available = sorted(available)
    for names in FILE_SETS:
        if set(names) <= set(available):
            return names
    raise ValueError(
        f"a GPT-2 tokenizer is {list_file_sets(FILE_SETS)}; given: {available}"
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible character for each byte, as character -> byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {
        chr(256 + i): b for i, b in enumerate(hidden)
    }


BYTE_OF_CHARACTER = _byte_alphabet()


@dataclass(frozen=True)
class Vocabulary:
    """The contents of a byte-level BPE's files.

    Attributes:
      ids: token -> id. Tokens are written in the byte alphabet (`BYTE_OF_CHARACTER`).
      merges: the pairs of tokens that are joined, in order of rank.
      added: the tokens that are found in text before the BPE runs; None when the files
        don't tell them apart from the others.
      begin_ids: the ids that begin every prompt.
      add_prefix_space: whether text that begins without a space gets one.
    """

    ids: dict[str, int]
    merges: list[tuple[str, ...]]
    added: Sequence[AddedToken] | None = None
    begin_ids: tuple[int, ...] = ()
    add_prefix_space: bool = False

    def tokens_by_rank(self) -> list[str]:
        """Returns the 256 bytes, by id, then the results of the merges, in order.

        Raises:
          ValueError: when a byte is missing, or on the first merge that doesn't make
            a new token of the vocabulary from two that are known.
        """
        for character, byte in BYTE_OF_CHARACTER.items():
            if character not in self.ids:
                raise ValueError(f"the vocabulary lacks the byte 0x{byte:02x}")
        tokens = dict.fromkeys(sorted(BYTE_OF_CHARACTER, key=self.ids.__getitem__))
        for n, merge in enumerate(self.merges, 1):
            if len(merge) != 2 or not all(part in tokens for part in merge):
                raise ValueError(
                    f"merge {n}, {shown(merge)}, does not join two known tokens"
                )
            token = "".join(merge)
            if token not in self.ids:
                raise ValueError(
                    f"merge {n} makes {shown(token)}: not in the vocabulary"
                )
            if token in tokens:
                raise ValueError(f"merge {n} makes {shown(token)} a second time")
            tokens[token] = None
        return list(tokens)


def read_vocabulary(files: dict[str, bytes]) -> Vocabulary:
    """Reads one of FILE_SETS.

    Args:
      files: name -> content, in the order of the set.

    Raises:
      ValueError: on files that are damaged, or that describe another tokenizer.
    """
    (name, content), *rest = files.items()
    if rest:
        ids = json_object(content, name)
        vocabulary = Vocabulary(ids, _read_merges(*rest[0]))
    else:
        vocabulary = _read_tokenizer_json(content)
    if not all(type(i) is int for i in vocabulary.ids.values()):
        raise ValueError(f"{name}: not a table of token -> id")
    return vocabulary


def _read_merges(name: str, content: bytes) -> list[tuple[str, ...]]:
    """Reads lines `left right`, after an optional first line `#version: ...`."""
    Budget(len(content)).draw(200 * content.count(b"\n") + 8 * len(content))
    try:
        lines = content.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start}") from None
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return [tuple(line.split(" ")) for line in lines if line]


def _read_tokenizer_json(content: bytes) -> Vocabulary:
    """Reads tokenizer.json; refuses by name all that GPT-2's BPE doesn't do."""
    name = "tokenizer.json"
    data = json_object(content, name)
    _check_pipeline(data)
    model = _part(data, "model")
    merges, ids = model.get("merges"), model.get("vocab")
    if not isinstance(merges, list) or not isinstance(ids, dict):
        raise ValueError(f"{name} is damaged: no vocabulary with merges")
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
    for pair in pairs:
        if not isinstance(pair, list) or not all(isinstance(x, str) for x in pair):
            raise ValueError(f"{name} is damaged: {shown(pair)} is no merge")
    prefix = _part(data, "pre_tokenizer").get("add_prefix_space", True)
    return Vocabulary(
        ids,
        [*map(tuple, pairs)],
        added=[*added_tokens(data.get("added_tokens") or [], name)],
        begin_ids=leading_ids(_part(data, "post_processor"), name),
        add_prefix_space=prefix is True,
    )


def _part(data: dict[str, Any], key: str) -> dict[str, Any]:
    value = data.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"tokenizer.json is damaged: {key} is {shown(value)}")
    return value


def _check_pipeline(data: dict[str, Any]) -> None:
    """Raises ValueError unless tokenizer.json cuts text as GPT-2's BPE does."""

    def demand(what: str, value: object, allowed: tuple[object, ...]) -> None:
        if value not in allowed:
            raise ValueError(
                f"tokenizer.json is not GPT-2's byte-level BPE: {what} is "
                f"{shown(value)}"
            )

    model, pre_tokenizer = _part(data, "model"), _part(data, "pre_tokenizer")
    # Files from before 2020 name no model type; a model with merges is a BPE.
    model_type = model.get("type", "BPE" if "merges" in model else None)
    demand("model.type", model_type, ("BPE",))
    for key in (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    ):
        demand(f"model.{key}", model.get(key), (None, False, "", 0))
    demand("normalizer", _part(data, "normalizer").get("type"), (None,))
    demand("pre_tokenizer", pre_tokenizer.get("type"), ("ByteLevel",))
    prefix = pre_tokenizer.get("add_prefix_space", True)
    demand("add_prefix_space", prefix, (False, True))
    demand("use_regex", pre_tokenizer.get("use_regex", True), (True,))
    demand("decoder", _part(data, "decoder").get("type"), (None, "ByteLevel"))
