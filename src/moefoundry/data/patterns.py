r"""Patterns of tokenizers, which Oniguruma reads there, for Python's ``re``.

``re`` has no sets of Unicode categories such as ``\p{L}``, and its ``\s`` is another. Both are written out here, as far
as the characters go that a text may hold. What means something else there, or may, is not translated.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache

SYMBOL = re.compile(r"\\([pP]\{\w+\}|.)|\[\^?|\(\?<|&&|.", re.DOTALL)
REFUSED = ("(?<", "&&")
BLANKS = {*map(ord, "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"), *range(0x2000, 0x200B)}
CATEGORY = re.compile("[LMNPSZ][a-z]?")
NOTHING = r"\U0010ffff"  # no character


def translated(pattern: str, characters: int) -> re.Pattern[str] | None:
    """Translate a pattern for texts of the first so many characters of Unicode; None if that cannot be done."""
    if "[]" in pattern or "[^]" in pattern:  # sets that begin with a bracket
        return None
    written, inside = [], False
    for match in SYMBOL.finditer(pattern):
        symbol, escaped = match[0], match[1]
        if escaped is not None:
            found = _escape(symbol, escaped, inside, characters)
            if found is None:
                return None
            written.append(found)
            continue
        opens = symbol.startswith("[")
        if symbol in REFUSED or (opens and inside) or (symbol in "^$" and not inside):
            return None
        inside = opens or (inside and symbol != "]")
        written.append(symbol)
    try:
        compiled = re.compile("".join(written))
    except re.error:
        return None
    return None if compiled.groups else compiled


def _escape(symbol: str, escaped: str, inside: bool, characters: int) -> str | None:
    kind, name = escaped[0], escaped[2:-1]
    if kind in "sSdD" or (kind in "pP" and name):
        members = _members({"s": "s", "d": "Nd"}.get(kind.lower(), name), characters)
        if members is None or (kind.isupper() and inside):
            return None
        return members if inside else f"[{'^' if kind.isupper() else ''}{members}]"
    return None if escaped.isalnum() and escaped not in "rnt" else symbol


@cache
def _members(name: str, characters: int) -> str | None:
    """Write the blanks (``s``) or the characters of a category as the content of a set; None if it is unknown."""
    if name != "s" and not CATEGORY.fullmatch(name):
        return None
    numbers = range(characters)
    if name == "s":
        found = [number for number in numbers if number in BLANKS]
    else:
        found = [number for number in numbers if unicodedata.category(chr(number)).startswith(name)]
    return "".join(f"\\u{start:04x}-\\u{stop:04x}" for start, stop in _runs(found)) or NOTHING


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of each run of consecutive numbers, which ascend."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield numbers[start], numbers[place - 1]
            start = place
