"""Keys here by other projects' names. The schema has both: ``renamed_from``, ``instead_of`` and ``other_values``."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from moefoundry.config.schema import Recipe
from moefoundry.config.spec import Elsewhere, Spec, elsewhere, every_key, find_key, plain

NOT_HERE = "there is no such key here"


def find_equal(path: str, value: Any) -> tuple[str, str]:
    """Find the key here that has the meaning of another project's key.

    Args:
        path: Its dotted name there.
        value: Its value.

    Returns:
        The key, or an empty string; and the reason why there is none.
    """
    spec = find_key(path)
    if spec is not None and (not spec.is_mapping or value == {} or (value is None and spec.optional)):
        return path, ""
    *above, name = path.split(".")
    other = elsewhere().get(name, Elsewhere())
    keys = [key for key in other.keys if not every_key()[key].is_mapping or value is None]
    here = [key for key in keys if key.split(".")[0] == path.split(".")[0]]
    for candidates in (here, keys):
        if len(candidates) == 1:
            return candidates[0], ""
    if other.advice or not above:
        return "", other.advice or NOT_HERE
    return "", next((text for section in reversed(above) if (text := _advice(section))), NOT_HERE)


def _advice(name: str) -> str:
    return elsewhere().get(name, Elsewhere()).advice


def fitting_value(key: str, value: Any) -> Any:
    """Turn another project's value into the one that the key has here, as far as the schema knows."""
    spec = find_key(key)
    if spec is None:
        return value
    name = str(value).lower() if isinstance(value, bool) else value
    if isinstance(name, str) and name in spec.other_values and value not in _members(spec):
        value = spec.other_values[name]
        return int(value) if spec.kind is int and value.isdecimal() else value
    if spec.kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _members(spec: Spec) -> list[str]:
    return [*spec.kind] if isinstance(spec.kind, type) and issubclass(spec.kind, StrEnum) else []


def default_of(key: str) -> Any:
    """Return the default of a key as the schema has it, an interpolation as it is written; None if it is required."""
    spec = every_key().get(key)
    return None if spec is None or spec.required else _at(key)


def _at(key: str) -> Any:
    value: Any = Recipe()
    for name in key.split("."):
        value = getattr(value, name, None)
    return None if value is ... else plain(value)
