"""Parts of a corpus that are not prepared, and the reasons: no text is lost without a word.

Everything that is left out is counted with its bytes and named. Blank documents and special files cost no text. The
rest is a loss: beyond :data:`MAX_LOSS` of the bytes it is an error unless it is allowed. Where the size of a loss is
unknown, as of a directory that may not be read, it is allowed only if any loss is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from moefoundry.config.errors import UserError

MAX_LOSS = 0.01
NAMED = 3  # of each reason


class Reason(StrEnum):
    """Reason why something is left out. The value completes "left out as ..."."""

    blank = "blank"
    special = "not a regular file"
    broken_link = "a link to nothing"
    unreadable = "not readable"
    damaged = "damaged or cut off"
    not_text = "not text"
    bad_bytes = "not UTF-8"
    not_json = "not a JSON object"
    no_key = "without the text key"
    null = "null"
    not_string = "not a string"
    bad_record = "no such record"
    too_long = "too long"


HARMLESS = frozenset({Reason.blank, Reason.special})
OF_RECORDS = frozenset({Reason.no_key, Reason.not_string})
REMEDIES = {
    Reason.bad_bytes: "bad_bytes=replace keeps such lines, with U+FFFD for each bad byte",
    Reason.not_text: "convert these files to UTF-8 text",
    Reason.unreadable: "make it readable",
    Reason.broken_link: "mend or remove the link",
}


class Left(dict[str, Any]):
    """Losses for one reason: ``count``, ``bytes`` (None where unknown) and the ``first`` few names; plain JSON."""


@dataclass
class LeftOut:
    """Losses so far, by reason."""

    reasons: dict[str, Left] = field(default_factory=dict)

    def add(self, name: str, reason: Reason, size: int | None) -> None:
        """Count one thing: a file, directory, line or record of ``size`` bytes (None: unknown)."""
        left = self.reasons.setdefault(reason.value, Left(count=0, bytes=0, first=[]))
        left["count"] += 1
        left["bytes"] = None if size is None or left["bytes"] is None else left["bytes"] + size
        if len(left["first"]) < NAMED:
            left["first"].append(name)

    def add_all(self, others: LeftOut, renamed: Callable[[str], str] = str) -> None:
        """Count what was left out behind this.

        Args:
            others: Losses to add.
            renamed: Gives the name of one of them that is listed.
        """
        for reason, other in others.reasons.items():
            left = self.reasons.setdefault(reason, Left(count=0, bytes=0, first=[]))
            left["count"] += other["count"]
            left["bytes"] = None if None in (other["bytes"], left["bytes"]) else left["bytes"] + other["bytes"]
            left["first"] += [renamed(name) for name in other["first"][: NAMED - len(left["first"])]]

    @property
    def count(self) -> int:
        """Number of things left out."""
        return sum(left["count"] for left in self.reasons.values())

    def behind(self) -> str:
        """Put the losses into brackets, to stand behind an error; empty if there are none."""
        return f" (left out: {describe_left_out(self.reasons)})" if self.count else ""

    def share(self, kept_bytes: int) -> float | None:
        """Return the lost share of all bytes, 0 to 1; None where the size of something lost is unknown."""
        lost = [left["bytes"] for reason, left in self.reasons.items() if reason not in HARMLESS]
        if None in lost:
            return None
        return sum(lost) / max(kept_bytes + sum(lost), 1)

    def check(self, source: str, kept_bytes: int, max_loss: float, hint: str) -> None:
        """Refuse to lose more than ``max_loss`` of the bytes.

        Args:
            source: Name of the corpus, as the user gave it.
            kept_bytes: UTF-8 bytes of the documents.
            max_loss: Share that may be lost.
            hint: Advice on how to read the records; may be empty.

        Raises:
            UserError: More is lost. The message says which parts, and the remedies.
        """
        share = self.share(kept_bytes)
        if (1.0 if share is None else share) <= max_loss:
            return
        remedies = [hint] if hint else []
        remedies += [remedy for reason, remedy in REMEDIES.items() if reason in self.reasons]
        if kept_bytes:
            remedies.append(f"or allow it: max_loss={1 if share is None else _rounded_up(share)}")
        raise UserError(
            f"{source}: {describe_share(share)} of its bytes would be left out, and {max_loss:.2%} may be: "
            f"{'; '.join([describe_left_out(self.reasons), *remedies])}"
        )


def describe_share(share: float | None) -> str:
    """Express a share, which may be unknown, in words."""
    return "an unknown share" if share is None else f"{share:.2%}"


def describe_left_out(reasons: dict[str, Left]) -> str:
    """List each reason with its count, bytes and first names, on one line."""
    return ", ".join(
        f"{left['count']:,} {reason} ({_size(left['bytes'])}: {', '.join(map(one_line, left['first']))}"
        + (", ...)" if left["count"] > len(left["first"]) else ")")
        for reason, left in reasons.items()
    )


def one_line(name: str) -> str:
    """Escape line breaks in the name of a file, and bytes that are not UTF-8."""
    printable = "".join(char if char.isprintable() else repr(char)[1:-1] for char in name)
    return printable.encode(errors="backslashreplace").decode()


def _size(size: int | None) -> str:
    return "size unknown" if size is None else f"{size:,} bytes"


def _rounded_up(share: float) -> str:
    """Round ``share`` up to a multiple of 0.001, or to 1."""
    return "1" if share > 0.99 else f"{int(share * 1000 + 1) / 1000:g}"
