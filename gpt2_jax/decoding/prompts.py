"""What may be given as a prompt: text, token ids, or a list of such."""

from typing import Any, NamedTuple

from gpt2_jax.checks import is_list, items, shown, token_ids

EXPECTED = "a prompt is text, a list of ids, or a list of such prompts"


class Prompts(NamedTuple):
    """Prompts of one kind, and the form in which they came.

    Attributes:
      texts, ids: one of them holds the prompts, the other nothing.
      is_batch: whether they came as a list.
    """

    texts: list[str]
    ids: list[list[int]]
    is_batch: bool


def read_prompts(name: str, value: Any) -> Prompts:
    """Prompts of whatever may stand for them.

    Args:
      name: of the argument, for errors.
      value: text; ids as a list, a tuple, an integer array of one dimension or their
        like; a list of such prompts, all of one kind, or an array of two dimensions.

    Raises:
      ValueError: naming the value and its type, on all else.
    """
    if isinstance(value, str):
        return Prompts([value], [], False)
    if not is_list(value):
        kind = type(value).__name__
        raise ValueError(f"{name}={shown(value)} of type {kind}: {EXPECTED}")
    rows = items(name, value)
    if not rows:
        raise ValueError(f"the {name} is empty: give text, ids, or a list of them")
    if all(isinstance(row, str) for row in rows):
        return Prompts(rows, [], True)
    if all(map(is_list, rows)):
        ids = [token_ids(f"{name} {i}", row) for i, row in enumerate(rows)]
        return Prompts([], ids, True)
    if any(isinstance(row, str) or is_list(row) for row in rows):
        raise ValueError(f"{name}={shown(value)}: {EXPECTED}")
    return Prompts([], [token_ids(name, rows)], False)
