"""SentencePiece models, trained here or elsewhere."""

from collections.abc import Sequence

import numpy as np

from gpt2_jax.checks import check_text
from gpt2_jax.runtime.budget import Budget
from gpt2_jax.tokenizers.table import TableTokenizer

SPACE_MARK = "\u2581"  # how SentencePiece writes a space


class SentencePieceTokenizer(TableTokenizer):
    """A SentencePiece model; its end-of-sentence piece, if any, is the end of text.

    A model from `train_sentencepiece` is exact for every text. One from elsewhere is
    used as it is: its normalizer may change the text, and without byte fallback an
    unknown character becomes the unknown piece, which decodes to U+FFFD.

    Args:
      model: the content of a `.model` file.

    Raises:
      ValueError: when it is no SentencePiece model.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = model
        # A piece or a text in a model begins with the tag of field 1 or 5: these bytes.
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
        # Whether the model puts a space before the text shows only when it encodes one.
        self._has_prefix = self._bytes(self._sp.encode("a")).startswith(b" ")
        # A literal U+2581 would decode to a space, so it is encoded as its three bytes.
        self._space_mark_ids: list[int] | None = None
        if len(byte_ids) == 256 and not self._has_prefix:
            self._space_mark_ids = [byte_ids[bytes([b])] for b in SPACE_MARK.encode()]

    def _piece_bytes(self, i: int) -> bytes:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        if self._sp.is_unknown(i):
            return "\ufffd".encode()
        return piece.replace(SPACE_MARK, " ").encode()

    def encode(self, text: str) -> list[int]:
        check_text("text", text)
        if self._space_mark_ids is None or SPACE_MARK not in text:
            return self._sp.encode(text)
        first, *rest = (self._sp.encode(part) for part in text.split(SPACE_MARK))
        return sum((self._space_mark_ids + ids for ids in rest), first)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._has_prefix else text

    def bpe(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """Returns the model as a plain BPE: piece -> id, and the merges in order.

        Raises:
          ValueError: on a model that isn't like those of `train_sentencepiece`.
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
        probe = "\ufb01 \u212b  x\n"  # text that a normalizer would change
        if (
            self._space_mark_ids is None
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
