"""Mappings whose keys are names of parts, such as ``callbacks``: the schema has some of them, tables the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, make_dataclass
from functools import cache
from typing import Any, Optional

from moefoundry.config.field import key
from moefoundry.config.parts import TABLES
from moefoundry.registry import Part, PartError


def with_parts(cls: type, kind: str, names: Iterable[Any]) -> type:
    """A mapping's dataclass with a key more for each of ``names`` that is a part.

    Args:
        cls: What the schema has of the mapping.
        kind: The table of its keys.
        names: The keys that stand in a recipe. Those that are no part, or of a part that cannot be used, are left out.
    """
    known = {field.name for field in fields(cls)}
    parts = []
    for name in names:
        if isinstance(name, str) and name not in known:
            try:
                part = TABLES[kind].find(name)
            except PartError:
                continue
            parts += [(name, part)] if part is not None else []
    return _extended(cls, kind, tuple(parts)) if parts else cls


@cache
def _extended(cls: type, kind: str, parts: tuple[tuple[str, Part], ...]) -> type:
    """One class for the same parts in the same order, so that equal recipes are equal."""
    names = [name for name, _ in parts]
    added = [
        (name, Optional[part.config], key(None, (part.config.__doc__ or "").strip()))  # noqa: UP045 # a type as a value
        for name, part in parts
    ]
    namespace = {"added": names, "__reduce__": lambda self: (_restored, (cls, kind, names, vars(self)))}
    return make_dataclass(cls.__name__, added, bases=(cls,), namespace=namespace)


def _restored(cls: type, kind: str, names: list[str], values: dict[str, Any]) -> Any:
    """An object of an extended class that was pickled."""
    return with_parts(cls, kind, names)(**values)
