"""The end of a migration: the recipe loader checks the new recipe, and it is written as YAML with comments."""

from __future__ import annotations

from typing import Any

from moefoundry.config.errors import ConfigError, Problem
from moefoundry.config.layers import Layers
from moefoundry.config.loader import recipe_of
from moefoundry.config.spec import every_key, missing
from moefoundry.conversion.starting_recipe import commented
from moefoundry.migration.draft import Draft
from moefoundry.migration.report import Fate, Line, Migration, header, one_line, shown

NAME = "NEW"


def finish(draft: Draft, source: str, kind: str) -> Migration:
    """Check the keys of a draft, take back those that are refused, and write the recipe.

    Args:
        draft: The draft; every leaf of the old recipe was taken.
        source: The old file.
        kind: The project whose recipe it is.
    """
    _check(draft)
    found = Migration(source, kind, "moefoundry", lines=draft.lines, to_fill_in=draft.to_fill_in, notes=draft.notes)
    found.text = header(f"From {source}, a recipe of {kind}.", found) + commented(_comments(draft))
    return found


def _check(draft: Draft) -> None:
    for _ in range(len(draft.new) + 1):
        problems = _problems(draft.new)
        refused = [problem for problem in problems if _set_here(draft, problem.path)]
        for problem in refused:
            draft.withdraw(_set_here(draft, problem.path), _reason(problem))
        if not refused:
            break
    for problem in problems:
        spec = every_key().get(problem.path)
        text = missing(spec).removeprefix("missing: ") if spec is not None and "missing" in problem.message else ""
        draft.to_fill_in.setdefault(problem.path, text or problem.message)


def _reason(problem: Problem) -> str:
    if problem.message.startswith("unknown key"):
        return "this release has no such key"
    return f"{problem.message}; allowed: {problem.allowed}" if problem.allowed else problem.message


def _problems(new: dict[str, Any]) -> list[Problem]:
    layers = Layers(NAME)
    layers.add({tuple(key.split(".")): value for key, value in new.items()}, NAME)
    try:
        recipe_of(layers)
    except ConfigError as error:
        return error.problems
    return []


def _set_here(draft: Draft, path: str) -> str:
    """Find the key of the new recipe that a problem is about; empty if the new recipe does not have it."""
    key = path.partition("[")[0]
    while key and not any(known == key or known.startswith(f"{key}.") for known in draft.new):
        key = key.rpartition(".")[0]
    return key if "." in key or key == path or key in draft.new else ""


def _comments(draft: Draft) -> dict[str, tuple[Any, str]]:
    by_key = {line.new: line for line in draft.lines if line.new}
    return {key: (value, _comment(by_key.get(key))) for key, value in draft.new.items()}


def _comment(line: Line | None) -> str:
    if line is None or line.fate is Fate.same:
        return ""
    if line.fate is Fate.default:
        return one_line(line.why)
    was = shown(line.old, line.old_value) if line.old == line.new else line.old
    return one_line(f"was {was}; {line.why}" if line.why else f"was {was}")
