"""Text <-> token ids: byte-level BPE, SentencePiece, characters, bytes."""
