"""Tables of the parts that a recipe names: a name leads to a typed config and to the function that makes the part.

What this package and Composer have is listed (:mod:`moefoundry.config.parts`), as text, so that nothing is imported for
a part that is not used. Installed packages add to a table by an entry point of the group ``moefoundry.KIND`` that leads
to a :class:`Part`. They are looked up only where a recipe names what is not listed, so a listed name stays what it is.
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
    """What a name stands for.

    Attributes:
        config: A dataclass whose fields are made by ``moefoundry.config.key``: the keys that the part has in a recipe.
        build: What makes the part from such a config; or ``package.module:function``, imported when it is made. What
            else it is given depends on the table: ``docs/extending.md``.
    """

    config: type
    build: Callable[..., Any] | str

    def make(self, cfg: Any, *context: Any) -> Any:
        """The part, from its config and what its table gives."""
        return (load(self.build) if isinstance(self.build, str) else self.build)(cfg, *context)


class Table:
    """The parts of one kind.

    Args:
        kind: As in ``moefoundry.callbacks``, the group of the entry points.
        listed: Name -> part, or what makes it when it is first used.
        base: What the config of an installed part has to be derived from; ``object`` is anything.
    """

    def __init__(self, kind: str, listed: Mapping[str, Part | Callable[[], Part]], base: type = object) -> None:
        self.kind = kind
        self.listed = listed
        self.base = base
        self._made: dict[str, Part] = {}

    def names(self) -> list[str]:
        """All that there are: listed, then installed."""
        return list(dict.fromkeys([*self.listed, *sorted(self._installed())]))

    def find(self, name: str) -> Part | None:
        """The part of this name; None if there is none.

        Raises:
            PartError: It is installed, and cannot be used.
        """
        if name not in self._made:
            if name in self.listed:
                part = self.listed[name]
                self._made[name] = part if isinstance(part, Part) else part()
            elif name in (installed := self._installed()):
                self._made[name] = self._load(installed[name])
        return self._made.get(name)

    def _installed(self) -> dict[str, list[EntryPoint]]:
        return _entry_points(f"moefoundry.{self.kind}", tuple(sys.path))

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
        if not (isinstance(part.config, type) and issubclass(part.config, self.base)):
            raise PartError(f"{what}: its config is not derived from {self.base.__module__}.{self.base.__name__}")
        if not (is_dataclass(part.config) and all("doc" in field.metadata for field in fields(part.config))):
            raise PartError(f"{what}: its config is no dataclass whose fields are made by moefoundry.config.key")
        return part


@cache
def _entry_points(group: str, search_path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    """Name -> those that have it, in the directories of ``search_path``, which is that of modules."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def load(place: str) -> Any:
    """What ``package.module:name`` stands for."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
