"""Pickles, read without executing anything and within a budget.

A pickle is a program for a stack machine, and Python's own unpickler calls whatever it
names. The machine here knows only the instructions that build plain containers; what a
pickle may name and call is the caller's to say, and any other name is refused. Hence:

- A dict's keys and a set's elements are short strings and bytes, small integers, True,
  False and None: others can be made to collide, or take long to hash or to compare.
- Each instruction draws what it makes from the file's budget.
- Objects that a pickle refers to twice are the same object, so that a hostile tree may
  contain itself, or be exponentially long to walk: look up what is needed, or walk
  with a limit.
"""

import io
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from gpt2_jax.checks import one_line, shown
from gpt2_jax.runtime.budget import STEPS, Budget
from gpt2_jax.runtime.files import check_regular

# Of a pickle in bytes. GPT-2 XL's with its optimizer's state takes about 0.3 MB.
MAX_PICKLE = 8 * 2**20
MAX_KEY = 1000  # characters of a dict's key
MAX_INT_KEY = 1 << 20
SLOT = 16  # bytes of a place on the stack, with what lists grow ahead
ENTRY = 104  # of an entry of a dict or set, while it grows


class Refused(ValueError):
    """With a message for the user, which lacks the name of the file."""


class Global(str):
    """module.name as a pickle names it; a plain string where the tree holds it."""

    __slots__ = ()


# What may be called: name -> (function, bytes of what it makes).
Calls = Mapping[str, Callable[..., Any]]

_CONSTANTS = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
    + ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
    + ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
)
_FRESH: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}
_FILLS: dict[str, tuple[type, int | None]] = {
    "SETITEM": (dict, 2),
    "SETITEMS": (dict, None),
    "APPEND": (list, 1),
    "APPENDS": (list, None),
    "ADDITEMS": (set, None),
}


def key(x: Any) -> Any:
    """`x`, which may be the key of a dict or the element of a set.

    Raises:
      Refused: when it may not.
    """
    if type(x) is int:
        if 0 <= x < MAX_INT_KEY:
            return x
    elif isinstance(x, str | bytes):
        if len(x) <= MAX_KEY:
            return x
    elif x is None or type(x) is bool:
        return x
    raise Refused(f"{shown(x)} as a key of a dict or an element of a set")


def _memo_number(arg: Any, memo: dict[int, Any]) -> int:
    number = len(memo) if arg is None else int(arg)
    if number > STEPS:  # picklers count from 0
        raise Refused(f"the pickle's memo number {number}")
    return number


class Machine:
    """Reads pickles one after another out of one file's budget."""

    def __init__(
        self,
        budget: Budget,
        *,
        names: frozenset[str] = frozenset(),
        calls: Calls | None = None,
        storage_of: Callable[[Any], Any] | None = None,
    ) -> None:
        """
        Args:
          names: what a pickle may name.
          calls: which of these it may call, and what that does.
          storage_of: persistent id -> what it stands for; None: there can be none.
        """
        self._budget = budget
        self._names = names
        self._calls = calls or {}
        self._storage_of = storage_of

    def run(self, pickled: IO[bytes]) -> Any:
        """The value of one pickle, of which the stream is left at the end.

        Raises:
          Refused: at an instruction or a name that is not allowed.
          ValueError, TypeError, LookupError: when the pickle is damaged, or takes more
            than the budget.
        """
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each open mark
        memo: dict[int, Any] = {}
        for opcode, arg, _ in pickletools.genops(pickled):
            op = opcode.name
            self._budget.draw(SLOT, steps=1)
            if op in _CONSTANTS:
                self._push(arg)
            elif op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
                self._budget.draw(ENTRY)
                memo[_memo_number(arg, memo)] = self._stack[-1]
            elif op in ("BINGET", "LONG_BINGET"):
                self._stack.append(memo[int(arg or 0)])
            elif op == "MARK":
                self._budget.draw(64)
                self._below.append(self._stack)
                self._stack = []
            elif op in _FRESH:
                self._push(_FRESH[op]())
            elif op in _TUPLES:
                self._push(tuple(self._pop(_TUPLES[op])))
            elif op in _FILLS:
                kind, n = _FILLS[op]
                items = self._pop(n)
                self._fill(self._stack[-1], kind, items)
            elif op == "GLOBAL":
                self._push(self._allowed(*str(arg).split(" ", 1)))
            elif op == "STACK_GLOBAL":
                self._push(self._allowed(*self._pop(2)))
            elif op == "REDUCE":
                self._stack.append(self._call(*self._pop(2)))
            elif op == "BUILD":
                # An nn.Module's state_dict has its _metadata as an attribute: left out.
                self._stack.pop()
                if not isinstance(self._stack[-1], OrderedDict):
                    raise Refused(f"attributes of a {type(self._stack[-1]).__name__}")
            elif op == "BINPERSID" and self._storage_of is not None:
                self._budget.draw(1000, steps=10)
                self._stack.append(self._storage_of(self._stack.pop()))
            elif op == "STOP":
                return self._stack[-1]
            elif op not in ("PROTO", "FRAME"):
                raise Refused(f"the pickle's instruction {op}")
        raise EOFError  # not reached: genops raises ValueError without STOP

    def _push(self, x: Any) -> None:
        self._budget.draw(sys.getsizeof(x))
        self._stack.append(x)

    def _pop(self, n: int | None) -> list[Any]:
        """The last `n` of the stack, or all after the last mark."""
        if n is None:
            items, self._stack = self._stack, self._below.pop()
            return items
        if n > len(self._stack):
            raise IndexError("the stack is too short")
        items = self._stack[len(self._stack) - n :]
        del self._stack[len(self._stack) - n :]
        return items

    def _fill(self, target: Any, kind: type, items: list[Any]) -> None:
        """SETITEMS, APPENDS and ADDITEMS: of dict, list or set."""
        if not issubclass(type(target), kind):
            raise Refused(f"a {type(target).__name__} filled like a {kind.__name__}")
        self._budget.draw(ENTRY * len(items))
        if isinstance(target, dict):
            target.update(zip(map(key, items[::2]), items[1::2], strict=True))
        elif isinstance(target, list):
            target.extend(items)
        else:
            target.update(map(key, items))

    def _allowed(self, module: Any, name: Any) -> Global:
        if not (type(module) is type(name) is str):
            raise Refused("a name that is no string")
        if len(module) + len(name) > 200:
            module, name = shown(module), shown(name)
        if f"{module}.{name}" not in self._names:
            raise Refused(
                f"the pickle names {one_line(f'{module}.{name}', 120)}, which is not "
                "allowed: only tensors and plain containers are read"
            )
        return Global(f"{module}.{name}")

    def _call(self, name: Any, args: Any) -> Any:
        if not (isinstance(name, Global) and name in self._calls):
            raise Refused("a call of something that is no function")
        if type(args) is not tuple:
            raise Refused("a call without a tuple of arguments")
        # A short pickle could have a long argument copied or walked again and again.
        for arg in (args, *args):
            if isinstance(arg, str):
                self._budget.draw(len(arg), steps=len(arg) >> 10)
            elif isinstance(arg, list | tuple):
                self._budget.draw(ENTRY * len(arg), steps=len(arg))
        self._budget.draw(1000, steps=5)
        return self._calls[name](*args)


# What a damaged file can raise in here: OSError by a seek to nowhere, and where
# warnings are errors DeprecationWarning by a backslash in a name.
DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    OSError,
    DeprecationWarning,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
)


def refusal(path: Path, error: BaseException) -> ValueError:
    """One of DAMAGE, with the name of the file and on one line."""
    if isinstance(error, Refused):
        return ValueError(f"{path}: {one_line(error, 200)}")
    what = f"{type(error).__name__}: {error}"
    return ValueError(f"{path} is damaged: {one_line(what, 180)}")


def read_plain_pickle(path: Path) -> Any:
    """A pickle of dicts, lists, tuples, sets, strings, bytes and numbers.

    Such is nanoGPT's meta.pkl (data/shakespeare_char/prepare.py).

    Raises:
      ValueError: when it holds anything else, is damaged or above MAX_PICKLE.
    """
    check_regular(path)
    with path.open("rb") as file:
        pickled = file.read(MAX_PICKLE + 1)
    try:
        if len(pickled) > MAX_PICKLE:
            raise Refused(f"a pickle of more than {MAX_PICKLE:,} bytes")
        return Machine(Budget(len(pickled))).run(io.BytesIO(pickled))
    except DAMAGE as error:
        raise refusal(path, error) from None
