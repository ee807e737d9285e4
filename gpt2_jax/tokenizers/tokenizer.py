"""Text <-> token ids: GPT-2's byte-level BPE, SentencePiece, characters, bytes.

Every tokenizer decodes through one table, id -> bytes, so decoding is the same
everywhere: join the bytes, then read them as UTF-8. `encode` never interprets special
tokens that are written in the text unless it is told to, and `decode(encode(text)) ==
text` for every text that can be written in UTF-8 (for a foreign SentencePiece model, or
added tokens that take in white space: as far as it goes).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpt2_jax.checks import check_choice, check_text, integer, items, shown, token_ids
from gpt2_jax.runtime.budget import Budget
from gpt2_jax.runtime.files import check_regular, parse_json, user_path
from gpt2_jax.tokenizers.added_tokens import SPACE, AddedToken, AddedTokens
from gpt2_jax.tokenizers.token_roles import (
    BESIDE,
    END_OF_TEXT,
    ROLES,
    Roles,
    added_tokens,
    json_object,
    leading_ids,
    read_roles,
)


class Tokenizer(Protocol):
    """What the project asks of a tokenizer. Ids are 0 .. vocab_size - 1."""

    @property
    def kind(self) -> str:
        """The name that `tokenizer_from_files` knows it by."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""

    @property
    def eot_id(self) -> int | None:
        """The end-of-text token, which follows every document; None: nothing does."""

    @property
    def bos_id(self) -> int | None:
        """What a text without a beginning of its own begins after; None: nothing."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """A generated text ends before these."""

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """What every prompt of text begins with."""

    @property
    def unk_id(self) -> int | None:
        """What stands for all that is not known; None where everything is."""

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """What each id stands for. ValueError where there is no text."""

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. ValueError on a lone surrogate."""

    def encode_array(self, text: str) -> np.ndarray:
        """The same as an array of integers [n]; the fastest form."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; bytes that are no UTF-8 (a cut sequence) become U+FFFD.

        Special tokens appear as they are written, `<|endoftext|>`. ValueError on an id
        that is out of range.
        """

    def files(self) -> dict[str, bytes]:
        """The files, name -> content, that `tokenizer_from_files` rebuilds it from."""


def end_of_text(tokenizer: Tokenizer, purpose: str) -> int:
    """The end-of-text token of a tokenizer, which `purpose` can't do without.

    Raises:
      ValueError: beginning with `purpose`, where the tokenizer has none.
    """
    if tokenizer.eot_id is None:
        raise ValueError(f"{purpose}, and this tokenizer ({tokenizer.kind}) has none")
    return tokenizer.eot_id


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids to go on from: those of a text, or where it is empty, what comes before it.

    Raises:
      ValueError: as `encode`, and on an empty text where nothing comes before it.
    """
    ids = [*tokenizer.begin_ids, *tokenizer.encode(text)]
    if not (ids or (ids := before_text(tokenizer))):
        raise ValueError(
            "the prompt is empty, and this model has no end of text to begin after: "
            "give a prompt"
        )
    return ids


def before_text(tokenizer: Tokenizer) -> list[int]:
    """The token that a text follows where it is scored; may be none."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*tokenizer.begin_ids[-1:]] or begin


def as_trained(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer for a model that was trained here: an end of text stands before and
    after each document, whatever the files of another model said."""
    if isinstance(tokenizer, GPT2Tokenizer | NoTokenizer):
        return tokenizer.as_trained()
    return tokenizer


class _TableTokenizer:
    """Decoding, shared: `_table[i]` holds the bytes of id i."""

    _table: list[bytes]
    eot_id: int | None = None
    unk_id: int | None = None

    @property
    def bos_id(self) -> int | None:
        return self.eot_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        return () if self.eot_id is None else (self.eot_id,)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        return ()

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), np.int64)

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    @property
    def token_bytes(self) -> Sequence[bytes]:
        return self._table

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._bytes(ids).decode("utf-8", errors="replace")

    def _bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        numbers = token_ids("token ids", ids)
        for i in numbers:
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"token id {shown(i)} is out of range: vocab_size={self.vocab_size}"
                )
        return b"".join([self._table[i] for i in numbers])


def _utf8(text: str) -> bytes:
    """UTF-8 of text; ValueError if it has none, or is no text."""
    return check_text("text", text).encode()


class ByteTokenizer(_TableTokenizer):
    """The 256 bytes of UTF-8, then end of text: 257 ids."""

    kind = "bytes"

    def __init__(self) -> None:
        self._table = [bytes([b]) for b in range(256)] + [END_OF_TEXT.encode()]
        self.eot_id = 256

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def files(self) -> dict[str, bytes]:
        return {"bytes.json": b"{}\n"}


class CharTokenizer(_TableTokenizer):
    """A table of characters in code point order, then end of text.

    Without `end_of_text`, as nanoGPT's, there is no such token and eot_id is None.
    `encode` raises ValueError on a character that the table lacks.
    """

    kind = "char"

    def __init__(self, characters: Iterable[str], *, end_of_text: bool = True):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise ValueError("no text to take characters from")
        _utf8(self.characters)
        self._codes = self._code_points(self.characters)
        self._table = [c.encode() for c in self.characters]
        if end_of_text:
            self.eot_id = len(self._table)
            self._table.append(END_OF_TEXT.encode())

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharTokenizer":
        """The table of all characters that occur in `texts`."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls(characters)

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        codes = self._code_points(text)
        ids = np.searchsorted(self._codes, codes)
        known = self._codes[np.minimum(ids, len(self._codes) - 1)] == codes
        if not known.all():
            at = int(np.argmin(known))
            raise ValueError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is "
                f"not in the vocabulary of {len(self._codes)} characters"
            )
        return ids.tolist()

    def files(self) -> dict[str, bytes]:
        content: Any = self.characters
        if self.eot_id is None:
            content = {"characters": self.characters, "end_of_text": False}
        return {"characters.json": json.dumps(content).encode() + b"\n"}

    @staticmethod
    def _code_points(text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-32-le"), "<u4")


class NoTokenizer:
    """Stands where a model came without one: token ids only, ValueError on text.

    Args:
      why: there is none.
      end_ids: by default the end of text, if there is one.
    """

    kind = "none"
    unk_id: int | None = None
    begin_ids: tuple[int, ...] = ()

    def __init__(
        self,
        vocab_size: int,
        eot_id: int | None,
        why: str,
        end_ids: Sequence[int] | None = None,
    ):
        self.vocab_size, self.eot_id, self.why = vocab_size, eot_id, why
        if end_ids is None:
            end_ids = () if eot_id is None else (eot_id,)
        self.end_ids = tuple(end_ids)

    @property
    def bos_id(self) -> int | None:
        return self.eot_id

    @property
    def token_bytes(self) -> Sequence[bytes]:
        raise ValueError(f"text needs a tokenizer: {self.why}")

    def encode(self, text: str) -> list[int]:
        raise ValueError(f"text needs a tokenizer, give token ids: {self.why}")

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        raise ValueError(f"text needs a tokenizer: {self.why}")

    def as_trained(self) -> "NoTokenizer":
        ends = {*self.end_ids} | ({self.eot_id} if self.eot_id is not None else set())
        return NoTokenizer(self.vocab_size, self.eot_id, self.why, sorted(ends))

    def files(self) -> dict[str, bytes]:
        """What is known of the ids; `why` is of this machine and not kept."""
        known = {"vocab_size": self.vocab_size, "eot_id": self.eot_id}
        content = json.dumps({**known, "end_ids": self.end_ids})
        return {IDS: content.encode() + b"\n"}


IDS = "ids.json"


def _read_ids(content: bytes) -> NoTokenizer:
    values = json_object(content, IDS)
    size, eot_id = values.get("vocab_size"), values.get("eot_id")
    ends = values.get("end_ids")
    if not isinstance(ends, list) or type(size) is not int:
        raise ValueError(f"{IDS} is damaged: {shown(values)}")
    for i in [*ends, *([] if eot_id is None else [eot_id])]:
        if type(i) is not int or not 0 <= i < size:
            raise ValueError(f"{IDS}: {shown(i)} is no id of {size}")
    return NoTokenizer(size, eot_id, "the model was made for token ids alone", ends)


# --- GPT-2 ----------------------------------------------------------------------------

# GPT-2's pre-token pattern, `'s|'t|...| ?\p{L}+|...|\s+(?!\S)|\s+`, for an engine that
# backtracks: possessive where giving back cannot help, and a closing run of whitespace
# taken whole. After `\s+(?!\S)` has failed, just one whitespace character is left.
_PRE_TOKEN = (
    r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
    r"|\s++$|\s+(?!\S)|\s"
)
# What still backtracks, `\s+(?!\S)`, overflows the engine's stack (and panics) on some
# 300,000 spaces before a word. All of a run but its last character is one pre-token, so
# very long runs are cut off here.
_LONG = 10_000
_LONG_RUN = re.compile(rf"((?<![{SPACE}])[{SPACE}]{{{_LONG},}}(?=[{SPACE}][^{SPACE}]))")


def _cut_long_runs(text: str) -> list[str]:
    """The parts of text: each can be encoded on its own."""
    half = _LONG // 2  # a long run covers a whole stride: most texts end here, fast
    strides = range(0, len(text) - half + 1, half)
    if any(text[i : i + half].isspace() for i in strides):
        return _LONG_RUN.split(text)
    return [text]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's visible character for each byte, as character -> byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {
        chr(256 + i): b for i, b in enumerate(hidden)
    }


BYTES = _byte_alphabet()


class GPT2Tokenizer(_TableTokenizer):
    """GPT-2's byte-level BPE, run by tiktoken.

    Args:
      files: `vocab.json` and `merges.txt`, or `encoder.json` and `vocab.bpe`, or
        `tokenizer.json` alone. Ids are those of the vocabulary, in whatever order.
        Beside them those of `token_roles.BESIDE`, as transformers writes them, and
        ROLES, which `files` gives where they said anything.

    Raises ValueError on files that are damaged, or that describe another tokenizer.
    """

    kind = "gpt2"
    FORMS: tuple[tuple[str, ...], ...] = (
        ("tokenizer.json",),
        ("vocab.json", "merges.txt"),
        ("encoder.json", "vocab.bpe"),
    )

    def __init__(self, files: Mapping[str, bytes]):
        import tiktoken

        form = next((f for f in self.FORMS if set(f) <= set(files)), None)
        if form is None:
            raise ValueError(
                f"a GPT-2 tokenizer is {_either(self.FORMS)}; given: {sorted(files)}"
            )
        self._files = {name: files[name] for name in form}
        if form == ("tokenizer.json",):
            read = _read_tokenizer_json(files[form[0]])
        else:
            vocab = json_object(files[form[0]], form[0])
            read = _TokenizerJson(vocab, _read_merges(form[1], files[form[1]]))
        vocab = read.vocab
        if not all(type(i) is int for i in vocab.values()):
            raise ValueError(f"{form[0]}: not a table of token -> id")
        learned = _merged_tokens(vocab, read.merges)
        unlisted = [] if read.added is not None else sorted({*vocab} - {*learned})
        roles = partial(
            read_roles,
            vocab,
            read.added or (),
            unlisted=unlisted,
            begin_ids=read.begin_ids,
            add_prefix_space=read.add_prefix_space,
        )
        self.roles = Roles.from_json(files[ROLES]) if ROLES in files else roles(files)
        if not self.roles.same_effect(roles({})):
            self._files[ROLES] = self.roles.to_json()
        self.eot_id = self.roles.eot_id
        self._table = self._make_table(form[0], vocab, learned)
        self._added = AddedTokens(self.roles.added)

        ranked = np.array([vocab[token] for token in learned])
        identity = bool((ranked == np.arange(len(ranked))).all())
        self._id_of_rank = None if identity else ranked
        self._bpe = tiktoken.Encoding(
            "gpt2_jax",
            pat_str=_PRE_TOKEN,
            mergeable_ranks={self._table[i]: r for r, i in enumerate(ranked.tolist())},
            special_tokens={},
        )

    def _make_table(
        self, name: str, vocab: Mapping[str, int], learned: Sequence[str]
    ) -> list[bytes]:
        """What each id stands for; raises ValueError unless each stands for a token."""
        tokens = {token.content: token.id for token in self.roles.added}
        for token, i in vocab.items():
            if tokens.setdefault(token, i) != i:
                raise ValueError(f"{name}: {shown(token)} has two ids")
        size = self.roles.size
        kept = {token: i for token, i in tokens.items() if i < size}
        if sorted(kept.values()) != list(range(size)):
            raise ValueError(
                f"{name}: the ids of {len(tokens)} tokens are not 0 .. {size - 1}, "
                "each once"
            )
        table = [b""] * size
        for token, i in kept.items():
            table[i] = _utf8(token)
        for token in learned:
            if vocab[token] >= size:
                raise ValueError(
                    f"{name}: {shown(token)}, a piece of text, has the id "
                    f"{vocab[token]}, and the model has {size} rows"
                )
            table[vocab[token]] = bytes(BYTES[c] for c in token)
        return table

    def within(self, size: int) -> "GPT2Tokenizer":
        """The same without the tokens whose ids are `size` or more.

        Raises:
          ValueError: where text is cut into one of them.
        """
        return self._with(self.roles.within(size))

    def as_trained(self) -> "GPT2Tokenizer":
        """The same for a model that was trained here, see `Roles.as_trained`."""
        return self._with(self.roles.as_trained())

    def _with(self, roles: Roles) -> "GPT2Tokenizer":
        if roles == self.roles:
            return self
        return GPT2Tokenizer({**self._files, ROLES: roles.to_json()})

    @property
    def bos_id(self) -> int | None:
        return self.roles.bos_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        return self.roles.end_ids

    @property
    def begin_ids(self) -> tuple[int, ...]:
        return self.roles.begin_ids

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of a text. Tokens that were added are found in it, except special ones.

        Args:
          parse_special: special tokens too. Whoever wrote the text can then end it,
            or speak in a role that is not his.
        """
        ids: list[int] = []
        for part in self._parts(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
                continue
            ranks = self._bpe.encode_ordinary(part)
            known = self._id_of_rank
            ids += ranks if known is None else known[ranks].tolist()
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        arrays: list[np.ndarray] = [np.zeros(0, np.int64)]
        for part in self._parts(text, parse_special=False):
            if isinstance(part, int):
                arrays.append(np.array([part]))
                continue
            ranks = self._bpe.encode_to_numpy(part, disallowed_special=())
            known = self._id_of_rank
            arrays.append(ranks if known is None else known[ranks])
        return arrays[1] if len(arrays) == 2 else np.concatenate(arrays)

    def _parts(self, text: str, parse_special: bool) -> Iterator[str | int]:
        """Ids of added tokens, and texts that can each be encoded on its own."""
        _utf8(text)
        for part in self._added.split(text, parse_special=parse_special):
            if isinstance(part, int):
                yield part
                continue
            if self.roles.add_prefix_space and not part.startswith(" "):
                part = f" {part}"
            yield from _cut_long_runs(part)

    def files(self) -> dict[str, bytes]:
        return dict(self._files)


def _either(forms: Iterable[Iterable[str]]) -> str:
    return ", or ".join(" + ".join(form) for form in forms)


def _read_merges(name: str, content: bytes) -> list[tuple[str, ...]]:
    """Lines `left right`, after an optional first line `#version: ...`."""
    Budget(len(content)).draw(200 * content.count(b"\n") + 8 * len(content))
    try:
        lines = content.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start}") from None
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return [tuple(line.split(" ")) for line in lines if line]


class _TokenizerJson(NamedTuple):
    """A vocabulary as tokenizer.json has it."""

    vocab: dict[str, int]
    merges: list[tuple[str, ...]]
    added: Sequence[AddedToken] | None = None  # None: it does not say which
    begin_ids: tuple[int, ...] = ()
    add_prefix_space: bool = False


def _read_tokenizer_json(content: bytes) -> _TokenizerJson:
    """What is there; refuses by name what cuts text otherwise than GPT-2's BPE."""
    name = "tokenizer.json"
    data = json_object(content, name)

    def demand(what: str, value: object, allowed: tuple[object, ...]) -> None:
        if value not in allowed:
            raise ValueError(
                f"{name} is not GPT-2's byte-level BPE: {what} is {shown(value)}"
            )

    def part(key: str) -> dict[str, Any]:
        value = data.get(key) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{name} is damaged: {key} is {shown(value)}")
        return value

    model, pre_tokenizer = part("model"), part("pre_tokenizer")
    # Files of before 2020 name no model type; a BPE is what has merges.
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
    demand("normalizer", part("normalizer").get("type"), (None,))
    demand("pre_tokenizer", pre_tokenizer.get("type"), ("ByteLevel",))
    prefix = pre_tokenizer.get("add_prefix_space", True)
    demand("add_prefix_space", prefix, (False, True))
    demand("use_regex", pre_tokenizer.get("use_regex", True), (True,))
    demand("decoder", part("decoder").get("type"), (None, "ByteLevel"))
    merges, vocab = model.get("merges"), model.get("vocab")
    if not isinstance(merges, list) or not isinstance(vocab, dict):
        raise ValueError(f"{name} is damaged: no vocabulary with merges")
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
    for pair in pairs:
        if not isinstance(pair, list) or not all(isinstance(x, str) for x in pair):
            raise ValueError(f"{name} is damaged: {shown(pair)} is no merge")
    added = [*added_tokens(data.get("added_tokens") or [], name)]
    begin = leading_ids(part("post_processor"), name)
    return _TokenizerJson(vocab, [*map(tuple, pairs)], added, begin, prefix is True)


def _merged_tokens(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, ...]]
) -> list[str]:
    """Tokens in order of rank: the 256 bytes, by id, then what the merges make."""
    missing = [f"0x{byte:02x}" for char, byte in BYTES.items() if char not in vocab]
    if missing:
        raise ValueError(f"the vocabulary lacks the byte {missing[0]}")
    tokens = dict.fromkeys(sorted(BYTES, key=vocab.__getitem__))
    for n, merge in enumerate(merges, 1):
        if len(merge) != 2 or not all(part in tokens for part in merge):
            raise ValueError(
                f"merge {n}, {shown(merge)}, does not join two known tokens"
            )
        token = "".join(merge)
        if token not in vocab:
            raise ValueError(f"merge {n} makes {shown(token)}: not in the vocabulary")
        if token in tokens:
            raise ValueError(f"merge {n} makes {shown(token)} a second time")
        tokens[token] = None
    return list(tokens)


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = ()
) -> GPT2Tokenizer:
    """Trains GPT-2's kind of BPE by the library tokenizers (the extra `tokenizers`).

    Ids: the 256 bytes, the merges in their order, the end of text, special_tokens. The
    same texts, in the same parts, give the same tokenizer.

    Raises ValueError, naming the limit, when the text cannot fill vocab_size or the
    bytes and special tokens do not fit in it, on special tokens as
    `check_special_tokens`, and when the library is missing.
    """
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "training a byte-level BPE needs the package tokenizers: "
            "pip install 'gpt2-jax[tokenizers]'"
        ) from None
    check_special_tokens(special_tokens)
    vocab_size = integer("vocab_size", vocab_size)
    special = [END_OF_TEXT, *special_tokens]
    least = 256 + len(special)
    if vocab_size < least:
        raise ValueError(
            f"{vocab_size=} is too small: 256 bytes and {len(special)} special tokens "
            f"need {least}"
        )
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(special),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    if len(vocab) + len(special) < vocab_size:
        raise ValueError(_too_large(vocab_size, len(vocab) + len(special)))
    for name in special:
        if name in vocab:
            raise ValueError(f"special token {name!r} is a token of the text as well")
        vocab[name] = len(vocab)
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    return GPT2Tokenizer(
        {
            "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
            "merges.txt": f"#version: 0.2\n{merges}".encode(),
        }
    )


# --- SentencePiece --------------------------------------------------------------------

BLANK = "\u2581"  # how SentencePiece writes a space
_RESERVED = re.compile("[\u2581\u2585]")  # its trainer's own: blank and unknown


class SentencePieceTokenizer(_TableTokenizer):
    """A SentencePiece model; its end-of-sentence piece, if any, is the end of text.

    A model of `train_sentencepiece` is exact for every text. A foreign one is used as
    it is: its normaliser may change the text, and without byte fallback a character
    that it does not know becomes its unknown piece, which decodes to U+FFFD.

    Raises ValueError if `model` is no SentencePiece model.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        # Each piece and each text of a model begins with one of these: field 1 or 5.
        n_parts = model.count(b"\n") + model.count(b"*")
        Budget(len(model)).draw(120 * n_parts)
        try:
            self._sp = sentencepiece.SentencePieceProcessor()
            self._sp.LoadFromSerializedProto(model)
        except RuntimeError:
            raise ValueError("not a SentencePiece model, or a damaged one") from None
        eos, unk = self._sp.eos_id(), self._sp.unk_id()  # -1 where there is none
        self.eot_id = eos if eos >= 0 else None
        self.unk_id = unk if unk >= 0 else None
        ids = range(self._sp.get_piece_size())
        self._table = [self._piece_bytes(i) for i in ids]
        byte_ids = {self._table[i]: i for i in ids if self._sp.is_byte(i)}
        # A foreign model may put a space before the text: found by trying.
        self._has_prefix = self._bytes(self._sp.encode("a")).startswith(b" ")
        # A literal U+2581 would come back as a space: it goes as three bytes.
        self._blank_ids: list[int] | None = None
        if len(byte_ids) == 256 and not self._has_prefix:
            self._blank_ids = [byte_ids[bytes([b])] for b in BLANK.encode()]

    def _piece_bytes(self, i: int) -> bytes:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        if self._sp.is_unknown(i):
            return "\ufffd".encode()
        return piece.replace(BLANK, " ").encode()

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        if self._blank_ids is None or BLANK not in text:
            return self._sp.encode(text)
        first, *rest = (self._sp.encode(part) for part in text.split(BLANK))
        return sum((self._blank_ids + ids for ids in rest), first)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._has_prefix else text

    def bpe(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """As a plain BPE: its vocabulary, piece -> id, and its merges in their order.

        Raises:
          ValueError: on a model that isn't as `train_sentencepiece` makes them.
        """
        ids = range(self.vocab_size)
        pieces = [self._sp.id_to_piece(i) for i in ids]
        scores = [self._sp.get_score(i) for i in ids]
        learned = [
            i
            for i in ids
            if not (self._sp.is_byte(i) or self._sp.is_control(i))
            and not self._sp.is_unknown(i)
        ]
        probe = "\ufb01 \u212b  x\n"  # what a normaliser would change
        if (
            self._blank_ids is None
            or self.decode(self.encode(probe)) != probe
            or [scores[i] for i in learned] != [-j for j in range(len(learned))]
        ):
            raise ValueError(
                "this SentencePiece model is no plain BPE: it is a unigram model, has "
                "no byte fallback, normalises text or puts a space before it"
            )
        vocab = {piece: i for i, piece in enumerate(pieces)}
        known = {pieces[i] for i in learned}
        merges = [
            (piece[:cut], piece[cut:])
            for piece in (pieces[i] for i in learned)
            for cut in range(1, len(piece))
            if piece[:cut] in known and piece[cut:] in known
        ]
        return vocab, merges

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._model}


SENTENCEPIECE_MODELS = ("bpe", "unigram", "char")


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    model_type: str = "bpe",
    byte_fallback: bool = True,
    special_tokens: Sequence[str] = (),
) -> SentencePieceTokenizer:
    """Trains a model on `texts`; 2 MB take about a second as BPE.

    Nothing is normalised, and runs of spaces and newlines may become pieces. The same
    texts give the same model. The text is held in memory.

    Args:
      texts: in any parts.
      vocab_size: number of ids, all told.
      model_type: bpe, unigram or char; char takes the most frequent characters.
      byte_fallback: characters that are not known are written as bytes, so that any
        text is exact; without, they become the unknown piece.
      special_tokens: names of ids that no text is encoded to; they follow the unknown
        piece and the end of text.

    Raises ValueError, naming the limit, if the corpus cannot fill vocab_size, if the
    256 bytes, the special pieces and the corpus's characters do not fit in it, or on
    special tokens as `check_special_tokens`.
    """
    import io

    import sentencepiece

    check_choice("model_type", model_type, SENTENCEPIECE_MODELS)
    check_special_tokens(special_tokens)
    vocab_size = integer("vocab_size", vocab_size)
    n_special = 2 + len(special_tokens)
    if vocab_size < (least := 256 * byte_fallback + n_special):
        what = "256 bytes and " if byte_fallback else ""
        raise ValueError(
            f"{vocab_size=} is too small: {what}{n_special} special pieces need {least}"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=byte_fallback,
            control_symbols=list(special_tokens),
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _SENTENCE,  # in bytes; longer ones are dropped
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_training_error(str(error), vocab_size)) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    if tokenizer.vocab_size != vocab_size:  # char stops when it has all characters
        raise ValueError(_too_large(vocab_size, tokenizer.vocab_size))
    return tokenizer


def check_special_tokens(names: Sequence[str]) -> None:
    """Raises ValueError on a name that is empty, has spaces, or comes twice.

    A comma would not survive SentencePiece's options.
    """
    names = [
        check_text("special token", name) for name in items("special_tokens", names)
    ]
    for n, name in enumerate(names):
        if not name or re.search(r"[\s,\u2581]", name):
            raise ValueError(
                f"special token {name!r} is empty, or has a space or comma"
            )
        if name in (END_OF_TEXT, "<unk>", *names[:n]):
            raise ValueError(f"special token {name!r} is there already")


_SENTENCE = 1 << 20  # characters


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Texts without the characters at which the trainer drops the whole sentence."""
    for text in texts:
        _utf8(text)
        for part in _RESERVED.split(text):
            for at in range(0, len(part), _SENTENCE):
                yield part[at : at + _SENTENCE]


def _training_error(message: str, vocab_size: int) -> str:
    """SentencePiece's message in one line for a person."""
    if "sentences_.empty()" in message:
        return "no text to train a tokenizer on"
    if found := re.search(r"Vocabulary size too high .* <= (\d+)", message):
        return _too_large(vocab_size, int(found[1]))
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"{vocab_size=} is too small for this text, whose characters need "
            f"at least {found[1]} pieces"
        )
    return f"SentencePiece could not be trained with {vocab_size=}: {message}"


def _too_large(vocab_size: int, most: int) -> str:
    return (
        f"{vocab_size=} is too large for this text, which yields at most {most} pieces"
    )


# --- Files ----------------------------------------------------------------------------


def tokenizer_from_files(kind: str, files: Mapping[str, bytes]) -> Tokenizer:
    """The tokenizer whose `kind` and `files()` these are.

    Raises ValueError on an unknown kind, and on files that are missing or damaged.
    """
    if kind == ByteTokenizer.kind:
        return ByteTokenizer()
    if kind == CharTokenizer.kind:
        return _read_characters(_one(files, "characters.json"))
    if kind == GPT2Tokenizer.kind:
        return GPT2Tokenizer(files)
    if kind == SentencePieceTokenizer.kind:
        return SentencePieceTokenizer(_one(files, "tokenizer.model"))
    if kind == NoTokenizer.kind:
        return _read_ids(_one(files, IDS))
    raise ValueError(
        f"unknown tokenizer kind {kind!r}: not bytes, char, gpt2 or sentencepiece"
    )


def _one(files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise ValueError(f"the tokenizer's file {name} is missing; given: {[*files]}")
    return files[name]


def _read_characters(content: bytes) -> CharTokenizer:
    value = parse_json(content, "characters.json")
    if isinstance(value, str):
        return CharTokenizer(value)
    if isinstance(value, dict) and isinstance(value.get("characters"), str):
        return CharTokenizer(
            value["characters"], end_of_text=value.get("end_of_text") is not False
        )
    raise ValueError("characters.json: not a JSON string")


MOST_BYTES = 1 << 28  # of a file
_SINGLE = {
    "bytes.json": ByteTokenizer.kind,
    "characters.json": CharTokenizer.kind,
    "tokenizer.json": GPT2Tokenizer.kind,
    IDS: NoTokenizer.kind,
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder, or of a file given directly.

    Looked for, in this order: `*.model` (SentencePiece, just one), `bytes.json`,
    `characters.json`, `tokenizer.json`, `ids.json` (of a model without tokenizer),
    `vocab.json` + `merges.txt`, `encoder.json` + `vocab.bpe`. One file of a pair stands
    for both. What the files of `token_roles.BESIDE` say of a GPT-2's tokens counts.

    Raises FileNotFoundError that says what was looked for; ValueError as
    `tokenizer_from_files` does, with the path in front.
    """
    path = user_path(path)
    if path.is_dir():
        folder, (kind, names) = path, _find_in(path)
    elif path.exists():
        folder, (kind, names) = path.parent, _of_file(path)
    else:
        raise FileNotFoundError(f"no tokenizer: {path} does not exist")
    if kind == GPT2Tokenizer.kind:
        names += tuple(n for n in (*BESIDE, ROLES) if (folder / n).is_file())
    files = {name: _read(folder / name) for name in names}
    if kind == SentencePieceTokenizer.kind:
        files = {"tokenizer.model": files[names[0]]}
    try:
        return tokenizer_from_files(kind, files)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(path: Path) -> bytes:
    check_regular(path)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than {MOST_BYTES:,}")
    return path.read_bytes()


def _find_in(folder: Path) -> tuple[str, tuple[str, ...]]:
    """(kind, file names) of the tokenizer in a folder."""
    models = sorted(p.name for p in folder.glob("*.model"))
    if len(models) > 1:
        raise ValueError(f"{folder} holds several models, give one: {models}")
    if models:
        return SentencePieceTokenizer.kind, (models[0],)
    for name, kind in _SINGLE.items():
        if (folder / name).is_file():
            return kind, (name,)
    for form in GPT2Tokenizer.FORMS:
        if all((folder / name).is_file() for name in form):
            return GPT2Tokenizer.kind, form
    wanted = [("*.model",), *((name,) for name in _SINGLE), *GPT2Tokenizer.FORMS[1:]]
    raise FileNotFoundError(f"no tokenizer in {folder}: looked for {_either(wanted)}")


def _of_file(path: Path) -> tuple[str, tuple[str, ...]]:
    """(kind, file names) of the tokenizer that a file belongs to."""
    if path.suffix == ".model":
        return SentencePieceTokenizer.kind, (path.name,)
    if path.name in _SINGLE:
        return _SINGLE[path.name], (path.name,)
    for form in GPT2Tokenizer.FORMS:
        if path.name in form:
            if lacking := [n for n in form if not path.with_name(n).is_file()]:
                raise FileNotFoundError(f"{path} needs {lacking[0]} beside it")
            return GPT2Tokenizer.kind, form
    raise ValueError(
        f"{path} is no tokenizer file: not *.model, {', '.join(_SINGLE)}, "
        f"{_either(GPT2Tokenizer.FORMS[1:])}"
    )


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes `files()` into `folder`, made if need be: `load_tokenizer` reads it."""
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)


def files_hash(kind: str, files: Mapping[str, bytes]) -> str:
    """SHA-256, in hex, over a tokenizer's kind and files."""
    digest = hashlib.sha256(kind.encode())
    for name, content in sorted(files.items()):
        digest.update(b"\0%s\0%d\0" % (name.encode(), len(content)))
        digest.update(content)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256, in hex: equal for two tokenizers that have the same files."""
    return files_hash(tokenizer.kind, tokenizer.files())
