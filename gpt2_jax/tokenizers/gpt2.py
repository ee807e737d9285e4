"""GPT-2's byte-level BPE, run by tiktoken."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from gpt2_jax.checks import shown
from gpt2_jax.tokenizers.added_tokens import SPACE, AddedTokens
from gpt2_jax.tokenizers.gpt2_files import (
    BYTE_OF_CHARACTER,
    choose_file_set,
    read_vocabulary,
)
from gpt2_jax.tokenizers.table import TableTokenizer, utf8_bytes
from gpt2_jax.tokenizers.token_roles import ROLES, Roles, read_roles

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


class GPT2Tokenizer(TableTokenizer):
    """GPT-2's byte-level BPE, run by tiktoken.

    Args:
      files: `vocab.json` and `merges.txt`, or `encoder.json` and `vocab.bpe`, or
        `tokenizer.json` alone. Ids are those of the vocabulary, in whatever order.
        Beside them those of `token_roles.BESIDE`, as transformers writes them, and
        ROLES, which `files` gives where they said anything.

    Raises ValueError on files that are damaged, or that describe another tokenizer.
    """

    kind = "gpt2"

    def __init__(self, files: Mapping[str, bytes]):
        import tiktoken

        names = choose_file_set(files)
        self._files = {name: files[name] for name in names}
        vocabulary = read_vocabulary(self._files)
        ids, learned = vocabulary.ids, vocabulary.tokens_by_rank()
        unlisted = sorted({*ids} - {*learned}) if vocabulary.added is None else []
        roles = partial(
            read_roles,
            ids,
            vocabulary.added or (),
            unlisted=unlisted,
            begin_ids=vocabulary.begin_ids,
            add_prefix_space=vocabulary.add_prefix_space,
        )
        self.roles = Roles.from_json(files[ROLES]) if ROLES in files else roles(files)
        if not self.roles.same_effect(roles({})):
            self._files[ROLES] = self.roles.to_json()
        self.eot_id = self.roles.eot_id
        self._table = self._make_table(names[0], ids, learned)
        self._added = AddedTokens(self.roles.added)

        ranked = np.array([ids[token] for token in learned])
        identity = bool((ranked == np.arange(len(ranked))).all())
        self._id_of_rank = None if identity else ranked
        self._bpe = tiktoken.Encoding(
            "gpt2_jax",
            pat_str=_PRE_TOKEN,
            mergeable_ranks={self._table[i]: r for r, i in enumerate(ranked.tolist())},
            special_tokens={},
        )

    def _make_table(
        self, name: str, ids: Mapping[str, int], learned: Sequence[str]
    ) -> list[bytes]:
        """What each id stands for; raises ValueError unless each stands for a token."""
        tokens = {token.content: token.id for token in self.roles.added}
        for token, i in ids.items():
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
            table[i] = utf8_bytes(token)
        for token in learned:
            if ids[token] >= size:
                raise ValueError(
                    f"{name}: {shown(token)}, a piece of text, has the id "
                    f"{ids[token]}, and the model has {size} rows"
                )
            table[ids[token]] = bytes(BYTE_OF_CHARACTER[c] for c in token)
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
        utf8_bytes(text)
        for part in self._added.split(text, parse_special=parse_special):
            if isinstance(part, int):
                yield part
                continue
            if self.roles.add_prefix_space and not part.startswith(" "):
                part = f" {part}"
            yield from _cut_long_runs(part)

    def files(self) -> dict[str, bytes]:
        return dict(self._files)
