"""Figures of one step, in a JSON file that is whole after every figure.

    {"part": {"state": "done", "figure": 1.0, ...}, ...}

``state`` is ``running`` until a part has ended; then ``done``, ``failed`` (with ``error``) or ``not run`` (with
``reason``). Parts that the file has already are not run again: a step that died can be started once more. A part that
ended its process, by a kernel that hangs or makes the device unusable, is ``lost``; no other of its ``kind`` is run.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DEVICE_LOST = 3
"""Exit code of a step whose device takes no more work; a new process may have better luck with the parts left."""


STACK_LINES = 40
"""Kept of the stacks of a part that hung."""


class NotRunError(Exception):
    """A part cannot be measured here; the message says why."""


class Figures:
    """The parts of one step.

    Args:
        path: The JSON file; parts that are in it are kept.
        part_seconds: A part that takes longer ends the process, with the stacks of its threads in
            :func:`file_of_stacks`; None lets it.
    """

    def __init__(self, path: Path, part_seconds: float | None = None) -> None:
        self.path, self.part_seconds = path, part_seconds
        self.parts = parts_of(path)
        self.lost = {part.get("kind") for part in self.parts.values() if part.get("lost")} - {None}

    def run(self, name: str, function: Callable[..., Any], *args: Any, kind: str | None = None) -> None:
        """Measure one part: ``function(part, *args)``, with ``part`` a :class:`Part` to put figures in.

        ``kind`` names what parts have in common that may hang, such as a backend.
        """
        if name in self.parts:
            return
        part = Part(self, name, kind)
        if kind in self.lost:
            part.put(state="not run", reason=f"another part with {kind} ended its process")
            return
        with self._limited():
            try:
                function(part, *args)
                part.put(state="done")
            except NotRunError as error:
                part.put(state="not run", reason=str(error))
            except Exception as error:
                where = traceback.format_exc(limit=-4).splitlines()[1:-1]
                message = f"{type(error).__name__}: {error}"[:1000]
                part.put(state="failed", error=message, where=[line.strip() for line in where])
            free_device(part)

    @contextmanager
    def _limited(self) -> Iterator[None]:
        if self.part_seconds is None:
            yield
            return
        with file_of_stacks(self.path).open("w") as stacks:
            faulthandler.dump_traceback_later(self.part_seconds, exit=True, file=stacks)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()

    def write(self) -> None:
        write_json(self.path, self.parts)


def parts_of(path: Path) -> dict[str, dict[str, Any]]:
    """Read a step's file; nothing where there is none."""
    parts: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    return parts


def parts_ended(path: Path) -> int:
    return sum(part["state"] != "running" for part in parts_of(path).values())


def end_running_part(path: Path, why: str) -> None:
    """Say of the part that was running that its process ended in it; it is not tried again."""
    parts, stacks = parts_of(path), file_of_stacks(path)
    lines = stacks.read_text().splitlines() if stacks.exists() else []
    for part in parts.values():
        if part["state"] == "running":
            part.update(state="failed", error=why, lost=True)
            if lines:  # "Timeout (0:00:30)!", then the threads
                part.update(error=f"it hung: {lines[0]}", where=lines[1:STACK_LINES])
    if parts:
        write_json(path, parts)


def file_of_stacks(path: Path) -> Path:
    """Where a step with its figures in ``path`` writes what its threads do when a part takes too long."""
    return path.with_suffix(".stacks")


class Part:
    """One part of a step."""

    def __init__(self, figures: Figures, name: str, kind: str | None) -> None:
        self._figures, self.name = figures, name
        figures.parts[name] = {} if kind is None else {"kind": kind}
        self.put(state="running")

    def put(self, **figures: Any) -> None:
        """Add figures and write the file."""
        self._figures.parts[self.name].update(figures)
        self._figures.write()
        shown = {key: value for key, value in figures.items() if key not in ("kernels_us", "where")}
        print(f"{self.name}: {json.dumps(shown, default=str)[:300]}", flush=True)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file, whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(content, indent=1, default=str))
    beside.replace(path)


def free_device(part: Part) -> None:
    """Give memory back after a part; end the process if the device answers no more."""
    import torch

    if not torch.cuda.is_initialized():
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        print(f"the device takes no more work: {error}", file=sys.stderr, flush=True)
        part.put(lost=True)
        os._exit(DEVICE_LOST)
