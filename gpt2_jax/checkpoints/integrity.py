"""Whether the arrays that lie on disk are those that were saved.

Orbax keeps the arrays of a step in a TensorStore database: one of each process, in
`ocdbt.process_N`, and one that joins them, in whose index all chunks are found.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from gpt2_jax.checkpoints.plain_path import plain_path
from gpt2_jax.checkpoints.steps import databases
from gpt2_jax.layout import Params
from gpt2_jax.runtime.files import read_json
from gpt2_jax.runtime.platform import on_cpu

_CONFIG = {"max_inline_value_bytes": 1024}  # so that headers stand in the index
_BLOCK = 1 << 20  # elements that are summed at a time


def leaves(tree: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of each leaf of a tree, its keys joined by `/`."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(name_of(path), x) for path, x in found]


def name_of(path: Any) -> str:
    """The path of a leaf as JAX gives it, its keys joined by `/`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def checksums(tree: Any) -> dict[str, int]:
    """path -> 32-bit checksum of each array, computed where its shards lie.

    The sum, modulo 2**32, of each element's bits times an odd number that grows
    with its index: any flipped bit changes it, and so does a swap or a shift.
    Integer sums don't depend on their order, so neither does it on the topology.
    """
    sums = {}
    for name, x in leaves(tree):
        sums[name] = _checksum(x)
        if on_cpu():
            # Programs of all CPU devices at a time may each hold some of their threads
            # and wait for the rest, without end.
            sums[name].block_until_ready()
    return {name: int(value) for name, value in jax.device_get(sums).items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index * jnp.uint32(size) + iota
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def host_checksum(x: np.ndarray) -> int:
    """The checksum of an array in host memory, without a device."""
    bits = np.ascontiguousarray(x).reshape(-1).view(f"uint{8 * x.dtype.itemsize}")
    total = 0
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK].astype(np.uint32)
        index = np.arange(start, start + block.size, dtype=np.uint32)
        total += int((block * (2 * index + 1)).sum(dtype=np.uint32))
    return total % 2**32


def params_hash(params: Params) -> str:
    """A hash of parameters with an entry a layer, whatever their shardings."""
    return digest(checksums(params))


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_saved(
    state: Path, shapes: Mapping[str, jax.ShapeDtypeStruct], sums: Mapping[str, int]
) -> None:
    """Raises unless a saved tree is whole on disk.

    The index of the database is read, with its own checksums: each array must be there
    with its shape and type, each of its chunks too, and each file must be as long as
    the index says. Numbers are read of those arrays alone that `sums` names.

    Args:
      state: the folder of the arrays of a step.
      shapes: path -> what was saved, for all arrays.
      sums: path -> checksum of each array that is to be read.

    Raises:
      ValueError: naming the array, or what of the database is missing.
    """
    known = read_json(state / "_METADATA").get("tree_metadata", {})
    if len(known) < len(shapes):  # more are empty parts of the tree
        raise ValueError(f"_METADATA names {len(known)} arrays of {len(shapes)}")
    with plain_path(state) as plain:
        index = dict(_index(plain))
        for name, x in shapes.items():
            _check_chunks(state, index, name, x)
        for name, total in sums.items():
            if host_checksum(_read(plain, name)) != total:
                raise ValueError(f"array {name} fails its checksum")


def _check_chunks(
    state: Path, index: Mapping[str, Any], name: str, x: jax.ShapeDtypeStruct
) -> None:
    key = name.replace("/", ".")
    header = index.get(f"{key}/.zarray")
    if header is None:
        raise ValueError(f"array {name} is missing")
    array = json.loads(header["inline_value"])
    dtype = np.dtype(x.dtype)
    names = (dtype.str, dtype.name)  # zarr writes bfloat16 by its name
    if tuple(array["shape"]) != x.shape or array["dtype"] not in names:
        raise ValueError(
            f"array {name} is {array['dtype']} {array['shape']}, not {dtype.name} "
            f"{list(x.shape)}"
        )
    counts = (math.ceil(n / c) for n, c in zip(x.shape, array["chunks"], strict=True))
    for chunk in itertools.product(*map(range, counts)):
        place = index.get(f"{key}/{'.'.join(map(str, chunk)) or '0'}")
        if place is None:
            raise ValueError(f"array {name} lacks a chunk")
        if "indirect_value" in place:
            # value:FOLDER:FILE:OFFSET:LENGTH
            _, folder, file, offset, length = place["indirect_value"].split(":")
            path = state / folder / file
            if path.stat().st_size < int(offset) + int(length):
                raise ValueError(f"{path} is cut short: array {name} is not whole")


def _read(state: Path, name: str) -> np.ndarray:
    path = f"{name.replace('/', '.')}/"
    spec = {"driver": "ocdbt", "base": _files(state), "path": path}
    array = ts.open({"driver": "zarr", "kvstore": spec}, open=True).result()
    return array.read().result()


def _index(state: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, place) of all that the database of a folder holds."""
    base = ts.KvStore.open(_files(state)).result()
    nodes = [(b"", ts.ocdbt.dump(base).result()["versions"][-1]["root"]["location"])]
    while nodes:
        prefix, location = nodes.pop()
        for entry in ts.ocdbt.dump(base, node=location).result()["entries"]:
            if "location" in entry:
                inner = prefix + entry["subtree_common_prefix"]
                nodes.append((inner, entry["location"]))
            else:
                yield (prefix + entry["key"]).decode(), entry


def _files(folder: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{folder}/"}


def join(state: Path) -> None:
    """Joins the databases of the processes in one, which refers to their files.

    Raises:
      ValueError, OSError: when one of them can't be read, or nothing written here.
    """
    with plain_path(state) as plain:
        context = ts.Context()  # shared: only then are files referred to, not copied

        def database(folder: Path) -> ts.KvStore:
            spec = {"driver": "ocdbt", "base": _files(folder), "config": _CONFIG}
            return ts.KvStore.open(spec, context=context).result()

        transaction = ts.Transaction(atomic=True)
        whole = database(plain).with_transaction(transaction)
        for folder in databases(plain):
            database(folder).experimental_copy_range_to(whole).result()
        transaction.commit_sync()
