"""Typed configs of classes that have none: their keys are the arguments of the class."""

from __future__ import annotations

import inspect
from dataclasses import make_dataclass
from functools import cache
from typing import Any, Optional, get_args, get_origin

from moefoundry.config.field import REQUIRED, key
from moefoundry.registry import Part, load

SCALARS = (bool, int, float, str)
SKIPPED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@cache
def part_of_class(place: str) -> Part:
    """A part whose keys are the arguments of a class, checked as far as their types are those of YAML.

    Args:
        place: Of the class, as ``package.module:Class``.
    """
    cls = load(place)
    parameters = [each for each in _signature(cls).parameters.values() if each.kind not in SKIPPED]
    reduce = {"__reduce__": lambda self: (_restored, (place, vars(self)))}
    added = [_field(each) for each in parameters]
    config = make_dataclass(f"{cls.__name__}Config", added, kw_only=True, namespace=reduce)
    config.__doc__ = (cls.__doc__ or "").strip().split("\n")[0]
    return Part(config, lambda cfg, *_: cls(**{name: value for name, value in vars(cfg).items() if value is not None}))


def _restored(place: str, values: dict[str, Any]) -> Any:
    """A config that was pickled."""
    return part_of_class(place).config(**values)


def _signature(cls: type) -> inspect.Signature:
    try:
        return inspect.signature(cls, eval_str=True)
    except NameError:  # a type that is imported for type checkers alone
        return inspect.signature(cls)


def _field(parameter: inspect.Parameter) -> tuple[str, Any, Any]:
    """Null stands for an argument that is left out, so that the class has its own default."""
    kind, doc = _kind(parameter.annotation), f"Argument {parameter.name} of the class."
    if parameter.default is inspect.Parameter.empty:
        return parameter.name, kind, key(REQUIRED, doc)
    default = parameter.default if _fits(parameter.default, kind) else None
    return parameter.name, Optional[kind], key(default, doc)  # noqa: UP045 # of a type that is a value


def _kind(annotation: Any) -> Any:
    """The type of a recipe's key; ``object`` where an argument takes what a recipe has no type for."""
    members = [member for member in get_args(annotation) if member is not type(None)]
    if annotation in SCALARS:
        return annotation
    if get_origin(annotation) is list and members[0] in SCALARS:
        return annotation
    optional = len(members) == 1 and type(None) in get_args(annotation)
    return _kind(members[0]) if optional else object


def _fits(value: Any, kind: Any) -> bool:
    return type(value) in (SCALARS if kind is object else (kind, int) if kind is float else (kind,))
