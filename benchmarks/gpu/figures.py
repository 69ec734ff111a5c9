"""Figures of one step, in a JSON file that is whole after every figure.

    {"part": {"state": "done", "figure": 1.0, ...}, ...}

``state`` is ``running`` until a part has ended; then ``done``, ``failed`` (with ``error``) or ``not run`` (with
``reason``). Parts that the file has already are not run again: a step that died can be started once more.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEVICE_LOST = 3
"""Exit code of a step whose device takes no more work; a new process may have better luck with the parts left."""


class NotRunError(Exception):
    """A part cannot be measured here; the message says why."""


class Figures:
    """The parts of one step.

    Args:
        path: The JSON file; parts that are in it are kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def run(self, name: str, function: Callable[..., Any], *args: Any) -> None:
        """Measure one part: ``function(part, *args)``, with ``part`` a :class:`Part` to put figures in."""
        if name in self.parts:
            return
        part = Part(self, name)
        try:
            function(part, *args)
            part.put(state="done")
        except NotRunError as error:
            part.put(state="not run", reason=str(error))
        except Exception as error:
            where = traceback.format_exc(limit=-4).splitlines()[1:-1]
            message = f"{type(error).__name__}: {error}"[:1000]
            part.put(state="failed", error=message, where=[line.strip() for line in where])
        free_device(self)

    def write(self) -> None:
        write_json(self.path, self.parts)


class Part:
    """One part of a step."""

    def __init__(self, figures: Figures, name: str) -> None:
        self._figures, self.name = figures, name
        figures.parts[name] = {}
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


def free_device(figures: Figures) -> None:
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
        figures.write()
        os._exit(DEVICE_LOST)
