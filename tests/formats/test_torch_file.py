"""Files of torch.save, written here by hand in both of its forms."""

import dataclasses
import io
import math
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

from gpt2_jax.formats.pickles import MAX_PICKLE, read_plain_pickle
from gpt2_jax.formats.tensors import Tensor
from gpt2_jax.formats.torch_file import MAX_NDIM, read_torch_file

KINDS = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
FORMS = ["zip", "legacy"]


@dataclasses.dataclass(eq=False)
class Storage:
    numbers: np.ndarray
    numel: int | None = None  # What the pickle says, where it lies.


@dataclasses.dataclass(eq=False)
class Saved:
    """A tensor of torch: a view of a storage."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any

    @classmethod
    def of(cls, array: np.ndarray) -> "Saved":
        strides = tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
        return cls(Storage(array.reshape(-1)), 0, array.shape, strides)


@dataclasses.dataclass(eq=False)
class Parameter:
    data: Saved


@dataclasses.dataclass(eq=False)
class Call:
    """What torch pickles as a call of a function by its name."""

    name: str
    args: tuple


def fake(modules: dict[str, types.ModuleType], name: str, kind: type = object) -> Any:
    """A thing that is pickled as the global `name`."""
    module, attribute = name.rsplit(".", 1)
    modules.setdefault(module, types.ModuleType(module))
    if not hasattr(modules[module], attribute):
        thing = type(attribute, (kind,), {"__module__": module})
        setattr(modules[module], attribute, thing)
    return getattr(modules[module], attribute)


class Pickler(pickle.Pickler):
    def __init__(self, file: Any, protocol: int, legacy: bool, modules: dict) -> None:
        super().__init__(file, protocol)
        self.legacy = legacy
        self.modules = modules
        self.storages: list[Storage] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Storage):
            return None
        if obj not in self.storages:
            self.storages.append(obj)
        kind = fake(self.modules, f"torch.{KINDS[obj.numbers.dtype.name]}")
        numel = obj.numbers.size if obj.numel is None else obj.numel
        pid = ("storage", kind, str(self.storages.index(obj)), "cpu", numel)
        return pid + (None,) * self.legacy

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Saved):
            view = (obj.storage, obj.offset, obj.shape, obj.strides)
            obj = Call("torch._utils._rebuild_tensor_v2", (*view, False, OrderedDict()))
        if isinstance(obj, Parameter):
            call = (obj.data, True, OrderedDict())
            obj = Call("torch._utils._rebuild_parameter", call)
        if isinstance(obj, Call):
            return fake(self.modules, obj.name), obj.args
        return NotImplemented


def pickled(tree: Any, protocol: int, legacy: bool) -> tuple[bytes, list[Storage]]:
    modules: dict[str, types.ModuleType] = {}
    for kind in KINDS.values():
        fake(modules, f"torch.{kind}")
    for name in ("_utils._rebuild_tensor_v2", "_utils._rebuild_parameter", "Size"):
        fake(modules, f"torch.{name}")
    out = io.BytesIO()
    with mock.patch.dict(sys.modules, modules):
        pickler = Pickler(out, protocol, legacy, modules)
        pickler.dump(tree)
    return out.getvalue(), pickler.storages


def write_zip(path: Path, data: bytes, storages: list[Storage], **members: Any) -> Path:
    """The members as torch writes them; `members` are further ones."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", members.pop("byteorder", "little"))
        for i, storage in enumerate(storages):
            info = zipfile.ZipInfo(f"archive/data/{i}")
            info.extra = b"FB" + struct.pack("<H", i) + b"Z" * i  # Padding.
            archive.writestr(info, storage.numbers.tobytes())
        archive.writestr("archive/version", "3\n")
    return path


MAGIC = 0x1950A86A20F9469CFC6C


def write_legacy(
    path: Path, data: bytes, storages: list[Storage], little: bool = True
) -> Path:
    machine = {"protocol_version": 1001, "little_endian": little, "type_sizes": {}}
    head = [pickle.dumps(x, 2) for x in (MAGIC, 1001, machine)]
    keys = pickle.dumps([str(i) for i in range(len(storages))], 2)
    tail = [struct.pack("<q", s.numbers.size) + s.numbers.tobytes() for s in storages]
    path.write_bytes(b"".join([*head, data, keys, *tail]))
    return path


def save(tree: Any, path: Path, form: str = "zip", protocol: int = 2) -> Path:
    write = {"zip": write_zip, "legacy": write_legacy}[form]
    return write(path, *pickled(tree, protocol, form == "legacy"))


def numbers(dtype: Any, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (50 * rng.normal(size=shape)).astype(dtype)


def equal(tensor: Tensor, expected: np.ndarray) -> bool:
    """To the bit, and as promised before it was read."""
    got = tensor.read()
    return (
        (tensor.shape, tensor.dtype) == (got.shape, got.dtype)
        and (got.shape, got.dtype) == (expected.shape, expected.dtype)
        and got.tobytes() == expected.tobytes()
    )


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_every_dtype(tmp_path: Path, form: str, protocol: int):
    dtypes = [getattr(ml_dtypes, d, None) or np.dtype(d) for d in KINDS]
    arrays = {d: numbers(t, 3, 5) for d, t in zip(KINDS, dtypes, strict=True)}
    tree = OrderedDict((name, Saved.of(a)) for name, a in arrays.items())
    read = read_torch_file(save(tree, tmp_path / "x.pt", form, protocol))
    assert type(read) is OrderedDict
    assert list(read) == list(KINDS)
    for name, array in arrays.items():
        assert equal(read[name], array), name


@pytest.mark.parametrize("form", FORMS)
def test_views_of_one_storage(tmp_path: Path, form: str):
    array = numbers(np.float32, 6, 8)
    shared = Storage(array.reshape(-1))
    tree = {
        "whole": Saved(shared, 0, (6, 8), (8, 1)),
        "transposed": Saved(shared, 0, (8, 6), (1, 8)),
        "row": Saved(shared, 24, (8,), (1,)),
        "slice": Saved(shared, 10, (2, 2), (16, 3)),
        "one": Saved(shared, 5, (1, 1), (2**61, 7)),
        "scalar": Saved(shared, 47, (), ()),
        "empty": Saved(shared, 0, (0, 2**40), (2**40, 1)),
        "parameter": Parameter(Saved(shared, 0, (2, 24), (24, 1))),
        "other": Saved.of(array + 1),
    }
    read = read_torch_file(save(tree, tmp_path / "x.pt", form))
    expected = {
        "whole": array,
        "transposed": array.T,
        "row": array[3],
        "slice": array[1:4:2, 2:6:3],
        "one": array[:1, 5:6],
        "scalar": array[5, 7],
        "empty": np.empty((0, 2**40), np.float32),
        "parameter": array.reshape(2, 24),
        "other": array + 1,
    }
    assert read.keys() == expected.keys()
    for name, want in expected.items():
        assert equal(read[name], np.asarray(want)), name
    assert not read["transposed"].read().flags.writeable


def nanogpt(rng: np.random.Generator) -> tuple[Any, dict[str, np.ndarray]]:
    """What nanoGPT's train.py saves, and its tensors."""
    arrays = {
        "transformer.wte.weight": rng.normal(size=(7, 4)).astype(np.float32),
        "transformer.h.0.attn.bias": rng.normal(size=(1, 1, 3, 3)).astype(np.float16),
    }
    model: Any = OrderedDict((k, Saved.of(v)) for k, v in arrays.items())
    model["lm_head.weight"] = model["transformer.wte.weight"]
    model._metadata = OrderedDict({"": {"version": 1}})
    step = np.asarray(3.0, np.float32)
    tree = {
        "model": model,
        "optimizer": {
            "state": {0: {"step": Saved.of(step)}},
            "param_groups": [{"lr": 6e-4, "betas": (0.9, 0.95), "params": [0, 1]}],
        },
        "model_args": {"n_layer": 1, "bias": False, "vocab_size": 7},
        "iter_num": 5,
        "config": {"out_dir": "out", "dtype": "bfloat16", "init": None, "big": 2**80},
    }
    return tree, arrays


@pytest.mark.parametrize("form", FORMS)
def test_a_nanogpt_checkpoint(tmp_path: Path, form: str):
    tree, arrays = nanogpt(np.random.default_rng(0))
    read = read_torch_file(save(tree, tmp_path / "ckpt.pt", form))
    assert list(read) == list(tree)
    for key in ("model_args", "iter_num", "config"):
        assert read[key] == tree[key]
    assert read["optimizer"]["param_groups"] == tree["optimizer"]["param_groups"]
    step = read["optimizer"]["state"][0]["step"]
    assert equal(step, np.asarray(3.0, np.float32))
    assert list(read["model"]) == list(tree["model"])
    for name, array in arrays.items():
        assert equal(read["model"][name], array)
    assert read["model"]["lm_head.weight"] is read["model"]["transformer.wte.weight"]
    assert not hasattr(read["model"], "_metadata")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values(tmp_path: Path, protocol: int):
    plain = {
        "set": {1, "a"},
        "none": None,
        "bytes": b"a\xff",
        "no bytes": b"",
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, -4)),
        "text": "h\u00e9\U0001f600",
        "list": [True, False, 255, 65535, -(2**31), 2**31, -(2**3000), 1.5, [2]],
    }
    torch = {
        "size": Call("torch.Size", ((2, 3),)),
        "device": Call("torch.device", ("cuda", 0)),
        "cpu": Call("torch.device", ("cpu",)),
    }
    read = read_torch_file(save(plain | torch, tmp_path / "x.pt", "zip", protocol))
    assert read == plain | {"size": (2, 3), "device": "cuda:0", "cpu": "cpu"}
    meta = tmp_path / "meta.pkl"
    if protocol > 3:  # Sets have an instruction of their own.
        meta.write_bytes(pickle.dumps(plain, protocol))
        assert read_plain_pickle(meta) == plain


def test_a_dtype_is_a_string(tmp_path: Path):
    data = b"\x80\x02ctorch\nfloat32\n."
    assert read_torch_file(write_zip(tmp_path / "x.pt", data, [])) == "torch.float32"


def test_nanogpts_meta(tmp_path: Path):
    chars = sorted("\n hello, world")
    meta = {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {c: i for i, c in enumerate(chars)},
    }
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(meta))
    assert read_plain_pickle(path) == meta


class Attack:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def attacks(mark: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that would make the file `mark`, and what each names."""
    system = f"{os.system.__module__}.system"
    touch = f"touch {mark}"
    code = f"open({str(mark)!r}, 'w')"
    text = pickle.dumps(touch, 2)[2:-1]
    return {
        "system": (pickle.dumps(Attack(os.system, touch), 2), system),
        "system, protocol 4": (pickle.dumps(Attack(os.system, touch), 4), system),
        "system, in a dict": (pickle.dumps({"a": Attack(os.system, touch)}, 2), system),
        "eval": (pickle.dumps(Attack(eval, code), 4), "builtins.eval"),
        "eval, Python 2": (pickle.dumps(Attack(eval, code), 2), "__builtin__.eval"),
        "open": (pickle.dumps(Attack(open, str(mark), "w"), 4), "_?io.open"),
        "numpy": (
            pickle.dumps(np.float64(3), 4),
            r"numpy\.\w+\.multiarray\.scalar",
        ),
        "module": (
            b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.",
            "torch.nn.modules.linear.Linear",
        ),
        "getattr": (
            b"\x80\x02c__builtin__\ngetattr\nccollections\nOrderedDict\n.",
            "__builtin__.getattr",
        ),
        "dotted": (
            b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
            "collections.OrderedDict.__init__",
        ),
        "INST": (b"(" + text + b"ios\nsystem\n.", "INST"),
        "NEWOBJ": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        "extension": (b"\x80\x02\x82\x01.", "EXT1"),
        "buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", attacks(Path("mark")))
def test_nothing_is_executed(tmp_path: Path, name: str, form: str):
    mark = tmp_path / "mark"
    data, named = attacks(mark)[name]
    write = {"zip": write_zip, "legacy": write_legacy}[form]
    with pytest.raises(ValueError, match=named) as error:
        read_torch_file(write(tmp_path / "x.pt", data, []))
    one_line(error.value, tmp_path / "x.pt")
    plain = tmp_path / "meta.pkl"
    plain.write_bytes(data)
    with pytest.raises(ValueError, match=r"names|INST|EXT1|BUFFER") as error:
        read_plain_pickle(plain)
    one_line(error.value, plain)
    assert not mark.exists()


def test_the_attack_would_work(tmp_path: Path):
    mark = tmp_path / "mark"
    pickle.loads(attacks(mark)["system"][0])
    assert mark.exists()


def one_line(error: BaseException, path: Path) -> None:
    assert type(error) is ValueError
    assert str(path) in str(error)
    assert str(error).isprintable()
    assert len(str(error)) < len(str(path)) + 400


ORDERED = b"ccollections\nOrderedDict\n"
HOSTILE = {
    "a dict as a key": b"\x80\x02}}Ns.",
    "deep tuples as a key": b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.",
    "a deep key of a set": b"\x80\x04\x8f()" + b"\x85" * 100_000 + b"\x90.",
    "SETITEM of a list": b"\x80\x02]K\x01Ns.",
    "APPEND to a dict": b"\x80\x02}K\x01a.",
    "ADDITEMS to a list": b"\x80\x04](K\x01\x90.",
    "half an item": b"\x80\x02}(K\x01u.",
    "BUILD of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
    "BUILD of a class": b"\x80\x02" + ORDERED + b"}b.",
    "OrderedDict of items": b"\x80\x02" + ORDERED + b"]\x85R.",
    "a call without a tuple": b"\x80\x02" + ORDERED + b"}R.",
    "a call of a string": b"\x80\x02X\x02\x00\x00\x00ab)R.",
    "a call of a storage": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "a backslash in a name": b"\x80\x02cto\\Rrch\nSize\n.",
    "names that are no strings": b"\x80\x04K\x01K\x02\x93.",
    "a tensor of no storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    b"(NK\x00))\x89NtR.",
    "a parameter of nothing": b"\x80\x02ctorch._utils\n_rebuild_parameter\nN\x85R.",
    "a persistent id of text": b"\x80\x02X\x07\x00\x00\x00storageQ.",
    "a persistent id of None": b"\x80\x02NQ.",
    "2**62 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"ab.",
    "4 GB": b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"ab.",
    "a long of 2 GB": b"\x80\x02\x8b" + struct.pack("<I", 2**31 - 1) + b"ab.",
    "a frame of 2**62 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N",
    "a memo that is not there": b"\x80\x02j\xff\xff\xff\xff.",
    "a memo of nothing": b"\x80\x02r\xff\xff\xff\xff.",
    "no mark": b"\x80\x02t.",
    "no value": b"\x80\x02.",
    "no end": b"\x80\x02N",
    "not a pickle": b"\xff\xfe\x00",
    "nothing": b"",
    "one string, copied often": b"\x80\x02X\x00\x00\x10\x00"
    + b"a" * 2**20
    + b"q\x00X\x06\x00\x00\x00latin1q\x01"
    + b"c_codecs\nencode\nh\x00h\x01\x86R" * 100
    + b".",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path: Path, name: str):
    for form, write in (("zip", write_zip), ("legacy", write_legacy)):
        path = write(tmp_path / form, HOSTILE[name], [])
        with pytest.raises(ValueError, match=r".") as error:
            read_torch_file(path)
        one_line(error.value, path)


def test_a_memo_number_reserves_nothing(tmp_path: Path):
    """The C unpickler would allocate 64 GiB."""
    data = b"\x80\x02K\x07r\xff\xff\xff\xffj\xff\xff\xff\xff."
    refused(write_zip(tmp_path / "x.pt", data, []), "memo number 4294967295")


def test_a_name_is_shown_on_one_short_line(tmp_path: Path):
    name = "a\nb\u202e" + "c" * 10_000
    text = name.encode()
    data = b"\x80\x04X" + struct.pack("<I", len(text)) + text + b"\x8c\x01x\x93."
    path = write_zip(tmp_path / "x.pt", data, [])
    with pytest.raises(ValueError, match="not allowed") as error:
        read_torch_file(path)
    one_line(error.value, path)


FOUR = Storage(np.arange(4, dtype=np.float32))
BAD_TENSORS = {
    "too long": Saved(FOUR, 0, (5,), (1,)),
    "beyond by its offset": Saved(FOUR, 1, (4,), (1,)),
    "beyond by its strides": Saved(FOUR, 0, (2, 2), (3, 1)),
    "repeated": Saved(FOUR, 0, (2**40,), (0,)),
    "negative offset": Saved(FOUR, -1, (2,), (1,)),
    "negative size": Saved(FOUR, 0, (-2, -2), (1, 1)),
    "negative stride": Saved(FOUR, 3, (2,), (-1,)),
    "overflow": Saved(FOUR, 0, (2**32, 2**32), (0, 0)),
    "overflow beside 0": Saved(FOUR, 0, (0, 2**40, 2**40), (0, 0, 0)),
    "huge": Saved(FOUR, 0, (2**70,), (1,)),
    "huge stride": Saved(FOUR, 0, (2,), (2**70,)),
    "bool": Saved(FOUR, True, (2,), (1,)),
    "float": Saved(FOUR, 0, (2.0,), (1,)),
    "list": Saved(FOUR, 0, [2], (1,)),
    "too few strides": Saved(FOUR, 0, (2, 2), (1,)),
    "too many axes": Saved(FOUR, 0, (1,) * (MAX_NDIM + 1), (1,) * (MAX_NDIM + 1)),
    "a view of a tensor": Saved(Saved(FOUR, 0, (4,), (1,)), 0, (4,), (1,)),
    "storage shorter than said": Saved(Storage(FOUR.numbers, numel=5), 0, (5,), (1,)),
    "storage of -1": Saved(Storage(FOUR.numbers, numel=-1), 0, (0,), (1,)),
    "storage of 2**62": Saved(Storage(FOUR.numbers, numel=2**62), 0, (0,), (1,)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_their_storage_does_not_hold(tmp_path: Path, name: str, form: str):
    path = save({"x": BAD_TENSORS[name]}, tmp_path / "x.pt", form)
    with pytest.raises(ValueError, match=r"tensor|storage") as error:
        read_torch_file(path)
    one_line(error.value, path)


def refused(path: Path, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        read_torch_file(path)
    one_line(error.value, path)


def test_zips_that_are_refused(tmp_path: Path):
    path = tmp_path / "x.pt"
    data, storages = pickled({"x": Saved(FOUR, 0, (4,), (1,))}, 2, False)
    refused(write_zip(path, data, storages, byteorder="big"), "little-endian")
    refused(write_zip(path, data, []), "no member 'archive/data/0'")

    def written(*members: tuple[str, bytes, int]) -> Path:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content, compression in members:
                archive.writestr(name, content, compression)
        return path

    raw = storages[0].numbers.tobytes()
    stored, packed = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
    tree = ("a/data.pkl", data, stored)
    refused(written(("a/data.pkl", data, packed)), "'a/data.pkl' is compressed")
    refused(written(tree, ("a/data/0", raw, packed)), "'a/data/0' is compressed")
    refused(written(tree, ("b/data.pkl", data, stored)), "2 members")
    refused(written(("word/document.xml", b"", stored)), "0 members")
    refused(written(("a/data.pkl", bytes(MAX_PICKLE + 1), stored)), "bytes")
    read = read_torch_file(written(tree, ("a/data/0", raw, stored)))
    assert equal(read["x"], FOUR.numbers)

    with pytest.warns(UserWarning, match="Duplicate"):
        written(tree, ("a/data/0", raw, stored), ("a/data/0", raw, stored))
    refused(path, "two members 'a/data/0'")

    whole = bytearray(written(tree).read_bytes())
    central = whole.index(b"PK\x01\x02")
    whole[central + 8] |= 1
    path.write_bytes(whole)
    refused(path, "encrypted")


def test_legacy_files_that_are_refused(tmp_path: Path):
    path = tmp_path / "x.bin"
    data, storages = pickled({"x": Saved(FOUR, 0, (4,), (1,))}, 2, True)
    refused(write_legacy(path, data, storages, little=False), "little-endian")
    refused(write_legacy(path, data, []), "1 storages are named and 0 are there")
    refused(write_legacy(path, data, storages * 2), "1 storages are named and 2")
    whole = write_legacy(path, data, storages).read_bytes()
    path.write_bytes(whole[:-1])
    refused(path, "storage of 4 numbers is not there")
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    refused(path, "not of torch.save")
    path.write_bytes(b"")
    refused(path, "damaged")


def test_plain_pickles_that_are_refused(tmp_path: Path):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(OrderedDict(a=1)))
    with pytest.raises(ValueError, match=r"names collections\.OrderedDict"):
        read_plain_pickle(path)
    path.write_bytes(b"\x80\x02NQ.")
    with pytest.raises(ValueError, match="BINPERSID"):
        read_plain_pickle(path)
    path.write_bytes(bytes(MAX_PICKLE + 1))
    with pytest.raises(ValueError, match="more than"):
        read_plain_pickle(path)


def test_a_missing_file(tmp_path: Path):
    for read in (read_torch_file, read_plain_pickle):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
