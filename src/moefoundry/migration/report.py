"""The account of a migration: the fate of each key, what is still to fill in, and notes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from moefoundry.config.secrets import redact
from moefoundry.config.spec import show_leaf
from moefoundry.llm_foundry.recipe import without_secrets

WIDTH = 110


class Fate(StrEnum):
    """Fates of a key."""

    same = "same"
    renamed = "renamed"
    changed = "changed"
    default = "default"
    dropped = "dropped"


TITLES = {
    Fate.renamed: "new name",
    Fate.changed: "changed",
    Fate.default: "said now, for the default is another",
    Fate.dropped: "no equal",
}


@dataclass(frozen=True)
class Line:
    """One key.

    Attributes:
        fate: Its fate.
        old, new: Its dotted names; an empty one is in that recipe not there.
        old_value, new_value: Its values, plain.
        why: A reason, or what else it means; may be empty.
    """

    fate: Fate
    old: str
    new: str
    old_value: Any = None
    new_value: Any = None
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Give its parts, without secrets."""
        return {
            "fate": str(self.fate),
            "old": self.old,
            "old_value": without_secrets({self.old: self.old_value})[self.old],
            "new": self.new,
            "new_value": without_secrets({self.new: self.new_value})[self.new],
            "why": self.why,
        }


@dataclass
class Migration:
    """A recipe that was turned into another.

    Attributes:
        source: The old file.
        kind: The project whose recipe it is.
        target: The project whose recipe the new one is.
        text: The new recipe, as YAML.
        lines: One for each key.
        to_fill_in: Key of the new recipe -> what it needs.
        notes: Further sentences.
    """

    source: str
    kind: str
    target: str
    text: str = ""
    lines: list[Line] = field(default_factory=list)
    to_fill_in: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Give all but the text, for JSON."""
        lines = [line.as_dict() for line in self.lines]
        parts = {"source": self.source, "kind": self.kind, "target": self.target, "lines": lines}
        return parts | {"to_fill_in": self.to_fill_in, "notes": self.notes}

    def __str__(self) -> str:
        return "\n".join(self._text())

    def _text(self) -> Iterator[str]:
        yield f"{self.source}: a recipe of {self.kind}, now one of {self.target}"
        for fate, title in TITLES.items():
            found = [line for line in self.lines if line.fate is fate]
            if found:
                yield f"{title}:"
            for line in found:
                yield from _written(line)
        if same := [line.old for line in self.lines if line.fate is Fate.same]:
            yield f"as before: {len(same)} key{'s' if len(same) > 1 else ''}"
        if self.to_fill_in:
            yield "still to fill in:"
            yield from (f"  {key}: {text}" for key, text in self.to_fill_in.items())
        yield from (f"note: {note}" for note in self.notes)


def _written(line: Line) -> Iterator[str]:
    old = f"{line.old}: {shown(line.old, line.old_value)}" if line.old else ""
    new = f"{line.new}: {shown(line.new, line.new_value)}" if line.new else ""
    text = f"  {' -> '.join(part for part in (old, new) if part)}"
    if not line.why:
        yield text
    elif len(text) + len(line.why) + 4 <= WIDTH:
        yield f"{text}  ({line.why})"
    else:
        yield text
        yield f"      {line.why}"


def header(first: str, found: Migration) -> str:
    """Write the first lines of a new recipe: comments with what is still to fill in, and the notes."""
    lines = [first]
    if found.to_fill_in:
        lines += ["Still to fill in:", *(f"  {key}: {text}" for key, text in found.to_fill_in.items())]
    return "".join(f"# {one_line(line)}\n" for line in [*lines, *found.notes])


def one_line(text: str) -> str:
    """Make a text fit for a comment, whatever an old recipe brought into it."""
    return redact("".join(letter if letter.isprintable() else " " for letter in text))


def shown(path: str, value: Any) -> str:
    """Write a value on one line, without secrets."""
    name = path.rpartition(".")[2]
    hidden = without_secrets({name: value})[name]
    return str(hidden) if isinstance(hidden, dict) and hidden else show_leaf(hidden)
