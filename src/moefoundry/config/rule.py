"""Rules between the keys of a recipe: how one is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moefoundry.config.errors import Problem
from moefoundry.config.schema import Recipe

Check = Callable[[Recipe, int | None], Iterator[Problem]]


@dataclass(frozen=True)
class Rule:
    """A check and the keys it reads; it is skipped where one of them is unsound."""

    keys: tuple[str, ...]
    check: Check


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Check], Check]:
    """Add the decorated check to :data:`RULES`."""

    def register(check: Check) -> Check:
        RULES.append(Rule(keys, check))
        return check

    return register
