"""SentencePiece models, those that are trained here and foreign ones."""

from collections.abc import Sequence

import numpy as np

from gpt2_jax.runtime.budget import Budget
from gpt2_jax.tokenizers.table import TableTokenizer, utf8_bytes

SPACE_MARK = "\u2581"  # how SentencePiece writes a space


class SentencePieceTokenizer(TableTokenizer):
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
            self._blank_ids = [byte_ids[bytes([b])] for b in SPACE_MARK.encode()]

    def _piece_bytes(self, i: int) -> bytes:
        piece = self._sp.id_to_piece(i)
        if self._sp.is_byte(i):
            return bytes([int(piece[3:5], 16)])  # "<0x0A>"
        if self._sp.is_unknown(i):
            return "\ufffd".encode()
        return piece.replace(SPACE_MARK, " ").encode()

    def encode(self, text: str) -> list[int]:
        utf8_bytes(text)
        if self._blank_ids is None or SPACE_MARK not in text:
            return self._sp.encode(text)
        first, *rest = (self._sp.encode(part) for part in text.split(SPACE_MARK))
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
