"""The stand-in for a tokenizer where a model came without one."""

import json
from collections.abc import Sequence

import numpy as np

from gpt2_jax.checks import shown
from gpt2_jax.tokenizers.token_roles import json_object

IDS_FILE = "ids.json"


class NoTokenizer:
    """The tokenizer of a model that came without one: only token ids, no text.

    Whatever needs text raises ValueError.

    Args:
      vocab_size: number of ids.
      eot_id: the end-of-text token, or None.
      why: the reason why there is no tokenizer, for error messages.
      end_ids: the ids that end a generated text; defaults to the end of text, if any.
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

    @classmethod
    def from_json(cls, content: bytes) -> "NoTokenizer":
        """Reads ids.json, as `files` writes it; ValueError on anything else."""
        values = json_object(content, IDS_FILE)
        size, eot_id = values.get("vocab_size"), values.get("eot_id")
        ends = values.get("end_ids")
        if not isinstance(ends, list) or type(size) is not int:
            raise ValueError(f"{IDS_FILE} is damaged: {shown(values)}")
        for i in [*ends, *([] if eot_id is None else [eot_id])]:
            if type(i) is not int or not 0 <= i < size:
                raise ValueError(f"{IDS_FILE}: {shown(i)} is no id of {size}")
        return cls(size, eot_id, "the model was made for token ids alone", ends)

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
        """Returns a copy whose texts end with the end of text as well."""
        ends = {*self.end_ids} | ({self.eot_id} if self.eot_id is not None else set())
        return NoTokenizer(self.vocab_size, self.eot_id, self.why, sorted(ends))

    def files(self) -> dict[str, bytes]:
        """Returns ids.json; `why` holds for this machine only and isn't kept."""
        known = {"vocab_size": self.vocab_size, "eot_id": self.eot_id}
        content = json.dumps({**known, "end_ids": self.end_ids})
        return {IDS_FILE: content.encode() + b"\n"}
