"""Parts of a checked recipe, made by their tables."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.config.parts import TABLES
from moefoundry.registry import PartError


def make_part(kind: str, name: str, key: str, *context: Any) -> Any:
    """Make one part.

    Args:
        kind: Name of its table.
        name: Name of the part in the table.
        key: The part's key in the recipe, for messages.
        context: Arguments of the build function: the part's config, if it has one, and what the table gives.

    Raises:
        UserError: There is no such part, or it cannot be made.
    """
    try:
        part = TABLES[kind].find(name)
        made = None if part is None else part.make(*context)
    except UserError:
        raise
    except PartError as error:
        raise UserError(f"{key}: {name}: {error}") from error
    except Exception as error:  # of code that others have written
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key}: cannot be used: {reason}") from error
    if part is None:
        raise UserError(f"{key}: no {name!r} among {', '.join(TABLES[kind].names())}")
    if made is None:
        raise UserError(f"{key}: {name}: its build function returns nothing")
    return made


def make_parts(kind: str, base: type, mapping: Any, *context: Any) -> list[Any]:
    """Make the parts that a mapping such as ``callbacks`` turns on.

    Args:
        kind: Name of the table, which is also the mapping's key.
        base: Class that the parts must be of.
        mapping: The recipe's mapping.
        context: Arguments of the build functions after the config.

    Raises:
        UserError: A part cannot be made, or is of another class.
    """
    parts = []
    for name, cfg in chosen_parts(kind, mapping):
        part = make_part(kind, name, f"{kind}.{name}", cfg, *context)
        if not isinstance(part, base):
            raise UserError(f"{kind}.{name}: its package makes a {type(part).__name__}, no {base.__name__}")
        parts.append(part)
    return parts


def chosen_parts(kind: str, mapping: Any) -> list[tuple[str, Any]]:
    """List name and config of each part that a mapping turns on, in its order.

    Keys of the schema that are no parts of the table, such as ``callbacks.report``, are left out.
    """
    names = [field.name for field in fields(mapping)]
    added = getattr(mapping, "added", ())
    chosen = [(name, getattr(mapping, name)) for name in names if name in TABLES[kind].listed or name in added]
    return [(name, cfg) for name, cfg in chosen if cfg is not None]
