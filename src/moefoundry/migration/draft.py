"""An old recipe that is being moved key by key; each key is taken once and accounted for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moefoundry.config.errors import ConfigError, Problem
from moefoundry.config.layers import leaves_of
from moefoundry.config.secrets import REDACTED
from moefoundry.config.spec import show
from moefoundry.llm_foundry.recipe import without_secrets
from moefoundry.migration.names import default_of, find_equal, fitting_value
from moefoundry.migration.report import Fate, Line

SECRET = "a secret is not copied; set it where it is used"


def model_name(tree: Mapping[str, Any]) -> Any:
    """Give ``model.name`` of an old recipe; None if there is none."""
    model = tree.get("model")
    return model.get("name") if isinstance(model, dict) else None


def check_kinds(tree: Mapping[str, Any], numbers: Iterable[str] = (), mappings: Iterable[str] = ()) -> None:
    """Refuse values that no recipe of the kind has, lest they be computed with.

    Args:
        tree: An old recipe.
        numbers: Dotted keys whose values are numbers, or null.
        mappings: Dotted keys whose values are mappings, or null.

    Raises:
        ConfigError: Names every value of another kind.
    """
    wanted = [(path, "a number", (int, float)) for path in numbers] + [
        (path, "a mapping", (dict,)) for path in mappings
    ]
    problems = []
    for path, kind, types in wanted:
        value: Any = tree
        for name in path.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None and (isinstance(value, bool) or not isinstance(value, types)):
            problems.append(Problem(path, f"got {show(value)}", kind))
    if problems:
        raise ConfigError(problems)


class Draft:
    """The keys of the new recipe, and the account of the old ones.

    Args:
        old: The old recipe: dicts, lists and scalars, interpolations resolved.

    Attributes:
        new: Dotted key of the new recipe -> its value.
        lines: The account so far.
        notes: Sentences for the report.
        to_fill_in: Keys of the new recipe that the old one does not tell.
    """

    def __init__(self, old: Mapping[str, Any]) -> None:
        self.old = {".".join(path): value for path, value in leaves_of(dict(old)).items() if path}
        self._taken: set[str] = set()
        self.new: dict[str, Any] = {}
        self.lines: list[Line] = []
        self.notes: list[str] = []
        self.to_fill_in: dict[str, str] = {}

    def value(self, path: str, default: Any = None) -> Any:
        """Look at a leaf of the old recipe; ``default`` if it is not there, or null."""
        found = self.old.get(path)
        return default if found is None else found

    def below(self, path: str) -> list[str]:
        """List the leaves below a mapping of the old recipe that were not taken, or the leaf itself."""
        return [key for key in self.old if key not in self._taken and (key == path or key.startswith(f"{path}."))]

    def section(self, path: str) -> dict[str, Any]:
        """Map the leaves below a mapping of the old recipe by their names in it."""
        start = f"{path}."
        return {key.removeprefix(start): value for key, value in self.old.items() if key.startswith(start)}

    def put(self, new: str, value: Any, old: str = "", why: str = "") -> None:
        """Set a key of the new recipe.

        Args:
            new: The key.
            value: Its value.
            old: The key whose meaning it has; empty where the old recipe did not say it. Then it is not written if it
                is the default here.
            why: What changed.
        """
        if not old:
            if default_of(new) != value:
                self.new[new] = value
                self.lines.append(Line(Fate.default, "", new, None, value, why))
            return
        self._taken.add(old)
        before = self.old.get(old)
        if without_secrets({new: value})[new] == REDACTED or REDACTED in str(without_secrets(value)):
            self.drop(old, SECRET)
            return
        self.new[new] = value
        fate = Fate.changed if before != value else Fate.same if old == new else Fate.renamed
        self.lines.append(Line(fate, old, new, before, value, why))

    def same(self, new: str, old: str, why: str) -> None:
        """Account for a key that need not be written, since the default here says the same."""
        self._taken.add(old)
        self.lines.append(Line(Fate.same, old, new, self.old.get(old), self.old.get(old), why))

    def drop(self, old: str, why: str) -> None:
        """Account for a leaf, or all leaves below a mapping, that have no equal here."""
        for path in self.below(old) or [old]:
            self._taken.add(path)
            self.lines.append(Line(Fate.dropped, path, "", self.old.get(path), None, why))

    def silence(self, *old: str) -> None:
        """Take leaves, and those below mappings, that say nothing."""
        self._taken.update(path for name in old for path in self.below(name))

    def move(self, path: str, reasons: Mapping[str, str] | None = None, new: str = "") -> None:
        """Move a leaf of the old recipe by what the schema knows of its name, or account for why it cannot be.

        Args:
            path: The leaf.
            reasons: Last part of a name -> the reason why it has no equal, which comes before the schema's.
            new: Its key here, if that is known.
        """
        value, name = self.old[path], path.rpartition(".")[2]
        if reasons and name in reasons:
            self.drop(path, reasons[name])
            return
        key, reason = (new, "") if new else find_equal(path, value)
        if not key:
            self.drop(path, reason)
        elif value is None and default_of(key) is not None:
            self.silence(path)
        elif key in self.new:
            self.drop(path, f"{key} is set by another key")
        else:
            self.put(key, fitting_value(key, value), path)

    def move_rest(self, section: str = "", reasons: Mapping[str, str] | None = None) -> None:
        """Move all leaves that were not taken; arguments as of :meth:`move`."""
        rest = self.below(section) if section else [path for path in self.old if path not in self._taken]
        for path in rest:
            if path not in self._taken:
                self.move(path, reasons)

    def withdraw(self, new: str, why: str) -> None:
        """Take a key back that the recipe loader refuses, with all below it."""
        gone = {key for key in self.new if key == new or key.startswith(f"{new}.")}
        for key in gone:
            del self.new[key]
        kept = []
        for line in self.lines:
            if line.new not in gone:
                kept.append(line)
            elif line.old:
                kept.append(Line(Fate.dropped, line.old, "", line.old_value, None, why))
        self.lines = kept
