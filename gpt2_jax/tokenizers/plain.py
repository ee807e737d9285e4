"""Tokenizers that need no merges or scores: bytes, and a table of characters."""

import json
from collections.abc import Iterable

import numpy as np

from gpt2_jax.checks import check_text
from gpt2_jax.runtime.files import parse_json
from gpt2_jax.tokenizers.table import TableTokenizer
from gpt2_jax.tokenizers.token_roles import END_OF_TEXT


class ByteTokenizer(TableTokenizer):
    """The 256 bytes of UTF-8, then end of text: 257 ids."""

    kind = "bytes"

    def __init__(self) -> None:
        self._table = [bytes([b]) for b in range(256)] + [END_OF_TEXT.encode()]
        self.eot_id = 256

    def encode(self, text: str) -> list[int]:
        return list(check_text("text", text).encode())

    def files(self) -> dict[str, bytes]:
        return {"bytes.json": b"{}\n"}


class CharTokenizer(TableTokenizer):
    """A table of characters in code point order, then end of text.

    With `end_of_text=False`, as in nanoGPT, there is no such token and eot_id is None.
    `encode` raises ValueError on a character that the table lacks.
    """

    kind = "char"

    def __init__(self, characters: Iterable[str], *, end_of_text: bool = True):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise ValueError("no text to take characters from")
        check_text("text", self.characters)
        self._codes = self._code_points(self.characters)
        self._table = [c.encode() for c in self.characters]
        if end_of_text:
            self.eot_id = len(self._table)
            self._table.append(END_OF_TEXT.encode())

    @classmethod
    def train(cls, texts: Iterable[str]) -> "CharTokenizer":
        """Returns the table of all characters that occur in `texts`."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls(characters)

    @classmethod
    def from_json(cls, content: bytes) -> "CharTokenizer":
        """Reads characters.json, as `files` writes it; ValueError on anything else."""
        value = parse_json(content, "characters.json")
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, dict) and isinstance(value.get("characters"), str):
            has_end = value.get("end_of_text") is not False
            return cls(value["characters"], end_of_text=has_end)
        raise ValueError("characters.json: not a JSON string")

    def encode(self, text: str) -> list[int]:
        check_text("text", text)
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
        content: str | dict[str, str | bool] = self.characters
        if self.eot_id is None:
            content = {"characters": self.characters, "end_of_text": False}
        return {"characters.json": json.dumps(content).encode() + b"\n"}

    @staticmethod
    def _code_points(text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-32-le"), "<u4")
