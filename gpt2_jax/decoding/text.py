"""From tokens to text as they come: whole characters only, and never a stop string."""

import codecs
import itertools
from collections.abc import Sequence

import numpy as np


class TextStream:
    """The text of one row.

    Bytes that may be the beginning of a stop string, or of a character that is not
    whole yet, are held back until it is known what becomes of them.

    Args:
      token_bytes: what each id stands for.
      stop: the row ends before the first of these that begins after `min_tokens`
        tokens.
    """

    def __init__(
        self,
        token_bytes: Sequence[bytes],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ):
        self._token_bytes = token_bytes
        self._stop = [s.encode() for s in stop]
        self._min_tokens = min_tokens
        self._bytes = bytearray()
        self._given = 0  # bytes that went out
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._edges = [0]  # where each token begins, and the last one ends
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """The text that is certain now. What follows a stop string is dropped."""
        for i in ids:
            if self.stopped:
                break
            self._bytes += self._token_bytes[i]
            self._edges.append(len(self._bytes))
            self._find_stop(self._edges[-2])
        end = len(self._bytes) - (0 if self.stopped else self._pending())
        return self._give(end, final=False)

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        return self._give(len(self._bytes), final=True)

    @property
    def n_tokens(self) -> int:
        """How many tokens come before the stop string; one that it cuts counts."""
        cut = len(self._bytes)
        return sum(a < cut or b == cut for a, b in itertools.pairwise(self._edges))

    def _give(self, end: int, final: bool) -> str:
        piece = bytes(self._bytes[self._given : end])
        self._given = end
        return self._decoder.decode(piece, final)

    @property
    def _first(self) -> int:
        """The byte at which a stop string may begin."""
        return self._edges[min(self._min_tokens, len(self._edges) - 1)]

    def _find_stop(self, new: int) -> None:
        """Cuts at the earliest stop string that ends after byte `new`."""
        first = self._first
        at = [self._bytes.find(s, max(first, new - len(s) + 1)) for s in self._stop]
        if found := [i for i in at if i >= 0]:
            self.stopped = True
            del self._bytes[min(found) :]

    def _pending(self) -> int:
        """Length of the longest end of the text that some stop string begins with."""
        room = len(self._bytes) - self._first
        return max(
            (
                n
                for s in self._stop
                for n in range(1, min(len(s), room + 1))
                if self._bytes.endswith(s[:n])
            ),
            default=0,
        )


def completing_tokens(token_bytes: Sequence[bytes], stop: Sequence[str]) -> np.ndarray:
    """bool [number of ids]: the tokens with which a stop string can be complete."""
    whole = [s.encode() for s in stop]
    ends = tuple(s[i:] for s in whole for i in range(len(s)))
    return np.array(
        [t.startswith(ends) or any(s in t for s in whole) for t in token_bytes], bool
    )
