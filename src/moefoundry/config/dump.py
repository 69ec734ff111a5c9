"""A recipe as text: YAML that reads back equal, dotted leaves, and the difference of two recipes."""

from __future__ import annotations

from typing import Any

import yaml

from moefoundry.config.schema import Recipe
from moefoundry.config.spec import join, plain, redact, show_leaf
from moefoundry.config.yaml_reader import StrictDumper


def dump_recipe(recipe: Recipe) -> str:
    """Write YAML of every key, resolved, in the schema's order.

    ``load_recipe`` reads it back to an equal recipe, but for secrets: they are redacted here and below, since all of
    this is kept and shown.
    """
    return yaml.dump(redacted(plain(recipe), ""), Dumper=StrictDumper, sort_keys=False, width=120)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value; lists and empty mappings are leaves, enum members are strings."""
    return dict(_leaves(redacted(plain(recipe), ""), ""))


def redacted(value: Any, path: str) -> Any:
    """The plain ``value`` of the key ``path`` with every string as :func:`redact` leaves it."""
    if isinstance(value, dict):
        return {name: redacted(child, join(path, name)) for name, child in value.items()}
    if isinstance(value, list):
        return [redacted(item, path) for item in value]
    return redact(value, path) if isinstance(value, str) else value


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [leaf for name, child in value.items() for leaf in _leaves(child, join(path, name))]
    return [(path, value)]


def diff_recipes(old: Recipe, new: Recipe) -> list[str]:
    """One ``key: old -> new`` line for each leaf that differs; ``(absent)`` where a recipe has none."""
    before, after = flatten(old), flatten(new)
    lines = []
    for path in before | after:
        if path not in before or path not in after or before[path] != after[path]:
            was, becomes = (show_leaf(leaves[path]) if path in leaves else "(absent)" for leaves in (before, after))
            lines.append(f"{path}: {was} -> {becomes}")
    return lines
