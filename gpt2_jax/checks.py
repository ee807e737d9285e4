"""How values are checked, and how they are shown in messages.

Whoever wrote a file also wrote the names and values in it. A message that shows them
must not move a terminal's cursor, turn its text around, or take seconds to build: it
is one line of bounded length.
"""

import decimal
import math
import numbers
import operator
import reprlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

MESSAGE = 300  # characters of a message at most
VALUE = 60  # of a value in it


def one_line(text: object, limit: int = MESSAGE) -> str:
    """`text` on one line of at most `limit` characters.

    White space is one space. Control characters, marks that change the direction of
    writing, and what is no character are escaped as in Python's literals.
    """
    whole = str(text)
    line = " ".join(whole[: 4 * limit].split())
    line = escaped(line)
    if len(line) > limit or len(whole) > 4 * limit:
        line = f"{line[: limit - 3]}..."
    return line


def escaped(text: str) -> str:
    """`text` with what is no plain character as in Python's literals, as above."""
    return "".join(
        # Cc control, Cf format (directions, zero widths), Cs surrogates, Co private use
        c.encode("unicode_escape").decode("ascii")
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn")
        else c
        for c in text
    )


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


# --- Values of a kind -----------------------------------------------------------------


def integer(name: str, value: Any) -> int:
    """An int of anything that is one (NumPy's and JAX's too). ValueError on others."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={shown(value)} must be an integer") from None


def number(name: str, value: Any) -> float:
    """A float of any real number. ValueError on others, text included, and on NaN."""
    x = math.nan
    try:
        if isinstance(value, numbers.Real | decimal.Decimal):
            x = math.nan if isinstance(value, bool) else float(value)
        elif is_array(value) and np.ndim(value) == 0:
            array = np.asarray(value)  # bfloat16 is of a kind of its own
            x = float(array) if array.dtype.kind in "iufV" else math.nan
    except (TypeError, ValueError, OverflowError):
        pass
    if math.isnan(x):
        raise ValueError(f"{name}={shown(value)} must be a number")
    return x


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """`value`, if it is one of these words. ValueError that lists them on others."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={shown(value)} is not one of {', '.join(choices)}")
    return value


def check_text(name: str, value: Any) -> str:
    """`value`, if it is text that can be written in UTF-8. ValueError on others."""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ValueError(f"{name}={shown(value)} must be text, not {kind}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate {value[error.start]!a} at character "
            f"{error.start}: it cannot be written in UTF-8"
        ) from None
    return value


def is_array(value: Any) -> bool:
    """Whether it is NumPy's, JAX's or another library's array, of any dimension."""
    return hasattr(value, "__array__") and not isinstance(value, str | bytes)


def is_list(value: Any) -> bool:
    """Whether it is a list, a tuple, an array of a dimension at least, or their like.

    Text is not taken for its characters, bytes are not taken for numbers, nor a dict
    for its keys. A set has no order, and a generator is empty the second time.
    """
    if isinstance(value, str | bytes | bytearray | memoryview):
        return False
    return isinstance(value, Sequence) or (is_array(value) and np.ndim(value) > 0)


def items(name: str, value: Any) -> list[Any]:
    """The items of what `is_list`. ValueError on all else."""
    if not is_list(value):
        kind = type(value).__name__
        raise ValueError(f"{name}={shown(value)} must be a list, not {kind}")
    if not is_array(value):
        return list(value)
    array = np.asarray(value)
    return array.tolist() if array.ndim == 1 else list(array)


def token_ids(name: str, value: Any) -> list[int]:
    """The integers of a list of them. ValueError on all else; see `items`."""
    ids = items(name, value)
    if set(map(type, ids)) <= {int}:
        return ids
    return [integer(f"{name}: id", i) for i in ids]


def check_fields(where: str, value: object, kinds: Mapping[str, Any]) -> None:
    """Raises unless `value` is a dict that holds, under each name, what it should.

    Args:
      where: what the dict is, for errors.
      kinds: name -> type, or union of types. An int is taken for a float too; True and
        False are no numbers.

    Raises:
      ValueError: naming the first field that is missing or of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {shown(value)} is not an object")
    for name, kind in kinds.items():
        if name not in value and not isinstance(None, kind):
            raise ValueError(f"{where}: no {shown(name)}")
        x, taken = value.get(name), int | float if kind is float else kind
        no_number = isinstance(x, bool) and bool not in (get_args(kind) or (kind,))
        if no_number or not isinstance(x, taken):
            what = getattr(kind, "__name__", str(kind))
            raise ValueError(f"{where}: {shown(name)} is {shown(x)}, not {what}")
