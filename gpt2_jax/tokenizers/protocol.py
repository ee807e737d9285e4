"""The interface of a tokenizer: text <-> token ids.

`encode` never interprets special tokens that are written in the text unless it is told
to, and `decode(encode(text)) == text` for every text that can be written in UTF-8. Two
exceptions come from other people's files: SentencePiece models that normalize text, and
added tokens that take in white space.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """What the rest of the package calls on a tokenizer. Ids: 0 .. vocab_size - 1."""

    @property
    def kind(self) -> str:
        """The name by which `files.tokenizer_from_files` knows it."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""

    @property
    def eot_id(self) -> int | None:
        """The end-of-text token, which follows every document; None if nothing does."""

    @property
    def bos_id(self) -> int | None:
        """The token before a text that has no `begin_ids`; None if there is none."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens before which a generated text ends."""

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """The tokens that begin every prompt of text."""

    @property
    def unk_id(self) -> int | None:
        """The token for everything unknown; None if the tokenizer knows every text."""

    @property
    def token_bytes(self) -> Sequence[bytes]:
        """The bytes of each id. ValueError from a tokenizer without text."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of ordinary text. ValueError on a lone surrogate."""

    def encode_array(self, text: str) -> np.ndarray:
        """Returns the same as an array of integers [n]; the fastest form."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids; bytes that aren't UTF-8 (a cut sequence) are U+FFFD.

        Special tokens appear as they are written, `<|endoftext|>`. ValueError on an id
        that is out of range.
        """

    def files(self) -> dict[str, bytes]:
        """Returns name -> content, from which `tokenizer_from_files` rebuilds it."""
