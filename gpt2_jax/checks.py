"""How values are shown in messages: on one line, of bounded length, as plain text.

Whoever wrote a file also wrote the names and values in it. A message that shows them
must not move a terminal's cursor, turn its text around, or take seconds to build.
"""

import reprlib
import unicodedata

MESSAGE = 300  # characters of a message at most
VALUE = 60  # of a value in it


def one_line(text: object, limit: int = MESSAGE) -> str:
    """`text` on one line of at most `limit` characters.

    White space is one space. Control characters, marks that change the direction of
    writing, and what is no character are escaped as in Python's literals.
    """
    whole = str(text)
    line = " ".join(whole[: 4 * limit].split())
    line = "".join(map(_escaped, line))
    if len(line) > limit or len(whole) > 4 * limit:
        line = f"{line[: limit - 3]}..."
    return line


def _escaped(character: str) -> str:
    # Cc control, Cf format (directions, zero widths), Cs surrogates, Co private use
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn"):
        return character.encode("unicode_escape").decode("ascii")
    return character


def shown(value: object, limit: int = VALUE) -> str:
    """`repr(value)` of at most `limit` characters, built in bounded time."""
    return one_line(_Repr(limit).repr(value), limit)


class _Repr(reprlib.Repr):
    """reprlib's, which looks at a few items of each container, two levels deep."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = limit

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()
        return f"an integer of {bits} bits" if bits > 256 else repr(x)

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x) if len(x) <= self.maxstring else f"{x[: self.maxstring]!r}..."
