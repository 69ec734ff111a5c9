"""Answers as text."""

from __future__ import annotations

from moefoundry.verify.checks import Answer
from moefoundry.verify.result import Result

VERDICTS = {True: "ok", False: "FAILED", None: "-"}


def lines_of(answer: Answer) -> list[str]:
    """Format an answer: its name and time, then a line for each result."""
    return [f"{answer.check} ({answer.seconds:.0f} s)", *(f"  {_line(result)}" for result in answer.results)]


def _line(result: Result) -> str:
    figure = ""
    if result.figure is not None:
        figure = f"{result.figure:.3g}" + ("" if result.bound is None else f" of {result.bound:.3g}")
    detail = f"  {result.detail}" if result.detail else ""
    return f"{VERDICTS[result.passed]:<6}  {result.claim:<56}  {figure:<20}{detail}".rstrip()
