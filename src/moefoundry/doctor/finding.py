"""One line of a diagnosis."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from moefoundry.config.secrets import redact


class Status(StrEnum):
    """Grades of a finding: an error keeps training from working, a warning may."""

    ok = "OK"
    warning = "warning"
    error = "error"


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    Attributes:
        name: Part of the machine.
        status: Grade.
        text: Facts.
        remedy: Sentence that says what to do; empty where nothing is.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return redact(f"{self.status:8} {self.name:15} {self.text}" + (f"; {self.remedy}" if self.remedy else ""))

    def to_json(self) -> dict[str, Any]:
        """Give its parts as plain values."""
        return {key: redact(str(value)) for key, value in asdict(self).items()}


def graded(name: str, text: str, *problems: tuple[bool, Status, str]) -> Finding:
    """Make a finding with the first of the problems that is there: whether it is, its grade, its remedy."""
    for is_there, status, remedy in problems:
        if is_there:
            return Finding(name, status, text, remedy)
    return Finding(name, Status.ok, text)
