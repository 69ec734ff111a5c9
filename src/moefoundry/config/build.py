"""Plain values -> schema objects, with every departure from the schema listed.

Strict on purpose: 2.5, "4" and true are not integers, 1 is not true, nan is not a number to train with. Only an integer
becomes a float, and ``~`` in a path the home directory.

Pydantic is not used: on pydantic-core these checks took 68 lines more, and ``validate`` 50 ms more. Its errors have to
be translated into the keys and words of a recipe, it builds no object where a value is wrong (checks across keys need
one), and the range of fp32, paths, names of parts and "not available yet" remain to be written.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from typing import Any

from moefoundry.config.errors import Problem
from moefoundry.config.field import ENTRY, PATTERN_HINTS
from moefoundry.config.layers import EXTENDS
from moefoundry.config.spec import (
    ANY_NAME,
    INVALID,
    Elsewhere,
    Spec,
    chosen_class,
    describe,
    elsewhere,
    every_key,
    join,
    missing,
    options,
    plain,
    show,
    specs,
)
from moefoundry.config.urls import expanded, naming_problem
from moefoundry.registry import PartError, Table

FP32_SMALLEST, FP32_LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


INDEXER = "model.attention.indexer"


class Builder:
    """Builds schema objects; where a value is wrong it lists why and uses the default instead.

    Attributes:
        problems: What was wrong.
        unsound: Paths whose values are not the author's, so that nothing more can be said about them. (A value that is
            "not available yet" is sound.)
        missing: Paths of required keys that are not there.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.unsound: set[str] = set()
        self.missing: set[str] = set()

    def build(
        self, cls: type, values: dict[str, Any], path: str = "", kind: str = "", table: Table | None = None
    ) -> Any:
        """Build an object of ``cls`` from a mapping of all its keys, which are also names of ``table``."""
        built = {}
        known = specs(cls)
        for name, spec in known.items():
            if name in values:
                built[name] = self._value(spec, values[name], join(path, name))
            else:
                self._fail(join(path, name), missing(spec), describe(spec))
                self.missing.add(join(path, name))
        for name in values:
            if name not in known and not self._unusable(table, name, join(path, name)):
                names = [*known, *(table.names() if table is not None else [])]
                self._unknown(name, values[name], path, names, kind)
        return cls(**{name: value for name, value in built.items() if value is not INVALID})

    def _fail(self, path: str, message: str, allowed: str = "", suggestion: str = "") -> Any:
        self.problems.append(Problem(path, message, allowed, suggestion))
        self.unsound.add(path)
        return INVALID

    def _value(self, spec: Spec, value: Any, path: str) -> Any:
        if value is INVALID:
            self.unsound.add(path)
            return INVALID
        if value is None:
            result = None if spec.optional else self._fail(path, "null is not allowed", describe(spec))
        elif spec.is_mapping:
            result = self._mapping(spec, value, path)
        elif spec.entry:
            result = self._entries(spec, value, path)
        elif spec.item:
            result = self._list(spec, value, path)
        else:
            result = self._scalar(spec, spec.kind, value, path)
        if result is not INVALID and spec.available is not None and result not in spec.available:
            choices = [item if isinstance(item, str) else show(item) for item in map(plain, spec.available)]
            message = f"{show(value)} is not available yet"
            self.problems.append(Problem(path, message, ", ".join(choices), _nearest(value, choices, spec)))
        return result

    def _mapping(self, spec: Spec, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            return self._fail(path, f"got {show(value)}", describe(spec), _key_below(path, value))
        if spec.table is not None and not spec.tag:
            return self.build(chosen_class(spec, value), value, path, table=spec.table)
        cls = self._class(spec, value, path)
        if cls is not None:
            return self.build(cls, value, path, f" of {spec.tag} {value[spec.tag]!r}" if spec.variants else "")
        self.unsound.add(path)
        if spec.variants is None:  # what all of them have can be checked
            self.build(spec.kind, {**value, spec.tag: INVALID}, path)
        return INVALID

    def _entries(self, spec: Spec, value: Any, path: str) -> Any:
        """Build a mapping whose keys are names that its author chose."""
        if not isinstance(value, dict) or not value:
            return self._fail(path, f"got {show(value)}" if value else "is empty", describe(spec))
        built = {}
        for name, below in value.items():
            where = join(path, name)
            if not re.fullmatch(ENTRY, name):
                self._fail(where, f"{show(name)} is no name", PATTERN_HINTS[ENTRY])
            elif not isinstance(below, dict):
                self._fail(where, f"got {show(below)}", "a mapping")
            else:
                built[name] = self.build(spec.entry, below, where)
        return built

    def _class(self, spec: Spec, value: dict[str, Any], path: str) -> Any:
        """Find the class as :func:`chosen_class` does, and list what is wrong with the tag."""
        tag, where = value.get(spec.tag), join(path, spec.tag)
        cls = chosen_class(spec, value)
        if cls is None and tag is not INVALID and not self._unusable(spec.table, tag, where, f"{tag}: "):
            tags = spec.table.names() if spec.table is not None else list(spec.variants or ())
            self._fail(where, f"got {show(tag)}", ", ".join(tags), _nearest(tag, tags, specs(spec.kind)[spec.tag]))
        return cls

    def _unusable(self, table: Table | None, name: Any, path: str, prefix: str = "") -> bool:
        """Tell whether there is an installed part of this name that cannot be used, and list it."""
        try:
            if table is not None and isinstance(name, str):
                table.find(name)
        except PartError as error:
            self._fail(path, f"{prefix}{error}")
            return True
        return False

    def _list(self, spec: Spec, value: Any, path: str) -> Any:
        if not isinstance(value, list):
            return self._fail(path, f"got {show(value)}", describe(spec))
        if spec.length is not None and len(value) != spec.length:
            return self._fail(path, f"got a list of {len(value)}", describe(spec))
        items = []
        for index, item in enumerate(value):
            where = join(path, index)
            if item is INVALID:
                self.unsound.add(where)
            items.append(item if item is INVALID else self._scalar(spec, spec.item, item, where))
        return INVALID if INVALID in items else items

    def _scalar(self, spec: Spec, kind: Any, value: Any, path: str) -> Any:
        allowed = describe(spec, kind)
        if kind is object:
            return value
        if issubclass(kind, StrEnum):
            if isinstance(value, str) and value in list(kind):
                return kind(value)
            return self._fail(path, f"got {show(value)}", allowed, _nearest(value, options(spec), spec))
        if spec.words is not None and isinstance(value, str):
            if value in list(spec.words):
                return spec.words(value)
            near = _nearest(value, [str(word) for word in spec.words], spec)
            return self._fail(path, f"got {show(value)} (a string)", allowed, near)
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            return self._fail(path, f"got {show(value)} ({_type_name(value)})", allowed, _nearest(value, [], spec))
        if kind is float and abs(value) <= FP32_LARGEST:  # no float holds much larger integers
            value = float(value)
        value = expanded(value) if spec.path else value
        problem = _misfit(spec, kind, value)
        if problem:
            return self._fail(path, problem, allowed)
        return value if spec.table is None else self._name(spec, spec.table, value, path)

    def _name(self, spec: Spec, table: Table, value: str, path: str) -> Any:
        """Check the name of a part."""
        names = table.names()
        if self._unusable(table, value, path, f"{value}: "):
            return INVALID
        if value not in names:
            return self._fail(path, f"got {show(value)}", ", ".join(names), _nearest(value, names, spec))
        return value

    def _unknown(self, name: str, value: Any, parent: str, siblings: list[str], kind: str) -> None:
        path = join(parent, name)
        if name in every_key() and "." in name:
            self._fail(path, "a dotted key is for overrides; nest it in the file")
            return
        if name == EXTENDS:
            self._fail(path, "one recipe file extends another at its top, not below a key")
            return
        below = list(_names_of_others(value, path))
        if not below or name in elsewhere():
            self._guess(name, parent, siblings if parent else [*siblings, EXTENDS], kind)
        for child, mapping in below:
            self._guess(child, mapping, [], "")

    def _guess(self, name: str, parent: str, siblings: list[str], kind: str) -> None:
        """List an unknown key with what was probably meant: another key of this name, or of one like it."""
        path, message, leaves = join(parent, name), f"unknown key{kind}", _by_name()
        if name not in leaves and (other := elsewhere().get(name)):
            if other.advice:
                self._fail(path, f"{message}; {other.advice}")
                return
            keys = [key for key in other.keys if key.split(".")[0] == path.split(".")[0]] or list(other.keys)
            message = message if len(keys) == 1 else f"{message}; here it is {' or '.join(keys)}"
            self._fail(path, message, suggestion=keys[0] if len(keys) == 1 else "")
            self.unsound.update(keys)
            return
        here = difflib.get_close_matches(name, siblings, 1, 0.7)
        others = [known for known in leaves.get(name, []) if known != path]  # not a key of another variant
        if not here and name not in leaves and len(name) > 3:  # shorter names are near to too many
            near = [leaves[leaf] for leaf in difflib.get_close_matches(name, leaves, 1, 0.75)]
            others = near[0] if near and len(near[0]) == 1 else []
        suggestion, allowed = join(parent, here[0]) if here else "", ", ".join(dict.fromkeys(siblings))
        if len(others) == 1:
            suggestion = others[0]
        elif others and not here:
            message, allowed = f"{message}; keys with this name are {', '.join(others)}", ""
        self._fail(path, message, "" if suggestion else allowed, suggestion)
        if suggestion:
            self.unsound.add(suggestion)


@cache
def _by_name() -> dict[str, list[str]]:
    """Map the last part of a key to the keys that end in it; those of an indexer only if no other has its name."""
    leaves: dict[str, list[str]] = {}
    for known in sorted(every_key(), key=_is_seldom_meant):
        name = known.rpartition(".")[2]
        if name not in leaves or not _is_seldom_meant(known):
            leaves.setdefault(name, []).append(known)
    return leaves


def _is_seldom_meant(key: str) -> bool:
    """Tell if a key is of an entry, or of the indexer, whose keys have the names of others."""
    return ANY_NAME in key.split(".") or key.startswith(f"{INDEXER}.")


def _names_of_others(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (name, mapping that holds it) of each key in an unknown mapping that other projects alone have."""
    for name, child in value.items() if isinstance(value, dict) else ():
        if name in elsewhere() and name not in _by_name():
            yield name, path
        yield from _names_of_others(child, join(path, name))


def _key_below(path: str, value: Any) -> str:
    """Find the key of a mapping that a lone value was probably meant for, with the value's name here."""
    name = path.rpartition(".")[2]
    keys = [key for key in elsewhere().get(name, Elsewhere()).keys if key.startswith(f"{path}.")]
    if not keys or not isinstance(value, str):
        return ""
    spec = every_key()[keys[0]]
    choices = options(spec) if spec.available or spec.kind is not str else [value] if spec.path else []
    own = _nearest(value, choices, spec)
    return f"{keys[0]}={own}" if own else keys[0]


def _misfit(spec: Spec, kind: type, value: Any) -> str:
    """Say why a value of the right type is not one that the key accepts; return "" if it is."""
    shown = show(value)
    if kind is str and value.encode(errors="ignore").decode() != value:  # halves of characters stand for single bytes
        return f"{ascii(value)[:80]} is not UTF-8 text"
    if kind is int and not -(2**63) <= value < 2**63:
        return f"got {shown}, which 64 bits do not hold"
    if kind is float and value and not FP32_SMALLEST <= abs(value) <= FP32_LARGEST:
        finite = isinstance(value, int) or math.isfinite(value)
        return f"got {shown}, which fp32 does not hold" if finite else f"got {shown}"
    if spec.path and (problem := naming_problem(value)):
        return f"{shown} {problem}".removeprefix("'' ")
    fits = all(getattr(operator, name)(value, bound) for name, bound in spec.bounds.items())
    return "" if fits and (spec.matcher is None or spec.matcher.fullmatch(value)) else f"got {shown}"


def _nearest(value: Any, choices: list[str], spec: Spec) -> str:
    """Find the name that this value has here, or the choice that is nearest to it."""
    if (name := value if isinstance(value, str) else show(value)) in spec.other_values:
        return spec.other_values[name]
    if not isinstance(value, str):
        return ""
    starting = [choice for choice in choices if value and choice.startswith(value)]
    return "".join((starting or difflib.get_close_matches(value, choices))[:1])


def _type_name(value: Any) -> str:
    names = {"str": "a string", "int": "an integer", "float": "a float", "bool": "a boolean"}
    return names.get(type(value).__name__, type(value).__name__)
