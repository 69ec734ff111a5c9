"""Recipe files and overrides laid over each other, with the origin of each key.

A file lies over the one that it extends, and overrides over the file.

A mapping is merged into the one below, key by key; anything else, lists and null included, replaces what is there.
Choosing another variant (``scheduler.name``) drops those keys below that only other variants have: those of
the schema, and the one chosen below, which may be a part of Composer or of a package.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from moefoundry.config.errors import Problem
from moefoundry.config.spec import chosen_class, every_key, show, specs

EXTENDS = "extends"
OVERRIDE = "override"
KeyPath = tuple[str, ...]


class Layers:
    """Recipe files and overrides, merged.

    Args:
        name: The recipe's name in errors.
        chained: There are several files, so that a problem has to say in which it is.

    Attributes:
        tree: Dicts, lists and scalars, interpolations as they were written.
        origins: Dotted key, or empty mapping -> the file that says it, or :data:`OVERRIDE`.
        problems: Keys that could not be merged.
    """

    def __init__(self, name: str, chained: bool = False) -> None:
        self.name = name
        self.chained = chained
        self.tree: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.problems: list[Problem] = []

    def add(self, leaves: Mapping[KeyPath, Any], origin: str) -> None:
        """Merge keys, as :func:`leaves_of` has them, into the tree."""
        before = {leaf: _at(self.tree, leaf) for leaf in leaves}
        for leaf, value in leaves.items():
            if problem := _assign(self.tree, leaf, value, origin):
                self.problems.append(problem)
            elif not _at(self.tree, leaf) or value:  # an empty mapping over another changes nothing
                self._forget(leaf)
                self.origins[".".join(leaf)] = origin
        for leaf, value in leaves.items():
            for key in _keys_of_other_variants(leaf, before[leaf], value, leaves):
                if isinstance(mapping := _at(self.tree, key[:-1]), dict):
                    mapping.pop(key[-1], None)
                    self._forget(key)

    def _forget(self, path: KeyPath) -> None:
        """Drop the origin of ``path``, of the keys below, and of empty mappings above."""
        for length in range(1, len(path) + 1):
            self.origins.pop(".".join(path[:length]), None)
        below = f"{'.'.join(path)}."
        for old in [old for old in self.origins if old.startswith(below)]:
            del self.origins[old]

    def origin(self, path: str) -> str:
        """Find the origin of a dotted key, or else of a mapping that holds it, or of a key below; "" for none."""
        key = path.partition("[")[0]
        names = key.split(".")
        for above in (key, *(".".join(names[:length]) for length in range(len(names) - 1, 0, -1))):
            if above in self.origins:
                return self.origins[above]
        below = [origin for old, origin in self.origins.items() if old.startswith(f"{key}.")]
        return below[-1] if below else ""


def leaves_of(value: Any, path: KeyPath = ()) -> dict[KeyPath, Any]:
    """Flatten a mapping to its keys at every depth; an empty one stays a value."""
    if not isinstance(value, dict) or (not value and path):
        return {path: value}
    leaves: dict[KeyPath, Any] = {}
    for name, child in value.items():
        leaves.update(leaves_of(child, (*path, name)))
    return leaves


def _at(tree: Any, path: KeyPath) -> Any:
    """Find the value at ``path``; None where there is none."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _assign(tree: Any, path: KeyPath, value: Any, origin: str) -> Problem | None:
    for depth, parent in enumerate(path[:-1], start=1):
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            where = ".".join(path[:depth])
            message = f"{where} is {show(tree)}, not a mapping"
            if origin == OVERRIDE:
                return Problem(".".join(path), message, allowed=f"{where}=... as a whole")
            return Problem(".".join(path), message, allowed=f"another value of {where} as a whole", file=origin)
    if value != {} or not isinstance(tree.get(path[-1]), dict):
        tree[path[-1]] = value
    return None


def _keys_of_other_variants(path: KeyPath, before: Any, value: Any, said: Collection[KeyPath]) -> list[KeyPath]:
    """Find the keys beside ``path``, the choice of a variant, that only others have; those ``said`` with it stay.

    Others are those of the schema, and the one chosen ``before``.
    """
    spec = every_key().get(".".join(path[:-1]))
    if spec is None or not spec.tag or path[-1] != spec.tag:
        return []
    if (chosen := chosen_class(spec, {spec.tag: value})) is None:
        return []
    others = [*(spec.variants or {}).values(), chosen_class(spec, {spec.tag: before}) or chosen]
    dropped = {key for variant in others for key in specs(variant)} - specs(chosen).keys()
    keys = [(*path[:-1], key) for key in sorted(dropped)]
    return [key for key in keys if not any(leaf[: len(key)] == key for leaf in said)]
