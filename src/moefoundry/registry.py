"""Tables of the parts that a recipe names: a name leads to a typed config and to the function that makes the part.

The parts of this package and of Composer are listed in :mod:`moefoundry.config.parts`, as text: a part that is not used
is not imported. Installed packages add parts by an entry point of the group ``moefoundry.KIND`` that leads to a
:class:`Part`. Entry points are searched only for names that are not listed, so a listed name cannot be replaced.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any


class PartError(Exception):
    """An installed part that cannot be used; the message is one line that names its package."""


@dataclass(frozen=True)
class Part:
    """An entry of a table.

    Attributes:
        config: A dataclass whose fields are made by ``moefoundry.config.key``: the part's keys in a recipe. None for a
            part that is only a name.
        build: The function that makes the part, or its place as ``package.module:function``, which is imported when
            the part is made. Its arguments depend on the table: ``docs/extending.md``.
    """

    config: type | None
    build: Callable[..., Any] | str

    def make(self, *context: Any) -> Any:
        """Make the part from the arguments that its table gives."""
        return (load(self.build) if isinstance(self.build, str) else self.build)(*context)


class Table:
    """The parts of one kind.

    Args:
        kind: The entry points' group is ``moefoundry.KIND``.
        listed: Parts by name, or functions that make them when they are first used.
        base: Base class of the configs of installed parts; None if parts of this kind have no config.
    """

    def __init__(
        self,
        kind: str,
        listed: Mapping[str, Part | Callable[[], Part]],
        base: type | None = object,
    ) -> None:
        self.kind = kind
        self.listed = listed
        self.base = base
        self._made: dict[str, Part] = {}

    def names(self) -> list[str]:
        """All names: listed ones, then installed ones."""
        return list(dict.fromkeys([*self.listed, *sorted(self._installed())]))

    def find(self, name: str) -> Part | None:
        """Look a part up; None if there is none of this name.

        Raises:
            PartError: The part is installed, and cannot be used.
        """
        if name not in self._made:
            if name in self.listed:
                part = self.listed[name]
                self._made[name] = part if isinstance(part, Part) else part()
            elif name in (installed := self._installed()):
                self._made[name] = self._load(installed[name])
        return self._made.get(name)

    def _installed(self) -> dict[str, list[EntryPoint]]:
        return _entry_points(tuple(sys.path)).get(f"moefoundry.{self.kind}", {})

    def _load(self, points: list[EntryPoint]) -> Part:
        packages = [f"{point.dist.name} {point.dist.version}" if point.dist else point.module for point in points]
        if len(points) > 1:
            raise PartError(f"there are several, of the packages {', '.join(sorted(packages))}; uninstall all but one")
        what = f"{points[0].value} of package {packages[0]}"
        try:
            part = points[0].load()
        except Exception as error:  # whatever its modules do
            reason = " ".join(str(error).split())
            raise PartError(f"{what} cannot be imported: {type(error).__name__}: {reason}") from error
        if not isinstance(part, Part):
            raise PartError(f"{what} is no moefoundry.registry.Part")
        if problem := _config_problem(part.config, self.base):
            raise PartError(f"{what}: its config {problem}")
        return part


def _config_problem(config: type | None, base: type | None) -> str:
    if base is None:
        return "" if config is None else "is not None: parts of this kind are names without keys"
    if not (isinstance(config, type) and issubclass(config, base)):
        return f"is not derived from {base.__module__}.{base.__name__}"
    if not (is_dataclass(config) and all("doc" in field.metadata for field in fields(config))):
        return "is no dataclass whose fields are made by moefoundry.config.key"
    return ""


@cache
def _entry_points(search_path: tuple[str, ...]) -> dict[str, dict[str, list[EntryPoint]]]:
    """Entry points of all groups of parts, by group and name; ``search_path`` is Python's, and only a cache's key."""
    installed = entry_points()
    found: dict[str, dict[str, list[EntryPoint]]] = {}
    for group in (name for name in installed.groups if name.startswith("moefoundry.")):
        by_name = found.setdefault(group, {})
        for point in installed.select(group=group):
            by_name.setdefault(point.name, []).append(point)
    return found


def load(place: str) -> Any:
    """Import ``package.module:name``."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
