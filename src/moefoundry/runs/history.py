"""``run_dir/history.jsonl``: one line for each start of a run and for each end that it came to by itself.

    {"event": "start", "at": ..., "batch": 0, "from": "", "host": ..., "world_size": 8, "mesh": {...}, "device": ...,
     "versions": {...}, "command": ..., "origins": {...}}
    {"event": "end", "at": ..., "batch": 200, "state": "finished", "reason": ""}

``batch`` is the number of batches trained by then, ``from`` the checkpoint that the run began or went on with, and
``origins`` says where those values of the recipe come from that are no defaults. A run that was killed has no line for
its end. The file is for people and for reports; training does not read it, and goes on where it cannot be written.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from operator import index
from pathlib import Path
from typing import Any

from moefoundry.config import redacted

FILE_NAME = "history.jsonl"


def add_event(run_dir: Path, event: str, **facts: Any) -> None:
    """Append a line, without secrets; a failure is a warning."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps(redacted({"event": event, "at": at, **facts}))
    try:
        with (run_dir / FILE_NAME).open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        print(f"warning: {run_dir / FILE_NAME}: {error.strerror}", file=sys.stderr, flush=True)


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """Read the events of a run, oldest first; empty for runs of earlier releases. Damaged lines are left out."""
    return read_lines(run_dir)[0]


def read_lines(run_dir: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read events, and the numbers, from 1 on, of the damaged lines; a last one without its end is none."""
    try:
        texts = (run_dir / FILE_NAME).read_text(errors="replace").splitlines(keepends=True)
    except OSError:
        return [], []
    events, damaged = [], []
    for number, text in enumerate(texts, 1):
        try:
            event = json.loads(text)
            datetime.fromisoformat(event["at"]).astimezone(UTC).timestamp()
            index(event.get("batch") or 0)  # a whole number
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            damaged += [number] if text.endswith("\n") else []
            continue
        events.append(redacted(event))
    return [event for event in events if event.get("event") in ("start", "end")], damaged


def is_after(event: dict[str, Any], time: str) -> bool:
    """Check whether an event is not before a time in ISO 8601; False where that cannot be read."""
    try:
        return datetime.fromisoformat(event["at"]) >= datetime.fromisoformat(time)
    except (ValueError, TypeError):
        return False


def seconds_in_training(events: list[dict[str, Any]], until: float) -> float | None:
    """Add up the time between starts and ends; where an end is missing, up to the next start at most.

    Args:
        events: History of a run.
        until: Last sign of the run, in seconds since the epoch.
    """
    total, begun = 0.0, None
    for event in events:
        at = datetime.fromisoformat(event["at"]).timestamp()
        if begun is not None and event["event"] == "end":
            total, begun = total + max(0.0, at - begun), None
        elif event["event"] == "start":
            begun = at
    if begun is not None:
        total += max(0.0, until - begun)
    return total if events else None
