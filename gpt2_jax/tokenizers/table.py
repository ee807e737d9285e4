"""The base class of the tokenizers of text: they all decode through one table.

The table gives the bytes of each id. Decoding joins them, then reads them as UTF-8.
"""

from collections.abc import Sequence

import numpy as np

from gpt2_jax.checks import shown, token_ids


class TableTokenizer:
    """A tokenizer that decodes by its `_table`, where entry i holds the bytes of id i.

    Subclasses set `_table` and override `encode`. Unless they set `eot_id`, there is no
    end of text. It begins and ends texts, and prompts begin with nothing else.
    """

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
