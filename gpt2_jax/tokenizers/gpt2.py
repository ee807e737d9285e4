"""GPT-2's byte-level BPE, run by tiktoken."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from gpt2_jax.checks import check_text, shown
from gpt2_jax.tokenizers.added_tokens import SPACE, AddedTokens
from gpt2_jax.tokenizers.gpt2_files import (
    BYTE_OF_CHARACTER,
    choose_file_set,
    read_vocabulary,
)
from gpt2_jax.tokenizers.table import TableTokenizer
from gpt2_jax.tokenizers.token_roles import ROLES, Roles, read_roles

# GPT-2's pre-token pattern, `'s|'t|...| ?\p{L}+|...|\s+(?!\S)|\s+`, for an engine that
# backtracks: quantifiers are possessive where backtracking cannot help, and a run of
# white space at the end of the text is one match. Where `\s+(?!\S)` fails, exactly one
# white space character is left.
_PRE_TOKEN = (
    r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
    r"|\s++$|\s+(?!\S)|\s"
)
# `\s+(?!\S)` still backtracks: some 300,000 spaces before a word overflow the engine's
# stack, and it panics. All of a run but its last character is one pre-token, so very
# long runs are split off before the engine sees them.
_LONG = 10_000
_LONG_RUN = re.compile(rf"((?<![{SPACE}])[{SPACE}]{{{_LONG},}}(?=[{SPACE}][^{SPACE}]))")


def _cut_long_runs(text: str) -> list[str]:
    """Splits text into parts that can each be encoded on their own."""
    # A long run covers at least one whole stride. Few texts have such a run, and the
    # others are spared the regex.
    half = _LONG // 2
    strides = range(0, len(text) - half + 1, half)
    if any(text[i : i + half].isspace() for i in strides):
        return _LONG_RUN.split(text)
    return [text]


class GPT2Tokenizer(TableTokenizer):
    """GPT-2's byte-level BPE, run by tiktoken.

    Args:
      files: name -> content. `vocab.json` and `merges.txt`, or `encoder.json` and
        `vocab.bpe`, or `tokenizer.json` alone; ids are those of the vocabulary, in any
        order. In addition, files of `token_roles.BESIDE`, as transformers writes them,
        or ROLES, into which `files()` condenses them.

    Raises:
      ValueError: on files that are damaged, or that describe another tokenizer.
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
        """Returns the bytes of each id; ValueError unless every id has one token."""
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
            table[i] = check_text("text", token).encode()
        for token in learned:
            if ids[token] >= size:
                raise ValueError(
                    f"{name}: {shown(token)}, a piece of text, has the id "
                    f"{ids[token]}, and the model has {size} rows"
                )
            table[ids[token]] = bytes(BYTE_OF_CHARACTER[c] for c in token)
        return table

    def within(self, size: int) -> "GPT2Tokenizer":
        """Returns the tokenizer without the tokens whose ids are `size` or more.

        Raises:
          ValueError: when ordinary text is encoded to one of them.
        """
        return self._with_roles(self.roles.within(size))

    def as_trained(self) -> "GPT2Tokenizer":
        """Returns the tokenizer of a model trained here, see `Roles.as_trained`."""
        return self._with_roles(self.roles.as_trained())

    def _with_roles(self, roles: Roles) -> "GPT2Tokenizer":
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
        """Returns the ids of a text, in which added tokens that aren't special count.

        Args:
          parse_special: finds special tokens too. Whoever wrote the text can then end
            it, or speak in another's role.
        """
        ids: list[int] = []
        for part in self._split(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
                continue
            ranks = self._bpe.encode_ordinary(part)
            table = self._id_of_rank
            ids += ranks if table is None else table[ranks].tolist()
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        arrays: list[np.ndarray] = [np.zeros(0, np.int64)]
        for part in self._split(text, parse_special=False):
            if isinstance(part, int):
                arrays.append(np.array([part]))
                continue
            ranks = self._bpe.encode_to_numpy(part, disallowed_special=())
            table = self._id_of_rank
            arrays.append(ranks if table is None else table[ranks])
        return arrays[1] if len(arrays) == 2 else np.concatenate(arrays)

    def _split(self, text: str, parse_special: bool) -> Iterator[str | int]:
        """Yields ids of added tokens, and texts that are encoded one by one."""
        check_text("text", text)
        for part in self._added.split(text, parse_special=parse_special):
            if isinstance(part, int):
                yield part
                continue
            if self.roles.add_prefix_space and not part.startswith(" "):
                part = f" {part}"
            yield from _cut_long_runs(part)

    def files(self) -> dict[str, bytes]:
        return dict(self._files)
