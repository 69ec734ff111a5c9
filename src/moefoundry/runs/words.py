"""Numbers of a run as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LABELS = (
    ("dpo", "loss/train/dpo", ".4f"),
    ("margin", "preference/margin", ".4f"),
    ("accuracy", "preference/accuracy", ".2f"),
    ("loss", "loss/train/lm", ".4f"),
    ("balance", "loss/train/balance", ".4f"),
    ("z", "loss/train/z", ".4f"),
    ("mtp", "loss/train/mtp", ".4f"),
    ("grad norm", "grad_norm", ".3f"),
    ("lr", "lr", ".2e"),
    ("tokens/s", "throughput/tokens_per_sec", ",.0f"),
    ("max violation", "moe/max_violation", ".2f"),
)


def shown_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """Write the metrics that a line of the console has, as ``loss 6.1234``."""
    dpo = "loss/train/dpo" in metrics
    return [
        f"{'lm' if dpo and label == 'loss' else label} {metrics[name]:{spec}}"
        for label, name, spec in LABELS
        if name in metrics
    ]


def duration(seconds: float | None) -> str:
    """Write a time as ``3 d 4 h``, ``2 h 05 min``, ``4 min 03 s`` or ``12 s``; an empty text for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def number(value: float | None, spec: str) -> str:
    """Write a number; an empty text for None."""
    return "" if value is None else format(value, spec)


def columns(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Align the cells of a table; ``right`` says which columns are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]
