"""Files of `torch.save`, read without torch and without executing anything.

Such a file is a pickle of plain containers, with the numbers of the tensors beside it
(docs.pytorch.org/docs/stable/notes/serialization.html). No size in it is believed
before it is compared with the size of the file. Checksums are not compared.
"""

import dataclasses
import io
import math
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from gpt2_jax.checks import shown
from gpt2_jax.formats.pickles import (
    DAMAGE,
    MAX_PICKLE,
    Global,
    Machine,
    Refused,
    key,
    refusal,
)
from gpt2_jax.formats.tensors import Tensor, read_numbers
from gpt2_jax.runtime.budget import Budget
from gpt2_jax.runtime.files import check_regular

MAX_NDIM = 32
MAX_STORAGE_KEY = 64  # characters
# How often a file's bytes may be read: a tied matrix is a view of a storage twice.
MAX_READS = 4

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


@dataclasses.dataclass(frozen=True)
class _Storage(Tensor):
    """The numbers [numel] that tensors are views of.

    Attributes:
      part: (begin, count) -> some of them.
    """

    part: Callable[[int, int], np.ndarray]


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for n, step in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and step != expected:
            return False
        expected *= n
    return True


def _rebuild_parameter(data: Tensor, *_: object) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("a parameter without tensor")
    return data


def _encode(text: str, encoding: str) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise Refused("bytes that are not written in latin1")
    return text.encode("latin1")


def _set(elements: list) -> set:
    return {key(x) for x in elements}


def _size(axes: tuple) -> tuple:
    if type(axes) is not tuple or not all(type(n) is int for n in axes):
        raise Refused("a torch.Size that is no shape")
    return axes


def _device(kind: str, *index: int) -> str:
    """cpu, cuda:0"""
    if type(kind) is not str or len(kind) > 32 or len(index) > 1:
        raise Refused("a torch.device that is no device")
    if any(type(i) is not int or not 0 <= i < 2**16 for i in index):
        raise Refused("a torch.device that is no device")
    return ":".join((kind, *map(str, index)))


# What a pickle may call. Protocol 2 has sets and bytes by name; __builtin__ is the
# builtins of Python 2, whose names it keeps. OrderedDict takes no argument here.
_TENSOR = "torch._utils._rebuild_tensor_v2"
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: OrderedDict(),
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "_codecs.encode": _encode,
    "__builtin__.set": _set,
    "builtins.set": _set,
    "__builtin__.bytes": lambda: b"",
    "builtins.bytes": lambda: b"",
}
_NAMES = frozenset((_TENSOR, *_CALLS, *_STORAGES, *_DTYPES))


def is_torch_file(path: Path) -> bool:
    """Whether a file begins like those of torch.save: a zip file's or a pickle's."""
    with path.open("rb") as file:
        start = file.read(4)
    return start == _ZIP_START or start[:1] == b"\x80"


def read_torch_file(path: Path) -> Any:
    """What was saved, with a `Tensor` for each tensor and nn.Parameter.

    Tensors are read when they are asked for. One without gaps has its own shape's
    strides, any other those it had. A storage by itself is a 1D tensor. A torch.dtype
    is a string such as torch.float32, a torch.device one such as cuda:0, a torch.Size a
    tuple.

    Raises:
      ValueError: when the file is damaged, big-endian, compressed, names anything but
        tensors and plain containers, has a tensor that its storage does not hold, or
        takes more than a file of its size may.
    """
    check_regular(path)
    with path.open("rb") as file:
        try:
            return _TorchFile(path, file).read()
        except DAMAGE as error:
            raise refusal(path, error) from None


class _TorchFile:
    """An open file, and what may still be taken from it."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file
        self.size = file.seek(0, io.SEEK_END)
        self.budget = Budget(self.size)
        self.reads = MAX_READS * self.size

    def read(self) -> Any:
        self.file.seek(0)
        if self.file.read(len(_ZIP_START)) == _ZIP_START:
            return self._read_zip()
        return self._read_legacy()

    def _machine(self, storage_of: Callable[[Any], _Storage] | None) -> Machine:
        calls = {**_CALLS, _TENSOR: self._tensor}
        return Machine(self.budget, names=_NAMES, calls=calls, storage_of=storage_of)

    def _part(self, offset: int, dtype: np.dtype) -> Callable[[int, int], np.ndarray]:
        """A storage that lies at byte `offset`."""
        path, size = self.path, self.size
        return lambda begin, count: read_numbers(
            path, size, offset + begin * dtype.itemsize, count, dtype
        )

    def _tensor(
        self,
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
            raise Refused("a tensor without storage")
        if not (type(shape) is tuple and type(strides) is tuple):
            raise Refused("a tensor whose shape is no tuple")
        if len(shape) > MAX_NDIM or len(shape) != len(strides):
            raise Refused(f"a tensor of {len(shape)} axes and {len(strides)} strides")
        sizes = (offset, *shape, *strides)
        if any(type(n) is not int or not 0 <= n < 2**62 for n in sizes):
            raise Refused("a tensor whose offset, shape or strides are no sizes")
        if math.prod(max(n, 1) for n in shape) * storage.dtype.itemsize >= 2**62:
            raise Refused(f"a tensor of shape {shown(shape)}")
        numel, held = math.prod(shape), storage.shape[0]
        steps = ((n - 1) * step for n, step in zip(shape, strides, strict=True))
        span = 1 + sum(steps) if numel else 0
        if numel and (numel > held or offset + span > held):
            raise Refused(
                f"a tensor of shape={shown(shape)}, strides={shown(strides)}, "
                f"{offset=} in a storage of {held}"
            )
        self.reads -= span * storage.dtype.itemsize
        if self.reads < 0:
            raise Refused(f"its tensors have over {MAX_READS} times the file's bytes")

        def read() -> np.ndarray:
            if not numel:
                return np.empty(shape, storage.dtype)
            numbers = storage.part(offset, span)
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

    def _read_zip(self) -> Any:
        """The form since torch 1.6: NAME/data.pkl, NAME/data/KEY for each storage."""
        members: dict[str, zipfile.ZipInfo] = {}
        with zipfile.ZipFile(_Metered(self.file, self.size, self.budget)) as archive:
            for info in archive.infolist():
                if info.filename in members:
                    raise Refused(f"two members {shown(info.filename)}")
                members[info.filename] = info
        if sum(info.compress_size for info in members.values()) > self.size:
            raise Refused("its members overlap")

        roots = [n.split("/")[0] for n in members if n.split("/")[1:] == ["data.pkl"]]
        if len(roots) != 1:
            raise Refused(
                f"a zip file with {len(roots)} members */data.pkl: not of torch"
            )
        root = roots[0]
        order = f"{root}/byteorder"
        if order in members and self._content(members, order, 8) != b"little":
            raise Refused("its numbers are not little-endian")

        def storage_of(pid: Any) -> _Storage:
            name, dtype, numel, _ = _storage_id(pid, 5)
            offset, length = self._span(members, f"{root}/data/{name}")
            if length != numel * dtype.itemsize:
                raise Refused(f"a storage of {numel} {dtype} in {length} bytes")
            part = self._part(offset, dtype)
            return _Storage((numel,), dtype, lambda: part(0, numel), part)

        pickled = self._content(members, f"{root}/data.pkl", MAX_PICKLE)
        return self._machine(storage_of).run(io.BytesIO(pickled))

    def _span(self, members: dict[str, zipfile.ZipInfo], name: str) -> tuple[int, int]:
        """Offset and length of a member, which must lie in the file as it is."""
        if name not in members:
            raise Refused(f"no member {shown(name)}")
        info = members[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"the member {shown(name)} is compressed")
        if info.flag_bits & 0x1:
            raise Refused(f"the member {shown(name)} is encrypted")
        # A local header is 30 bytes, its name and its extra field.
        self.file.seek(info.header_offset)
        header = self.file.read(30)
        start, name_len, extra_len = struct.unpack("<4s22xHH", header)
        offset = info.header_offset + len(header) + name_len + extra_len
        length = info.file_size
        fits = info.compress_size == length and offset + length <= self.size
        if start != _ZIP_START or not fits:
            raise Refused(f"the member {shown(name)} is not where it should be")
        return offset, length

    def _content(
        self, members: dict[str, zipfile.ZipInfo], name: str, limit: int
    ) -> bytes:
        offset, length = self._span(members, name)
        if length > limit:
            raise Refused(f"the member {shown(name)} has {length} bytes")
        self.file.seek(offset)
        return self.file.read(length)

    def _read_legacy(self) -> Any:
        """The form before torch 1.6.

        Pickles of the magic number, the protocol, the machine, the tree and the list of
        the storages' keys; then for each key an int64 number of numbers, and these.
        """
        self.file.seek(0)
        pickles = io.BytesIO(self.file.read(MAX_PICKLE))
        named: dict[str, _Storage] = {}
        offsets: dict[str, int] = {}

        def storage_of(pid: Any) -> _Storage:
            name, dtype, numel, [view] = _storage_id(pid, 6)
            if view is not None:
                raise Refused("a storage that is a view of another")

            def part(begin: int, count: int) -> np.ndarray:
                return self._part(offsets[name], dtype)(begin, count)

            new = _Storage((numel,), dtype, lambda: part(0, numel), part)
            storage = named.setdefault(name, new)
            if (storage.shape, storage.dtype) != ((numel,), dtype):
                raise Refused(f"two storages of one key {shown(name)}")
            return storage

        machine = self._machine(storage_of)
        if machine.run(pickles) != _LEGACY_MAGIC:
            raise Refused("a pickle, but not of torch.save")
        protocol, about = machine.run(pickles), machine.run(pickles)
        if protocol != _LEGACY_PROTOCOL or type(about) is not dict:
            raise Refused("an unknown version of torch.save")
        if about.get("little_endian") is not True:
            raise Refused("its numbers are not little-endian")
        tree, keys = machine.run(pickles), machine.run(pickles)
        if type(keys) is not list or any(type(name) is not str for name in keys):
            raise Refused("no list of storages")
        if sorted(keys) != sorted(named):
            raise Refused(f"{len(named)} storages are named and {len(keys)} are there")
        offset = pickles.tell()
        for name in keys:
            self.file.seek(offset)
            (numel,) = struct.unpack("<q", self.file.read(8))
            storage = named[name]
            if storage.shape != (numel,) or offset + 8 + storage.nbytes > self.size:
                raise Refused(f"a storage of {storage.shape[0]} numbers is not there")
            offsets[name] = offset + 8
            offset += 8 + storage.nbytes
        if offset != self.size:
            raise Refused(f"{self.size - offset:,} bytes that belong to no storage")
        return tree


class _Metered:
    """A file of which `zipfile` reads the list of members, within the budget."""

    def __init__(self, file: IO[bytes], size: int, budget: Budget) -> None:
        self._budget = budget
        self._size = size
        self._read = file.read
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int = -1) -> bytes:
        left = max(self._size - self.tell(), 0)
        count = min(count, left) if count >= 0 else left
        # An entry has over 46 bytes, and becomes an object of about 1000.
        self._budget.draw(25 * count, steps=count // 10)
        return self._read(count)


def _storage_id(pid: Any, n: int) -> tuple[str, np.dtype, int, Any]:
    """Key, dtype, number of numbers, and what follows, of a persistent id of `n`."""
    if type(pid) is not tuple or len(pid) != n or pid[0] != "storage":
        raise Refused("a persistent id that is no storage")
    _, kind, name, _location, numel, *more = pid
    if not (isinstance(kind, Global) and kind in _STORAGES):
        raise Refused("a storage of unknown type")
    if type(name) is not str or len(name) > MAX_STORAGE_KEY:
        raise Refused("a storage without key")
    if type(numel) is not int or not 0 <= numel < 2**62:
        raise Refused("a storage without size")
    return name, _STORAGES[kind], numel, more
