"""A table of runs, with the keys in which their recipes differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moefoundry.config.spec import show_leaf
from moefoundry.runs.facts import RunFacts
from moefoundry.runs.metrics import LOSS_KEY, SPEED_KEY
from moefoundry.runs.words import columns, duration, number

NOT_COMPARED = ("run_name", "run_dir", "format_version")
MAX_COLUMNS = 8  # of differing keys in a table for people
MAX_NAMED = 3  # more of them, below it
ABSENT = object()
HEADINGS = ("run", "state", "batch", "loss", "held out", "best", "at", "tokens/s", "time", "saved")


def differing_keys(runs: Sequence[RunFacts]) -> list[str]:
    """List the keys that are not the same in all recipes that could be read, in their order there."""
    recipes = [run.recipe for run in runs if run.recipe]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key not in NOT_COMPARED)
    return [key for key in keys if len({_comparable(recipe.get(key, ABSENT)) for recipe in recipes}) > 1]


def _comparable(value: Any) -> str:
    return "absent" if value is ABSENT else json.dumps(value, default=str)


def shown_value(run: RunFacts, key: str) -> str:
    """Write the value of a key of a run; a dash where its recipe has none."""
    return show_leaf(run.recipe[key]).strip("'") if key in run.recipe else "-"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten each dotted key to its last parts, as many as tell it from the others."""
    shorts = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        shorts[key] = next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
    return shorts


def best_held_out(run: RunFacts) -> tuple[int, float] | None:
    """Find the batch with the lowest held-out loss, and that loss."""
    finite = {batch: loss for batch, loss in run.held_out.items() if loss == loss}
    return min(finite.items(), key=lambda pair: pair[1]) if finite else None


def as_json(run: RunFacts) -> dict[str, Any]:
    """Give the facts of a run as plain values."""
    best = best_held_out(run)
    return {
        "run_dir": str(run.path),
        "run_name": run.name,
        "state": str(run.state),
        "reason": run.reason,
        "batch": run.batch,
        "max_duration": run.max_duration or None,
        "loss": run.number(LOSS_KEY),
        "held_out_loss": list(run.held_out.values())[-1] if run.held_out else None,
        "best_held_out_loss": best[1] if best else None,
        "best_batch": best[0] if best else None,
        "tokens_per_second": run.number(SPEED_KEY),
        "seconds": run.seconds,
        "updated": run.updated or None,
        "checkpoints": run.checkpoints,
        "problems": run.problems,
    }


def table_json(runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Give the table as plain values; each run has its values of the differing keys."""
    keys = differing_keys(runs)
    found = [as_json(run) | {"recipe": {key: run.recipe[key] for key in keys if key in run.recipe}} for run in runs]
    return {"runs": found, "differing_keys": keys}


def runs_table(runs: Sequence[RunFacts], root: Path) -> str:
    """Write the table for people, and below it what is wrong with some of the runs."""
    keys = differing_keys(runs)
    shorts = short_names(keys[:MAX_COLUMNS])
    values = [[shown_value(run, key) if run.recipe else "" for key in shorts] for run in runs]
    rows = [[*HEADINGS, *shorts.values()], *([*_cells(run, root), *own] for run, own in zip(runs, values, strict=True))]
    lines = columns(rows, [False, False, *[True] * 7, False, *[False] * len(shorts)])
    if rest := keys[MAX_COLUMNS:]:
        named = ", ".join(rest[:MAX_NAMED])
        more = f" and {len(rest) - MAX_NAMED} more; --json has all" if len(rest) > MAX_NAMED else ""
        lines.append(f"recipes also differ in {named}{more}")
    for run in runs:
        notes = [*([run.reason] if run.reason and run.state != "running" else []), *run.problems]
        lines += [f"{_place(run, root)}: {note}" for note in notes]
    return "\n".join(lines)


def _place(run: RunFacts, root: Path) -> str:
    return str(run.path.relative_to(root)) if run.path != root else str(run.path)


def _cells(run: RunFacts, root: Path) -> list[str]:
    last, best = next(reversed(run.held_out.values()), None), best_held_out(run)
    return [
        _place(run, root),
        str(run.state),
        run.progress,
        number(run.number(LOSS_KEY), ".4f"),
        number(last, ".4f"),
        number(best[1] if best else None, ".4f"),
        str(best[0]) if best else "",
        number(run.number(SPEED_KEY), ",.0f"),
        duration(run.seconds),
        f"ba{run.checkpoints[-1]}" if run.checkpoints else "",
    ]
