"""What a bad recipe looks like to its author: every problem at once, each with its key path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moefoundry.config.spec import redact

EXIT_USER_ERROR = 2
"""Exit status of a command that met a :class:`UserError`."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe.

    Attributes:
        path: Full dotted key path, e.g. ``model.moe.top_k`` (or the file, where the file itself is at fault).
        message: What is wrong, including the bad value.
        allowed: What would be accepted, or an empty string.
        suggestion: The key or value that was probably meant, or an empty string.
        file: The recipe file in which the key stands, where it may be one of several, or an empty string.
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
    """Something the user can put right; the message is one clear line that names the culprit.

    The command line prints it to standard error without a traceback and exits with status 2. What looks like a secret
    is hidden, wherever the message comes from.
    """

    def __str__(self) -> str:
        return redact(super().__str__())


class DataError(UserError):
    """Data that turn out to be unusable while they are read, perhaps by one rank alone: that rank is to say so."""


class ConfigError(UserError, ValueError):
    """A recipe that cannot be used. Carries every :class:`Problem` found, not just the first.

    Args:
        problems: At least one.
        source: The recipe's name.
        advice: What follows the problems in the message.
    """

    def __init__(self, problems: list[Problem], source: str = "recipe", advice: str = "") -> None:
        if not problems:
            raise ValueError("ConfigError needs at least one problem")
        self.problems = list(problems)
        count = f"{len(problems)} error" + ("s" if len(problems) > 1 else "")
        lines = [f"{source}: {count}", *(f"  {problem}" for problem in problems)]
        super().__init__("\n".join([*lines, f"  {advice}"] if advice else lines))


class RecipeFileError(ConfigError):
    """A recipe file that is not there or cannot be read, perhaps on one node alone: that node is to say so."""


def first_few(items: Sequence[str], separator: str = ", ", limit: int = 5) -> str:
    """As many as a person reads, and how many more there are."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])
