"""Dataclasses that somebody else fills: the type of each field, and its range.

A config file, a flag or a JSON file may hold anything; annotations say what belongs
there, and one function compares the two.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from gpt2_jax.checks import integer, shown

GREATEST = 2**31 - 1  # of integers that no other limit holds: JAX's are of 32 bits
FLOAT32 = 3.4028234663852886e38  # the greatest number
LEAST = 2.0**-126  # above 0 with all its digits; smaller ones may count as 0
BELOW_1 = 1 - 2.0**-24  # the greatest number under 1
SEEDS = (0, 2**32 - 1)  # what a random key is made from, for training as for samples


def check_types(values: Any, prefix: str = "") -> None:
    """Compares the fields of a dataclass with their annotations.

    Lists count as tuples and integers as floats, which are finite in float32.

    Raises:
      ValueError: naming `prefix` and field, the value and what is expected.
    """
    hints = typing.get_type_hints(type(values))
    for field in dataclasses.fields(values):
        value, kind = getattr(values, field.name), hints[field.name]
        if not fits(value, kind):
            raise ValueError(
                f"{prefix}{field.name}={shown(value)} must be {_described(kind)}"
            )


def check_names(
    prefix: str, values: Any, kind: type, *, all_of_them: bool = False
) -> None:
    """Compares the keys of a table with the fields of a dataclass.

    Args:
      all_of_them: fields with a default are needed, too.

    Raises:
      ValueError: on what is no table, and on a key that is missing or unknown.
    """
    if not isinstance(values, Mapping):
        what = f"{prefix.removesuffix('.')}=" if prefix else "it is "
        raise ValueError(f"{what}{shown(values)}, not a table of keys")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in sorted(fields.keys() ^ {*map(str, values)}):
        if name not in fields:
            raise ValueError(f"key {shown(prefix + name)} does not exist")
        default, factory = fields[name].default, fields[name].default_factory
        if all_of_them or {default, factory} == {dataclasses.MISSING}:
            raise ValueError(f"key {shown(prefix + name)} is missing")


def check_range(name: str, value: int, least: int, greatest: int = GREATEST) -> None:
    """Raises ValueError, naming the limit, unless it is an integer in that range."""
    value = integer(name, value)
    if value < least:
        raise ValueError(f"{name}={shown(value)} must be >= {least}")
    if value > greatest:
        raise ValueError(f"{name}={shown(value)} must be <= {greatest}")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError on a number that is not above 0, also once it is float32."""
    if not value >= LEAST:
        rounded = ", which is 0 in float32," if value > 0 else ""
        raise ValueError(f"{name}={value}{rounded} must be > 0")


def check_below_1(name: str, value: float) -> None:
    """Raises ValueError on a number outside [0, 1), also once it is float32."""
    if not 0 <= value <= BELOW_1:
        rounded = ", which is 1 in float32," if 0 <= value < 1 else ""
        raise ValueError(f"{name}={value}{rounded} must be in [0, 1)")


def check_seed(seed: int) -> None:
    """Raises ValueError on what is no seed: the same range holds for every one."""
    least, greatest = SEEDS
    if not (fits(seed, int) and least <= seed <= greatest):
        raise ValueError(f"seed={shown(seed)} must be in [{least}, {greatest}]")


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of a type: a class, a union, tuple[...] or Mapping[...]."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, each) for each in arguments)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | origin):
            return False
        return origin is int or (value == value and abs(value) <= FLOAT32)
    if origin is Mapping:
        key, item = arguments
        return isinstance(value, Mapping) and all(
            fits(k, key) and fits(v, item) for k, v in value.items()
        )
    return origin is Any or isinstance(value, origin)


def _described(kind: Any) -> str:
    """What a type is called in an error."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_described, arguments))
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each item of it {_described(arguments[0])}"
    if origin is tuple:
        return f"({', '.join(map(_described, arguments))})"
    names = {
        int: "an integer",
        float: "a number, finite in float32",
        str: "text",
        bool: "True or False",
        types.NoneType: "None",
        Mapping: "a table",
    }
    return names.get(origin) or f"a table of {origin.__name__}"
