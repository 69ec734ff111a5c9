"""Results of checks, and the first tensor in which two runs differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SHARE = 1e-3
"""Tensors with a smaller share of the norm of all are compared by that share of it: their own is all rounding."""


@dataclass(frozen=True)
class Result:
    """Answer of a check to one question.

    Attributes:
        claim: What holds, in words.
        passed: True if it does; None where the question does not apply to the recipe, or a figure is only told.
        figure: What was measured; None where nothing has a size.
        bound: Largest figure that passes.
        detail: The first difference, or what was compared, or the reason why the question does not apply.
    """

    claim: str
    passed: bool | None
    figure: float | None = None
    bound: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Difference:
    """Difference of two sets of tensors.

    Attributes:
        name: The first tensor that differs by more than the bound, or else the one that differs most.
        size: Its relative difference.
        worst: The largest relative difference.
    """

    name: str
    size: float
    worst: float


def within(claim: str, found: Difference, bound: float, detail: str = "", where: str = "") -> Result:
    """Make the result of a comparison.

    Args:
        claim: As in :class:`Result`.
        found: The difference.
        bound: Largest relative difference that passes.
        detail: What was compared, for a result that passes.
        where: The run that differs, for one that does not.
    """
    passed = found.worst <= bound
    first = f"first in {located(found.name)}, by {found.size:.1e}"
    return Result(claim, passed, found.worst, bound, detail if passed else f"{where}: {first}" if where else first)


def difference(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> Difference:
    """Compare tensors by their relative difference in the L2 norm, in the order of ``expected``.

    Args:
        got: The tensors; another set of names differs infinitely.
        expected: What they should be.
        bound: Relative difference from which a tensor counts as the first.
    """
    for name in [*expected, *got]:
        if name not in got or name not in expected or got[name].shape != expected[name].shape:
            return Difference(name, float("inf"), float("inf"))
    if not expected:
        return Difference("nothing", 0.0, 0.0)
    floor = SMALLEST_SHARE * torch.stack([tensor.double().norm() for tensor in expected.values()]).norm().item()
    sizes = {name: relative(got[name], tensor, floor) for name, tensor in expected.items()}
    worst = max(sizes, key=sizes.__getitem__)
    first = next((name for name, size in sizes.items() if not size <= bound), worst)
    return Difference(first, sizes[first], sizes[worst])


def relative(got: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Divide the norm of a difference by that of what is expected, or by ``floor``; not finite is infinite."""
    size = (got.double() - expected.double()).norm().item()
    if size == 0:
        return 0.0
    share = size / max(expected.double().norm().item(), floor, 1e-30)
    return share if share == share else float("inf")


def located(name: str) -> str:
    """Say in which layer a tensor is."""
    if match := re.search(r"(layers|mtp)\.(\d+)\.", name):
        return f"{name} ({'block' if match[1] == 'layers' else 'prediction module'} {match[2]})"
    return name
