"""The steps, in the order of what would be missed most, and how long each may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import Figures


@dataclass(frozen=True)
class Options:
    """What a step is told.

    Attributes:
        out: Where JSON goes.
        device: ``cuda`` or ``cpu``.
        tiny: Sizes that a CPU gets through in seconds; the figures mean nothing.
    """

    out: Path
    device: str
    tiny: bool


@dataclass(frozen=True)
class Step:
    """One process of the run.

    Attributes:
        name: Of the step and of its JSON file.
        seconds: It is stopped after these.
        function: ``module:function`` under this package; called with the figures to fill and :class:`Options`.
        part_seconds: A part that takes longer hangs: it is ended, and the step goes on with the next. Compiling counts:
            a part has up to 20 kernels, each of which takes 0.1 to 1 second; tuned ones take that for each tiling.
        light: Whether its tiny form takes a few seconds on a CPU.
    """

    name: str
    seconds: float
    function: str
    part_seconds: float | None = None
    light: bool = False

    def load(self) -> Callable[[Figures, Options], Any]:
        """Import the step's function, with all that its module's ``preload`` imports."""
        path, _, name = self.function.partition(":")
        module = import_module(f"benchmarks.gpu.{path}")
        if hasattr(module, "preload"):
            module.preload()
        function: Callable[[Figures, Options], Any] = getattr(module, name)
        return function


STEPS = (
    Step("machine", 40, "machine:run", part_seconds=20, light=True),
    Step("tests", 130, "gpu_tests:run"),
    Step("layer", 140, "layer:run", part_seconds=40, light=True),
    Step("peers", 90, "peers:run", part_seconds=40, light=True),
    Step("train", 100, "training:run_bf16", part_seconds=60),
    Step("fp8", 60, "fp8:run", part_seconds=40, light=True),
    Step("train_fp8", 45, "training:run_fp8"),
    Step("router", 30, "router:run", part_seconds=10, light=True),
    Step("attention", 25, "attention:run", part_seconds=15, light=True),
    Step("checkpoint", 30, "checkpoint:run", light=True),
    Step("composer", 90, "composer_run:run"),
)
