"""Errors of recipes and data. A bad recipe gets every problem at once, each with its key path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from moefoundry.config.secrets import redact

EXIT_USER_ERROR = 2
"""Exit status of a command that met a :class:`UserError`."""

EXIT_STOPPED = 75
"""Exit status of training that a signal stopped, and that has saved: ``EX_TEMPFAIL``, "try again later"."""

UNNAMED = "recipe"
"""Name of a recipe that is not known by its file."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe.

    Attributes:
        path: Full dotted key path, e.g. ``model.moe.top_k`` (or the file, where the file itself is at fault).
        message: The fault, with the bad value.
        allowed: Values that would be accepted, in words.
        suggestion: The key or value that was probably meant.
        file: The recipe file in which the key stands, where it may be one of several.
    """

    path: str
    message: str
    allowed: str = ""
    suggestion: str = ""
    file: str = ""

    def __str__(self) -> str:
        where = f" (in {self.file})" if self.file else ""
        parts = [f"{self.path}{where}: {self.message}"]
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.suggestion:
            parts.append(f"did you mean {self.suggestion!r}?")
        return redact("; ".join(parts))


class UserError(Exception):
    """An error that the user can put right; the message is one clear line that names the culprit.

    The command line prints it to standard error without a traceback and exits with status 2. Whatever looks like a
    secret is hidden in it.
    """

    def __str__(self) -> str:
        return redact(super().__str__())


class LocalError(UserError):
    """An error that perhaps one rank alone has met: that rank has to say so."""


class DataError(LocalError):
    """Data that prove unusable while they are read."""


class ConfigError(UserError, ValueError):
    """A recipe that cannot be used. Carries every :class:`Problem` found, not just the first.

    Attributes:
        problems: At least one.
        source: The recipe's name; :data:`UNNAMED` where what found the problems does not know it.
        advice: A last line after the problems.
    """

    def __init__(self, problems: list[Problem], source: str = UNNAMED, advice: str = "") -> None:
        if not problems:
            raise ValueError("ConfigError needs at least one problem")
        super().__init__(problems, source, advice)
        self.problems, self.source, self.advice = list(problems), source, advice

    def __str__(self) -> str:
        count = f"{len(self.problems)} error" + ("s" if len(self.problems) > 1 else "")
        lines = [f"{self.source}: {count}", *(f"  {problem}" for problem in self.problems)]
        return redact("\n".join([*lines, f"  {self.advice}"] if self.advice else lines))

    def in_recipe(self, name: str) -> Self:
        """Return the same error with the recipe's name, unless it has one."""
        return self if self.source != UNNAMED else type(self)(self.problems, name, self.advice)


class RecipeFileError(ConfigError):
    """A recipe file that is absent or cannot be read, perhaps on one node alone: that node has to say so."""


def first_few(items: Sequence[str], separator: str = ", ", limit: int = 5) -> str:
    """Join as many items as a person reads, and say how many more there are."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])
