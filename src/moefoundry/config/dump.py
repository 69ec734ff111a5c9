"""A recipe as text: YAML that reads back equal, YAML with the origin of each value, and the difference of two recipes.

All of this is kept and shown, so secrets are redacted in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import yaml

from moefoundry.config.layers import KeyPath, Layers, leaves_of
from moefoundry.config.loader import with_defaults
from moefoundry.config.schema import Recipe
from moefoundry.config.secrets import redact
from moefoundry.config.spec import join, plain, show_leaf
from moefoundry.config.yaml_reader import StrictDumper

COLUMN = 56  # of comments, where a line is not longer


def dump_recipe(recipe: Recipe) -> str:
    """Write every key as YAML, resolved, in the schema's order.

    :func:`moefoundry.config.load_recipe` reads it back to an equal recipe, but for secrets.
    """
    return yaml.dump(redacted(plain(recipe)), Dumper=StrictDumper, sort_keys=False, width=120)


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Map each dotted key to its value; lists and empty mappings are leaves, enum members are strings."""
    return {".".join(path): value for path, value in leaves_of(redacted(plain(recipe))).items()}


def diff_recipes(old: Recipe, new: Recipe) -> list[str]:
    """Write a line ``key: old -> new`` for each leaf that differs, with ``(absent)`` where a recipe has none."""
    before, after, absent = flatten(old), flatten(new), object()
    lines = []
    for path in before | after:
        values = [leaves.get(path, absent) for leaves in (before, after)]
        if values[0] != values[1]:
            was, becomes = ("(absent)" if value is absent else show_leaf(value) for value in values)
            lines.append(f"{path}: {was} -> {becomes}")
    return lines


def redacted(value: Any, path: str = "") -> Any:
    """Apply :func:`redact` to every string in the plain ``value`` of the key ``path``."""
    if isinstance(value, dict):
        return {name: redacted(child, join(path, name)) for name, child in value.items()}
    if isinstance(value, list):
        return [redacted(item, path) for item in value]
    return redact(value, path) if isinstance(value, str) else value


def annotated(recipe: Recipe, layers: Layers) -> str:
    """Write every key as YAML, resolved, with a comment on where its value comes from: ``validate --show``.

    The comment is the file, ``override`` or ``default``; before it stands the interpolation, if the value was written
    as one. The text reads back as that of :func:`dump_recipe` does.

    Args:
        recipe: The recipe that the layers resolve to.
        layers: Its files and overrides.
    """
    text = ""
    for path, value, comment in _keys(redacted(plain(recipe)), with_defaults(layers.tree), (), layers, ""):
        line = "  " * (len(path) - 1) + f"{path[-1]}:"
        is_section = isinstance(value, dict) and value
        text += f"{line}\n" if is_section else f"{f'{line} {scalar(value)}':<{COLUMN}}  # {comment}\n"
    return text


def origins(recipe: Recipe, layers: Layers) -> dict[str, str]:
    """Map each dotted key to where its value comes from, in the words of :func:`annotated`; the same arguments."""
    keys = _keys(plain(recipe), with_defaults(layers.tree), (), layers, "")
    return {".".join(path): comment for path, value, comment in keys if not (isinstance(value, dict) and value)}


def _keys(
    values: dict[str, Any], written: Any, above: KeyPath, layers: Layers, whole: str
) -> Iterator[tuple[KeyPath, Any, str]]:
    """Yield path, value and comment of each key of the mapping at ``above``, a section before its keys.

    ``written`` is the mapping before interpolations were resolved. ``whole`` is the comment of all keys below an
    interpolation that stands for a mapping.
    """
    for name, value in values.items():
        path = (*above, name)
        key = ".".join(path)
        raw = written[name] if isinstance(written, dict) else None
        comment = whole or _comment(raw, layers.origins.get(key, "default"), key)
        yield path, value, comment
        if isinstance(value, dict) and value:
            yield from _keys(value, raw, path, layers, whole or (comment if isinstance(raw, str) else ""))


def _comment(raw: Any, origin: str, key: str) -> str:
    items = raw if isinstance(raw, list) else [raw]
    references = [item for item in items if isinstance(item, str) and "${" in item]
    parts = [redact(" ".join(references), key), f"({redact(origin)})"] if references else [redact(origin)]
    return " ".join(part if part.isprintable() else repr(part) for part in parts)


def scalar(value: Any) -> str:
    """Write a value, or a list of them, on one line."""
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.dump(
        [value], Dumper=StrictDumper, default_flow_style=True, default_style=style, width=math.inf, allow_unicode=True
    )
    return text.strip().removeprefix("[").removesuffix("]")
