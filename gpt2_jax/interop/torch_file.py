"""Files of `torch.save`, read without torch and without executing anything.

Such a file is a pickle of plain containers, with the numbers of the tensors beside it
(docs.pytorch.org/docs/stable/notes/serialization.html). A pickle is a program for a
stack machine, and Python's own unpickler calls whatever it names. The machine here
knows only the instructions that build plain containers; what a pickle may name stands
in two tables, and any other name is refused. Hence:

- A dict's keys and a set's elements are strings and numbers: hashing deeply nested
  tuples overflows the C stack.
- No size in a file is believed before it is compared with the size of the file.
- Objects that a pickle refers to twice are the same object, so that a hostile tree may
  contain itself, or be exponentially long to walk: look up what is needed, or walk
  with a limit.

Checksums are not compared.
"""

import dataclasses
import io
import math
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from gpt2_jax.interop.tensors import Tensor

# Of the pickled tree in bytes. GPT-2 XL with its optimizer's state takes about 0.3 MB;
# a hostile one takes 200 times its size in memory.
MAX_PICKLE = 8 * 2**20
MAX_NDIM = 32

_ZIP_START = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
_DTYPES = frozenset(f"torch.{dtype}" for dtype in _STORAGES.values())


class _Refused(ValueError):
    """With a message for the user, which lacks the name of the file."""


class _Global(str):
    """module.name as a pickle names it; a plain string where the tree holds it."""

    __slots__ = ()


@dataclasses.dataclass(frozen=True)
class _Storage(Tensor):
    """The numbers [numel] that tensors are views of."""


def _rebuild_tensor(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    *_: object,
) -> Tensor:
    """A view of the numbers from `offset` on; `strides` in numbers, not in bytes.

    The further arguments are of autograd: requires_grad, hooks, metadata.
    """
    if not isinstance(storage, _Storage):
        raise _Refused("a tensor without storage")
    if not (type(shape) is tuple and type(strides) is tuple):
        raise _Refused("a tensor whose shape is no tuple")
    if len(shape) > MAX_NDIM or len(shape) != len(strides):
        raise _Refused(f"a tensor of {len(shape)} axes and {len(strides)} strides")
    sizes = (offset, *shape, *strides)
    if any(type(n) is not int or not 0 <= n < 2**62 for n in sizes):
        raise _Refused("a tensor whose offset, shape or strides are no sizes")
    if math.prod(max(n, 1) for n in shape) * storage.dtype.itemsize >= 2**62:
        raise _Refused(f"a tensor of shape {shape}")
    numel, held = math.prod(shape), storage.shape[0]
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if numel and (numel > held or last >= held):
        raise _Refused(
            f"a tensor of {shape=}, {strides=}, {offset=} in a storage of {held}"
        )

    def read() -> np.ndarray:
        if not numel:
            return np.empty(shape, storage.dtype)
        numbers = storage.read()[offset : last + 1]
        if _is_contiguous(shape, strides):
            return numbers.reshape(shape)
        return np.lib.stride_tricks.as_strided(
            numbers,
            shape,
            tuple(
                step * numbers.itemsize if n > 1 else 0
                for n, step in zip(shape, strides, strict=True)
            ),
            writeable=False,
        )

    return Tensor(shape, storage.dtype, read)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _rebuild_parameter(data: Tensor, *_: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise _Refused("a parameter without tensor")
    return data


def _encode(text: str, encoding: str) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise _Refused("bytes that are not written in latin1")
    return text.encode("latin1")


def _set(elements: list) -> set:
    return {_key(x) for x in elements}


def _size(axes: tuple) -> tuple:
    if not (type(axes) is tuple and all(type(n) is int for n in axes)):
        raise _Refused("a torch.Size that is no shape")
    return axes


def _device(kind: str, *index: int) -> str:
    """cpu, cuda:0"""
    if type(kind) is not str or any(type(i) is not int for i in index):
        raise _Refused("a torch.device that is no device")
    return ":".join((kind, *map(str, index)))


# What a pickle may call. Protocol 2 has sets and bytes by name; __builtin__ is the
# builtins of Python 2, whose names it keeps. OrderedDict takes no argument here.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: OrderedDict(),
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "_codecs.encode": _encode,
    "__builtin__.set": _set,
    "builtins.set": _set,
    "__builtin__.bytes": lambda: b"",
    "builtins.bytes": lambda: b"",
}
_NAMES = frozenset(_CALLS) | frozenset(_STORAGES) | _DTYPES

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
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _key(x: Any) -> Any:
    if x is None or isinstance(x, str | int | float | bytes):
        return x
    raise _Refused(f"a {type(x).__name__} as a key of a dict or an element of a set")


def _fill(target: Any, kind: type, items: list[Any]) -> None:
    """SETITEMS, APPENDS and ADDITEMS: of dict, list or set."""
    if not issubclass(type(target), kind):
        raise _Refused(f"a {type(target).__name__} filled like a {kind.__name__}")
    if isinstance(target, dict):
        target.update(zip(map(_key, items[::2]), items[1::2], strict=True))
    elif isinstance(target, list):
        target.extend(items)
    else:
        target.update(map(_key, items))


_FILLS: dict[str, tuple[type, int | None]] = {
    "SETITEM": (dict, 2),
    "SETITEMS": (dict, None),
    "APPEND": (list, 1),
    "APPENDS": (list, None),
    "ADDITEMS": (set, None),
}


def _run(
    pickled: IO[bytes],
    names: frozenset[str] = frozenset(),
    storage_of: Callable[[Any], _Storage] | None = None,
) -> Any:
    """The value of one pickle, of which the stream is left at the end.

    Args:
      names: what the pickle may name.
      storage_of: persistent id -> storage; without it there can be none.

    Raises:
      _Refused: at an instruction or a name that is not allowed.
      ValueError, TypeError, LookupError: when the pickle is damaged.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # The stacks under each open mark.
    memo: dict[Any, Any] = {}
    copied = 0

    def pop(n: int | None) -> list[Any]:
        """The last `n`, or all after the last mark."""
        nonlocal stack
        if n is None:
            items, stack = stack, below.pop()
            return items
        if n > len(stack):
            raise IndexError("the stack is too short")
        items = stack[len(stack) - n :]
        del stack[len(stack) - n :]
        return items

    for opcode, arg, _ in pickletools.genops(pickled):
        op = opcode.name
        if op in _CONSTANTS:
            stack.append(arg)
        elif op in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op == "MARK":
            below.append(stack)
            stack = []
        elif op in _FRESH:
            stack.append(_FRESH[op]())
        elif op == "TUPLE" or op in _TUPLES:
            items = pop(_TUPLES.get(op))
            stack.append(tuple(items))
        elif op in _FILLS:
            kind, n = _FILLS[op]
            items = pop(n)
            _fill(stack[-1], kind, items)
        elif op == "GLOBAL":
            module, name = str(arg).split(" ", 1)
            stack.append(_allowed(module, name, names))
        elif op == "STACK_GLOBAL":
            module, name = pop(2)
            stack.append(_allowed(module, name, names))
        elif op == "REDUCE":
            name, args = pop(2)
            if not (isinstance(name, _Global) and name in _CALLS):
                raise _Refused("a call of something that is no function")
            if type(args) is not tuple:
                raise _Refused("a call without a tuple of arguments")
            # A short pickle must not copy one long string or list again and again.
            copied += sum(len(x) for x in args if isinstance(x, str | list))
            if copied > MAX_PICKLE:
                raise _Refused("sets and bytes of too many elements")
            stack.append(_CALLS[name](*args))
        elif op == "BUILD":
            # An nn.Module's state_dict has its _metadata as an attribute; left out.
            stack.pop()
            if not isinstance(stack[-1], OrderedDict):
                raise _Refused(f"attributes of a {type(stack[-1]).__name__}")
        elif op == "BINPERSID" and storage_of is not None:
            stack.append(storage_of(stack.pop()))
        elif op == "STOP":
            return stack[-1]
        elif op not in ("PROTO", "FRAME"):
            raise _Refused(f"the pickle's instruction {op}")
    raise EOFError  # Not reached: genops raises ValueError without STOP.


def _allowed(module: Any, name: Any, names: frozenset[str]) -> _Global:
    called = f"{module}.{name}" if type(module) is type(name) is str else "?"
    if called not in names:
        raise _Refused(
            f"the pickle names {called[:150]}, which is not allowed: "
            "only tensors and plain containers are read"
        )
    return _Global(called)


def _one_line(path: Path, error: Exception) -> ValueError:
    why = "".join(c if " " <= c <= "~" else "?" for c in str(error)[:300])
    if isinstance(error, _Refused):
        return ValueError(f"{path}: {why}")
    return ValueError(f"{path} is damaged: {type(error).__name__}: {why}")


# What a damaged file can raise in here: OSError by a seek to nowhere, and where
# warnings are errors DeprecationWarning by a backslash in a name.
_DAMAGE = (
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


def read_plain_pickle(path: Path) -> Any:
    """A pickle of dicts, lists, tuples, sets, strings, bytes and numbers.

    Such is nanoGPT's meta.pkl (data/shakespeare_char/prepare.py).

    Raises:
      ValueError: when it holds anything else, is damaged or above MAX_PICKLE.
    """
    with path.open("rb") as file:
        pickled = file.read(MAX_PICKLE + 1)
    try:
        if len(pickled) > MAX_PICKLE:
            raise _Refused(f"a pickle of more than {MAX_PICKLE} bytes")
        return _run(io.BytesIO(pickled))
    except _DAMAGE as error:
        raise _one_line(path, error) from None


def read_torch_file(path: Path) -> Any:
    """What was saved, with a `Tensor` for each tensor and nn.Parameter.

    The tensors are memmapped; overlapping ones share their numbers as they did in
    torch. One without gaps has its own shape's strides, any other those it had. A
    storage by itself is a 1D tensor. A torch.dtype is a string such as torch.float32,
    a torch.device one such as cuda:0, a torch.Size a tuple.

    Raises:
      ValueError: when the file is damaged, big-endian, compressed, names anything but
        tensors and plain containers, or has a tensor that its storage does not hold.
    """
    with path.open("rb") as file:
        try:
            if file.read(len(_ZIP_START)) == _ZIP_START:
                return _read_zip(path, file)
            return _read_legacy(path, file)
        except _DAMAGE as error:
            raise _one_line(path, error) from None


def _storage_id(pid: Any, n: int) -> tuple[str, np.dtype, int, Any]:
    """Key, dtype, number of numbers, and what follows, of a persistent id of `n`."""
    if type(pid) is not tuple or len(pid) != n or pid[0] != "storage":
        raise _Refused("a persistent id that is no storage")
    _, kind, key, _location, numel, *more = pid
    if not (isinstance(kind, _Global) and kind in _STORAGES):
        raise _Refused("a storage of unknown type")
    if type(key) is not str or type(numel) is not int or not 0 <= numel < 2**62:
        raise _Refused("a storage without key or size")
    return key, _STORAGES[kind], numel, more


def _in_file(path: Path, offset: int, numel: int, dtype: np.dtype) -> _Storage:
    return _Storage.in_file(path, offset, (numel,), dtype)


def _read_zip(path: Path, file: IO[bytes]) -> Any:
    """The form since torch 1.6: NAME/data.pkl, and NAME/data/KEY for each storage."""
    members: dict[str, zipfile.ZipInfo] = {}
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.filename in members:
                raise _Refused(f"two members {info.filename!a}")
            members[info.filename] = info
    size = file.seek(0, io.SEEK_END)

    def span(name: str) -> tuple[int, int]:
        """Offset and length of a member, which must lie in the file as it is."""
        if name not in members:
            raise _Refused(f"no member {name!a}")
        info = members[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise _Refused(f"the member {name!a} is compressed")
        if info.flag_bits & 0x1:
            raise _Refused(f"the member {name!a} is encrypted")
        # A local header is 30 bytes, its name and its extra field.
        file.seek(info.header_offset)
        header = file.read(30)
        start, name_len, extra_len = struct.unpack("<4s22xHH", header)
        offset = info.header_offset + len(header) + name_len + extra_len
        length = info.file_size
        fits = info.compress_size == length and offset + length <= size
        if start != _ZIP_START or not fits:
            raise _Refused(f"the member {name!a} is not where it should be")
        return offset, length

    def content(name: str, limit: int) -> bytes:
        offset, length = span(name)
        if length > limit:
            raise _Refused(f"the member {name!a} has {length} bytes")
        file.seek(offset)
        return file.read(length)

    roots = [n.split("/")[0] for n in members if n.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise _Refused(f"a zip file with {len(roots)} members */data.pkl: not of torch")
    root = roots[0]
    if f"{root}/byteorder" in members and content(f"{root}/byteorder", 8) != b"little":
        raise _Refused("its numbers are not little-endian")

    def storage_of(pid: Any) -> _Storage:
        key, dtype, numel, _ = _storage_id(pid, 5)
        offset, length = span(f"{root}/data/{key}")
        if length != numel * dtype.itemsize:
            raise _Refused(f"a storage of {numel} {dtype} in {length} bytes")
        return _in_file(path, offset, numel, dtype)

    return _run(io.BytesIO(content(f"{root}/data.pkl", MAX_PICKLE)), _NAMES, storage_of)


def _read_legacy(path: Path, file: IO[bytes]) -> Any:
    """The form before torch 1.6.

    Pickles of the magic number, the protocol, the machine, the tree and the list of the
    storages' keys; then for each key an int64 number of numbers, and the numbers.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    pickles = io.BytesIO(file.read(MAX_PICKLE))
    if _run(pickles, _NAMES) != _LEGACY_MAGIC:
        raise _Refused("a pickle, but not of torch.save")
    protocol, machine = _run(pickles), _run(pickles)
    if protocol != _LEGACY_PROTOCOL or type(machine) is not dict:
        raise _Refused("an unknown version of torch.save")
    if machine.get("little_endian") is not True:
        raise _Refused("its numbers are not little-endian")

    named: dict[str, _Storage] = {}
    placed: dict[str, _Storage] = {}

    def storage_of(pid: Any) -> _Storage:
        key, dtype, numel, [view] = _storage_id(pid, 6)
        if view is not None:
            raise _Refused("a storage that is a view of another")
        storage = named.setdefault(
            key, _Storage((numel,), dtype, lambda: placed[key].read())
        )
        if (storage.shape, storage.dtype) != ((numel,), dtype):
            raise _Refused(f"two storages of one key {key!a}")
        return storage

    tree = _run(pickles, _NAMES, storage_of)
    keys = _run(pickles)
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise _Refused("no list of storages")
    offset = pickles.tell()
    for key in keys:
        file.seek(offset)
        (numel,) = struct.unpack("<q", file.read(8))
        storage = named[key]
        if storage.shape != (numel,) or offset + 8 + storage.nbytes > size:
            raise _Refused(f"a storage of {storage.shape[0]} numbers is not there")
        placed[key] = _in_file(path, offset + 8, numel, storage.dtype)
        offset += 8 + storage.nbytes
    if placed.keys() != named.keys():
        raise _Refused(f"{len(named)} storages are named and {len(placed)} are there")
    return tree
