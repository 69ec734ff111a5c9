"""Parts of a checked recipe, made by their tables."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.config.parts import TABLES


def make_part(kind: str, name: str, key: str, cfg: Any, *context: Any) -> Any:
    """One part.

    Args:
        kind: Its table.
        name: Its own in the table.
        key: Where it stands in the recipe.
        cfg: Its config.
        context: What else its table gives.

    Raises:
        UserError: There is none, or it cannot be made.
    """
    part = TABLES[kind].find(name)
    if part is None:
        raise UserError(f"{key}: no {name!r} among {', '.join(TABLES[kind].names())}")
    try:
        return part.make(cfg, *context)
    except UserError:
        raise
    except Exception as error:  # of code that others have written
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key}: cannot be used: {reason}") from error


def make_parts(kind: str, mapping: Any, *context: Any) -> list[Any]:
    """The parts that a mapping such as ``callbacks`` turns on.

    Args:
        kind: The table, which is also the mapping's key.
        mapping: Of the recipe.
        context: What else its table gives.

    Raises:
        UserError: One cannot be made.
    """
    return [make_part(kind, name, f"{kind}.{name}", cfg, *context) for name, cfg in chosen_parts(kind, mapping)]


def chosen_parts(kind: str, mapping: Any) -> list[tuple[str, Any]]:
    """Name and config of each part that a mapping turns on, in its order.

    Keys of the schema that are no parts of a table, such as ``callbacks.report``, are left out.
    """
    names = [field.name for field in fields(mapping)]
    added = getattr(mapping, "added", ())
    chosen = [(name, getattr(mapping, name)) for name in names if name in TABLES[kind].listed or name in added]
    return [(name, cfg) for name, cfg in chosen if cfg is not None]
