"""Facts about each key, read from the schema in one place for the loader, the reference page and the tests."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Optional, Union, get_args, get_origin, get_type_hints

from moefoundry.config.field import ENTRY, PATTERN_HINTS, REQUIRED, key
from moefoundry.config.parts import TABLES
from moefoundry.config.schema import Recipe
from moefoundry.config.secrets import redact
from moefoundry.registry import Part, PartError, Table


class _Invalid:
    def __repr__(self) -> str:
        return "INVALID"


INVALID: Any = _Invalid()  # stands where a value could not be had; its problem is already listed


@dataclass(frozen=True)
class Spec:
    """One key of one mapping.

    Attributes:
        kind: ``int``, ``float``, ``bool``, ``str``, a ``StrEnum``, a dataclass, ``list`` (then ``item`` is set),
            ``dict`` (then ``entry`` is set), or ``object``, which is any value.
        item: The type of a list's elements, else None.
        entry: The dataclass of each mapping in a mapping whose keys are names that its author chooses, else None.
        optional: Null is accepted.
        words: Words that are accepted beside values of ``kind``; None without any.
        variants: Those of the field and those listed in ``table``; None where all of them have the same keys.

    The others are the arguments of :func:`moefoundry.config.field.key`.
    """

    name: str
    kind: Any
    item: Any
    entry: Any
    optional: bool
    words: type[StrEnum] | None
    doc: str
    required: bool
    customary: str
    bounds: dict[str, float]
    pattern: str | None
    length: int | None
    available: tuple[Any, ...] | None
    variants: dict[str, type] | None
    tag: str
    path: bool
    free_on_resume: bool
    architecture: bool
    renamed_from: tuple[str, ...]
    instead_of: dict[str, str]
    other_values: dict[str, str]
    table: Table | None
    first_of: str

    @property
    def is_mapping(self) -> bool:
        return dataclasses.is_dataclass(self.kind)

    @property
    def is_text(self) -> bool:
        """Tell whether its value is text, which includes the names of an enum."""
        return self.kind is str or (isinstance(self.kind, type) and issubclass(self.kind, StrEnum))

    @property
    def matcher(self) -> re.Pattern[str] | None:
        return re.compile(self.pattern) if self.pattern else None


def specs(cls: type) -> dict[str, Spec]:
    """Read the keys of a schema dataclass, in order."""
    return _specs(cls)


@cache
def _specs(cls: Any) -> dict[str, Spec]:
    hints = get_type_hints(cls)
    result = {}
    for field in dataclasses.fields(cls):
        kind, optional, words = _split_hint(hints[field.name])
        item = get_args(kind)[0] if get_origin(kind) is list else None
        entry = get_args(kind)[1] if get_origin(kind) is dict else None
        facts = {**field.metadata, "table": TABLES.get(field.metadata["table"] or "")}
        if facts["table"] is not None and facts["tag"] and dataclasses.is_dataclass(kind):
            facts["variants"] = _listed_variants(facts["table"], kind)
        result[field.name] = Spec(field.name, get_origin(kind) or kind, item, entry, optional, words, **facts)
    return result


def _listed_variants(table: Table, kind: Any) -> dict[str, type] | None:
    """Configs of the parts that the schema knows; those of Composer's classes would take it to be imported."""
    configs = {name: part.config for name, part in table.listed.items() if isinstance(part, Part) and part.config}
    return None if set(configs.values()) == {kind} else configs


def _split_hint(hint: Any) -> tuple[Any, bool, type[StrEnum] | None]:
    """Split a type into the kind of a value, whether it may be null, and the words beside it."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False, None
    kinds = [part for part in get_args(hint) if part is not type(None)]
    optional, words = len(kinds) < len(get_args(hint)), None
    if len(kinds) == 2 and isinstance(kinds[1], type) and issubclass(kinds[1], StrEnum):
        words = kinds.pop()
    return kinds[0] if len(kinds) == 1 else object, optional, words


def walk(cls: type, prefix: str = "") -> Iterator[tuple[str, Spec]]:
    """Yield every (path, key) below ``cls``, mappings before their keys; a key that variants share comes for each."""
    for name, spec in specs(cls).items():
        path = f"{prefix}{name}"
        yield path, spec
        if spec.is_mapping:
            for child in (spec.variants or {"": spec.kind}).values():
                yield from walk(child, f"{path}.")
        if spec.entry:
            yield from walk(spec.entry, f"{path}.{ANY_NAME}.")


ANY_NAME = "NAME"
"""Stands in the paths of :func:`every_key` for a name that the author of a recipe chooses."""


@cache
def every_key() -> dict[str, Spec]:
    """Map the path of every key to its facts, in the schema's order; where variants share a key, the first one's."""
    found: dict[str, Spec] = {}
    for path, spec in walk(Recipe):
        found.setdefault(path, spec)
    return found


@dataclass(frozen=True)
class Elsewhere:
    """A name that LLM Foundry, Composer, Hugging Face or torchtitan have.

    Attributes:
        keys: Keys here that mean the same.
        advice: Where none does, how to say it here.
    """

    keys: tuple[str, ...] = ()
    advice: str = ""


@cache
def elsewhere() -> dict[str, Elsewhere]:
    """Collect other projects' names from the schema."""
    found: dict[str, Elsewhere] = {}
    for path, spec in walk(Recipe):
        for name in spec.renamed_from:
            keys = found.get(name, Elsewhere()).keys
            found[name] = Elsewhere(keys if path in keys else (*keys, path))
        for name, advice in spec.instead_of.items():
            found[name] = Elsewhere(advice=advice)
    return found


def known_path(path: str) -> str:
    """Put :data:`ANY_NAME` in place of the names in a dotted path that an author chose."""
    known, names = every_key(), path.split(".")
    for end in range(1, len(names)):
        if (spec := known.get(".".join(names[:end]))) is not None and spec.entry:
            names[end] = ANY_NAME
    return ".".join(names)


def _lineage(path: str) -> Iterator[Spec]:
    """Yield the key of a dotted path and those above it, as far as the schema has them."""
    known, names = every_key(), known_path(path).split(".")
    return (known[above] for end in range(1, len(names) + 1) if (above := ".".join(names[:end])) in known)


def is_free_on_resume(path: str) -> bool:
    """Tell whether a run that goes on from its own checkpoint may change this key."""
    return any(spec.free_on_resume for spec in _lineage(path))


def is_architecture(path: str) -> bool:
    """Tell whether a checkpoint fits only a model that has the same value of this key."""
    return path.startswith("model.") and all(spec.architecture for spec in _lineage(path))


def join(path: str, key: str | int) -> str:
    """Write the path of a mapping's key, or of a list's element."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


def chosen_class(spec: Spec, mapping: dict[str, Any], default: Any = None) -> Any:
    """Find the dataclass that types a mapping; None if the key is no mapping, or its tag is unknown or cannot be used.

    Args:
        spec: The key at which the mapping stands.
        mapping: Its keys and values.
        default: An object whose tag counts where the mapping has none.
    """
    if not spec.is_mapping or (spec.variants is None and spec.table is None):
        return spec.kind if spec.is_mapping else None
    if spec.table is not None and not spec.tag:
        return with_parts(spec.kind, spec.table, mapping)
    tag = mapping.get(spec.tag, getattr(default, spec.tag, None))
    if not isinstance(tag, str):
        return spec.kind if spec.variants is None else None
    if spec.table is None:
        return (spec.variants or {}).get(tag)
    part = _usable(spec.table, tag)
    return part.config if part is not None else None


def _usable(table: Table, name: Any) -> Part | None:
    """Find a part; None if there is none, or if it cannot be used, which is said when the recipe is built."""
    try:
        return table.find(name) if isinstance(name, str) else None
    except PartError:
        return None


def with_parts(cls: type, table: Table, names: Iterable[Any]) -> type:
    """Add to a mapping's dataclass, such as that of ``callbacks``, a key for each name of a part.

    Args:
        cls: The dataclass in the schema.
        table: The table of its keys.
        names: The keys that stand in a recipe. Those that are no part, or of a part that cannot be used, are left out.
    """
    known = specs(cls)
    parts = [(name, part) for name in names if name not in known and (part := _usable(table, name)) is not None]
    return _extended(cls, table.kind, tuple(parts)) if parts else cls


@cache
def _extended(cls: type, kind: str, parts: tuple[tuple[str, Part], ...]) -> type:
    """Make one class for the same parts in the same order, so that equal recipes are equal."""
    names = [name for name, _ in parts]
    added = [
        (name, Optional[part.config], key(None, (part.config.__doc__ or "").strip()))  # noqa: UP045 # a type as a value
        for name, part in parts
    ]
    namespace = {"added": names, "__reduce__": lambda self: (_restored, (cls, kind, names, vars(self)))}
    return dataclasses.make_dataclass(cls.__name__, added, bases=(cls,), namespace=namespace)


def _restored(cls: type, kind: str, names: list[str], values: dict[str, Any]) -> Any:
    """Restore an object of an extended class that was pickled."""
    return with_parts(cls, TABLES[kind], names)(**values)


def find_key(path: str) -> Spec | None:
    """Find the key of this path, of the schema or of a part that the path names."""
    path = known_path(path)
    parent, _, rest = path.partition(".")
    name, _, leaf = rest.partition(".")
    table = spec.table if (spec := specs(Recipe).get(parent)) is not None and not spec.tag else None
    if path in every_key() or table is None or not leaf:
        return every_key().get(path)
    part = _usable(table, name)
    return specs(part.config).get(leaf) if part is not None and part.config is not None else None


def options(spec: Spec) -> list[str]:
    """List the members of an enum that can be used in this release."""
    members: Iterable[Any] = spec.available or spec.kind
    return [str(member) for member in members if member is not None]


_NOUNS = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    bool: ("true, false", "true, false"),
}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def describe(spec: Spec, kind: Any = None) -> str:
    """Say in words what a key accepts; ``kind`` describes one element of a list instead."""
    kind = kind or spec.kind
    noun, nouns = _NOUNS.get(spec.item or kind, ("a value", "values"))
    bounds = " and ".join(f"{_SIGNS[name]} {show(bound)}" for name, bound in spec.bounds.items())
    if spec.is_mapping:
        text = "a mapping"
    elif spec.entry:
        text = f"a mapping of one or more names ({PATTERN_HINTS[ENTRY]}) to mappings"
    elif kind is list:
        items = PATTERN_HINTS[spec.pattern] if spec.pattern else f"{nouns} {bounds}"
        text = f"a list of {spec.length or ''} {items}".replace("  ", " ").rstrip()
    elif issubclass(kind, StrEnum):
        text = ", ".join(options(spec))
    elif spec.table is not None:
        text = ", ".join(spec.table.listed)
    elif spec.pattern:
        text = PATTERN_HINTS[spec.pattern]
    else:
        text = "a path" if spec.path else f"{noun} {bounds}".rstrip()
    if spec.words is not None:
        text = ", ".join([*map(str, spec.words), text])
    return f"{text}, or null" if spec.optional and kind is spec.kind else text


def missing(spec: Spec) -> str:
    """Word the error of a required key that is not there: what it is, and which values are usual."""
    what = spec.doc.partition(";")[0].rstrip(".")
    text = f"missing: {what[:1].lower()}{what[1:]}" if what else "missing"
    return f"{text}; customary: {spec.customary}" if spec.customary else text


def plain(value: Any) -> Any:
    """Turn a schema object into dicts, lists and scalars; enum members become their names in YAML."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {name: plain(entry) for name, entry in value.items()}
    return str(value) if isinstance(value, StrEnum) else value


def filled(default: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """Add the missing keys of ``default`` (a schema object) to ``tree`` at every depth.

    Unknown keys stay, and required ones stay missing.
    """
    result = {}
    for name, spec in specs(type(default)).items():
        value = getattr(default, name)
        if name not in tree:
            if value is not REQUIRED:
                result[name] = filled(value, {}) if dataclasses.is_dataclass(value) else plain(value)
            elif (first := _first(tree.get(spec.first_of), name)) is not None:
                result[name] = first
        elif isinstance(tree[name], dict) and spec.entry:
            result[name] = {
                each: filled(spec.entry(), below) if isinstance(below, dict) else below
                for each, below in tree[name].items()
            }
        elif isinstance(tree[name], dict) and (cls := _usable_class(spec, tree[name], value)):
            result[name] = filled(value if type(value) is cls else cls(), tree[name])
        else:
            result[name] = tree[name]
    return result | {name: value for name, value in tree.items() if name not in result}


def _first(mappings: Any, name: str) -> Any:
    """Find the value of ``name`` in the first of several mappings; None if there is none."""
    first = next(iter(mappings.values()), None) if isinstance(mappings, dict) else None
    return first.get(name) if isinstance(first, dict) else None


def _usable_class(spec: Spec, tree: dict[str, Any], default: Any) -> Any:
    """Find the class as :func:`chosen_class` does; for a part that the builder will refuse, what all parts have."""
    cls = chosen_class(spec, tree, default)
    return spec.kind if cls is None and spec.is_mapping and spec.variants is None else cls


def architecture_of(value: Any) -> Any:
    """Put the default in place of every key below a schema object that is no architecture."""
    default = type(value)()
    changes = {}
    for name, spec in specs(type(value)).items():
        own = getattr(value, name)
        if not spec.architecture:
            changes[name] = getattr(default, name)
        elif hasattr(own, "__dataclass_fields__"):
            changes[name] = architecture_of(own)
    return dataclasses.replace(value, **changes)


def show(value: Any) -> str:
    """Write a value as its author would recognize it in YAML, cut to a line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(redact(str(value))) if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def show_leaf(value: Any) -> str:
    """Write a value as :func:`show` does, but with a list's elements, and ``{}`` for an empty mapping."""
    if isinstance(value, list):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return "{}" if value == {} else show(value)
