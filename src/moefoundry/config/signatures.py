"""Typed configs of classes that have none: their keys are the arguments of the class."""

from __future__ import annotations

import inspect
from dataclasses import make_dataclass
from functools import cache
from typing import Any, Optional, get_args, get_origin

from moefoundry.config.field import DURATION, REQUIRED, key
from moefoundry.registry import Part, load

SCALARS = (bool, int, float, str)
SKIPPED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def part_of_class(place: str, base: type = object) -> Part:
    """Make a part whose keys are the arguments of a class; they are checked where YAML has their type.

    Args:
        place: The class, as ``package.module:Class``.
        base: Dataclass with the keys that all parts of the table have; they are not arguments of the class.
    """
    return _made(place, base)


@cache
def _made(place: str, base: type) -> Part:
    cls = load(place)
    arguments = {name: each for name, each in _signature(cls).parameters.items() if each.kind not in SKIPPED}
    reduce = {"__reduce__": lambda self: (_restored, (place, base, vars(self)))}
    added = [_field(each) for each in arguments.values()]
    config = make_dataclass(f"{cls.__name__}Config", added, bases=(base,), kw_only=True, namespace=reduce)
    config.__doc__ = (cls.__doc__ or "").strip().split("\n")[0]

    def build(cfg: Any, *_: Any) -> Any:
        given = {name: getattr(cfg, name) for name in arguments}
        return cls(**{name: value for name, value in given.items() if value is not None})

    return Part(config, build)


def _restored(place: str, base: type, values: dict[str, Any]) -> Any:
    """Restore a config that was pickled."""
    config: Any = part_of_class(place, base).config
    return config(**values)


def _signature(cls: type) -> inspect.Signature:
    try:
        return inspect.signature(cls, eval_str=True)
    except NameError:  # a type that is imported for type checkers alone
        return inspect.signature(cls)


def _field(parameter: inspect.Parameter) -> tuple[str, Any, Any]:
    """Describe an argument as a key; null leaves the argument out, so that the class has its own default."""
    kind, doc = _kind(parameter.annotation), f"Argument {parameter.name} of the class."
    pattern = DURATION if _is_time(parameter.annotation) else None
    if parameter.default is inspect.Parameter.empty:
        return parameter.name, kind, key(REQUIRED, doc, pattern=pattern)
    default = parameter.default if _fits(parameter.default, kind) else None
    return parameter.name, Optional[kind], key(default, doc, pattern=pattern)  # noqa: UP045 # of a type that is a value


def _kind(annotation: Any) -> Any:
    """Choose the type of a recipe's key; ``object`` where an argument takes what a recipe has no type for."""
    members = [member for member in get_args(annotation) if member is not type(None)]
    if annotation in SCALARS:
        return annotation
    if _is_time(annotation):
        return list[str] if get_origin(annotation) is list else str
    if get_origin(annotation) is list and members[0] in SCALARS:
        return annotation
    optional = len(members) == 1 and type(None) in get_args(annotation)
    return _kind(members[0]) if optional else object


def _is_time(annotation: Any) -> bool:
    """Tell if an argument is a Composer ``Time`` or its text, or a list of them."""
    members = get_args(get_args(annotation)[0] if get_origin(annotation) is list else annotation)
    return {getattr(member, "__name__", "") for member in members} == {"str", "Time"}


def _fits(value: Any, kind: Any) -> bool:
    return type(value) in (SCALARS if kind is object else (kind, int) if kind is float else (kind,))
