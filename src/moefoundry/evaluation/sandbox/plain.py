"""Plain data as JSON and back: what a tested function may take and return across the border of its process.

Nothing of the sender's code comes along: a subclass arrives as its base, any other object as an :class:`Opaque`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_EXACT = 1 << 53
_LONGEST_ITERATOR = 100_000


class Opaque:
    """An object whose kind could not cross, equal to nothing else."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def encode(value: Any) -> Any:
    """Turn a value into what JSON has; ``{kind: ...}`` stands for kinds that it has not."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return int(value) if -_EXACT < value < _EXACT else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    for kind, base in _SEQUENCES.items():
        if isinstance(value, base):
            return {kind: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, range):
        return {"range": [encode(bound) for bound in (value.start, value.stop, value.step)]}
    if isinstance(value, Iterator):
        return {"iterator": [encode(item) for item in islice(value, _LONGEST_ITERATOR)]}
    return {"opaque": type(value).__name__}


def decode(data: Any) -> Any:
    """Undo :func:`encode`.

    Raises:
        ValueError: Such data never come from it.
    """
    if not isinstance(data, dict):
        if isinstance(data, list):
            raise ValueError("a bare list")
        return data
    if len(data) != 1:
        raise ValueError(f"no plain data: {str(data)[:80]}")
    try:
        kind, content = next(iter(data.items()))
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](decode(item) for item in content)
        return _DECODERS[kind](content)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"no plain data: {str(data)[:80]}") from error


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "dict": lambda items: {decode(key): decode(item) for key, item in items},
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda bounds: range(*(decode(bound) for bound in bounds)),
    "iterator": lambda items: iter([decode(item) for item in items]),
    "opaque": lambda name: Opaque(str(name)),
}
