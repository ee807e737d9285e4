"""Tokens that were added to a vocabulary: they are found in text before it is cut.

They are found as by the library tokenizers: those that are not `normalized` first, the
others in what is between them; of several that begin at one place, the longest.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gpt2_jax.runtime.budget import Budget

# The characters that are white space in Unicode; Python's `\s` has four more.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_IS_SPACE = re.compile(f"[{SPACE}]").match
# Letters by Unicode's property Alphabetic, whose category says that they are symbols.
_CIRCLED = re.compile("[\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169"
                      "\U0001f170-\U0001f189]").match  # fmt: skip
_WORD = ("L", "M", "Nd", "Nl", "Pc")


@dataclass(frozen=True)
class AddedToken:
    """A token that is one whatever stands around it.

    Attributes:
      special: it is text like any other unless special tokens are parsed.
      lstrip, rstrip: it takes in the white space before, after it.
      single_word: it is one only where no letter or digit is beside it.
      normalized: it is looked for after those that are not.
    """

    content: str
    id: int
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class AddedTokens:
    """What finds them in a text."""

    def __init__(self, tokens: Iterable[AddedToken]):
        tokens = [token for token in tokens if token.content]
        # What finds them takes some 100 bytes for each of their characters.
        Budget(0).draw(sum(100 * (len(token.content) + 5) for token in tokens))
        first = {t.content: t for t in tokens if not t.normalized}
        then = {t.content: t for t in tokens if t.normalized}
        self._groups = [(_pattern(table), table) for table in (first, then)]
        self._any_words = any(not token.special for token in tokens)

    def split(self, text: str, *, parse_special: bool) -> list[str | int]:
        """The text's parts in order: ids of added tokens, and what is between them."""
        parts: list[str | int] = [text] if text else []
        if not (parse_special or self._any_words):
            return parts
        for pattern, table in self._groups:
            if table:
                parts = [
                    found
                    for part in parts
                    for found in (
                        [part]
                        if isinstance(part, int)
                        else _split(part, pattern, table, parse_special)
                    )
                ]
        return parts


def _pattern(contents: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)))


def _split(
    text: str,
    pattern: re.Pattern[str],
    table: Mapping[str, AddedToken],
    parse_special: bool,
) -> Iterator[str | int]:
    done = 0
    for found in pattern.finditer(text):
        token = table[found[0]]
        start, stop = found.span()
        if token.special and not parse_special:
            continue
        if token.single_word and (
            _is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])
        ):
            continue
        if token.lstrip:
            while start > done and _IS_SPACE(text[start - 1]):
                start -= 1
            start = max(start, done)  # the token before has taken white space of it
            if start > stop:
                continue
        while token.rstrip and stop < len(text) and _IS_SPACE(text[stop]):
            stop += 1
        if done < start:
            yield text[done:start]
        if start < stop:
            yield token.id
        done = stop
    if done < len(text):
        yield text[done:]


def _is_word(character: str) -> bool:
    r"""Whether it is one of Unicode's \w; False for the empty text at an end."""
    return bool(character) and (
        unicodedata.category(character).startswith(_WORD)
        or character in "\u200c\u200d"
        or _CIRCLED(character) is not None
    )
