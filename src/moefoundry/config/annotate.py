"""A recipe as YAML that says of each value where it comes from, for people: ``moefoundry validate --show``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import yaml

from moefoundry.config.dump import redacted
from moefoundry.config.layers import Layers
from moefoundry.config.loader import with_defaults
from moefoundry.config.schema import Recipe
from moefoundry.config.spec import join, plain, redact
from moefoundry.config.yaml_reader import StrictDumper

COLUMN = 56  # of the comments, where a line is not longer


def annotated(recipe: Recipe, layers: Layers) -> str:
    """Write YAML of every key, resolved, each with a comment.

    The comment is the file that says the key, ``override``, or ``default``, and before it the interpolation, if there
    was one. The text reads back like :func:`dump_recipe`'s; secrets are redacted.

    Args:
        recipe: The recipe that the layers resolve to.
        layers: The files and overrides that were read.
    """
    lines = _lines(redacted(plain(recipe), ""), with_defaults(layers.tree), "", layers, "")
    return "".join(f"{text:<{COLUMN}}  # {comment}\n" if comment else f"{text}\n" for text, comment in lines)


def _lines(values: dict[str, Any], written: Any, path: str, layers: Layers, whole: str) -> Iterator[tuple[str, str]]:
    """(line, comment) of each key of a mapping.

    Args:
        values: The resolved mapping.
        written: The mapping before interpolations were resolved.
        path: The mapping's dotted key.
        layers: All that was read.
        whole: The comment of all keys below an interpolation that stands for a mapping.
    """
    indent = "  " * path.count(".") + ("  " if path else "")
    for name, value in values.items():
        key = join(path, name)
        raw = written[name] if isinstance(written, dict) else None
        comment = whole or _comment(raw, layers.origins.get(key, "default"), key)
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:", ""
            yield from _lines(value, raw, key, layers, whole or (comment if isinstance(raw, str) else ""))
        else:
            yield f"{indent}{name}: {scalar(value)}", comment


def _comment(raw: Any, origin: str, key: str) -> str:
    items = raw if isinstance(raw, list) else [raw]
    references = [item for item in items if isinstance(item, str) and "${" in item]
    parts = [redact(" ".join(references), key), f"({redact(origin)})"] if references else [redact(origin)]
    return " ".join(part if part.isprintable() else repr(part) for part in parts)


def scalar(value: Any) -> str:
    """A value, or a list of them, on one line."""
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    text = yaml.dump(
        [value], Dumper=StrictDumper, default_flow_style=True, default_style=style, width=math.inf, allow_unicode=True
    )
    return text.strip().removeprefix("[").removesuffix("]")
