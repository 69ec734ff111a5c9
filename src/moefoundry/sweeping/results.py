"""Results of a sweep, read from its runs: a table, a CSV file, and plots with a fitted curve."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moefoundry.config import load_recipe
from moefoundry.config.curriculum import batches_until, stages_of
from moefoundry.runs.metrics import EVAL_KEY, FILE_NAME, LOSS_KEY, SPEED_KEY, read_metrics
from moefoundry.sweeping.run import diverged_at, is_done, is_pruned
from moefoundry.sweeping.trials import Sweep, Trial, write_whole

VIOLATION = "moe/max_violation"
LAST = 10
"""Batches at the end of a run over which losses and balance are averaged."""

CSV_FILE, PLOT_FILE = "results.csv", "results.png"
PANELS = {"active": "active parameters", "total": "parameters", "flops": "FLOPs of the run"}


@dataclass(frozen=True)
class Result:
    """One trial as its files tell it. Numbers are None where there are none yet.

    Attributes:
        point: Text of each swept key.
        state: ``done``, ``pruned``, ``diverged``, ``unfinished`` or ``invalid``.
        held_out: Last held-out loss, nats a token.
        train: Mean training loss of the last batches, nats a token.
        violation: Mean over the last batches of the largest load of an expert over its even share, less 1.
        tokens_per_second: Mean over the last batches, all ranks.
        batches: Batches trained.
        tokens: Tokens trained.
        total: Parameters.
        active: Parameters that compute one token.
        flops: FLOPs of the model in all batches, forward and backward.
        diverged_at: Batch whose loss or gradients were not finite.
        problem: Reason why the trial is invalid.
    """

    point: dict[str, str]
    state: str
    held_out: float | None = None
    train: float | None = None
    violation: float | None = None
    tokens_per_second: float | None = None
    batches: int | None = None
    tokens: int | None = None
    total: int | None = None
    active: int | None = None
    flops: float | None = None
    diverged_at: int | None = None
    problem: str = ""

    @property
    def loss(self) -> float | None:
        """The held-out loss, or the training loss where nothing is held out; None of a trial that has diverged."""
        if self.diverged_at is not None:
            return None
        return self.train if self.held_out is None else self.held_out


def results_of(sweep: Sweep, trials: Sequence[Trial]) -> list[Result]:
    """Read the results of all trials, those with the lowest loss first."""
    results = [result_of(sweep, trial) for trial in trials]
    return sorted(results, key=lambda each: (each.loss is None, each.loss or 0.0, each.state))


def result_of(sweep: Sweep, trial: Trial) -> Result:
    """Read the result of one trial."""
    if trial.problem:
        return Result(trial.point, "invalid", problem=trial.problem)
    lines = metrics_of(trial)
    diverged = diverged_at(trial)
    state = "pruned" if is_pruned(trial) else "done" if is_done(trial) else "unfinished"
    state = state if diverged is None else "diverged"
    if not lines:
        return Result(trial.point, state, diverged_at=diverged)
    from moefoundry.model.transformer import meta_model
    from moefoundry.planning.describe import parameter_counts
    from moefoundry.planning.work import flops_per_token

    recipe = load_recipe(sweep.recipe, trial.overrides, world_size=sweep.ranks)
    model = meta_model(recipe.model)
    counts, batches = parameter_counts(model), lines[-1]["batch"]
    stages = stages_of(recipe)
    numbers = zip(stages, batches_until(stages, f"{batches}ba") or [], strict=True)
    tokens = [(stage.seq_len, number * stage.tokens_per_batch) for stage, number in numbers]
    held_out = [line[EVAL_KEY] for line in lines if EVAL_KEY in line]
    return Result(
        trial.point,
        state,
        held_out=held_out[-1] if held_out else None,
        train=_mean(lines, LOSS_KEY),
        violation=_mean(lines, VIOLATION),
        tokens_per_second=_mean(lines, SPEED_KEY),
        batches=batches,
        tokens=sum(number for _, number in tokens),
        total=counts.total,
        active=counts.active,
        flops=sum(number * flops_per_token(model, seq_len) for seq_len, number in tokens),
        diverged_at=diverged,
    )


def metrics_of(trial: Trial) -> list[dict[str, Any]]:
    """Read the metrics of a trial's run; none before its first batch."""
    return read_metrics(trial.run_dir) if (trial.run_dir / FILE_NAME).exists() else []


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines[-LAST:] if name in line]
    return sum(values) / len(values) if values else None


def write_csv(results: Sequence[Result], directory: Path) -> None:
    """Write one row a trial, with a column for each swept key and each number."""
    keys = list(dict.fromkeys(key for each in results for key in each.point))
    numbers = [field.name for field in fields(Result) if field.name != "point"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*keys, *numbers])
    writer.writeheader()
    for each in results:
        row = asdict(each)
        writer.writerow(row.pop("point") | {name: "" if value is None else value for name, value in row.items()})
    write_whole(directory / CSV_FILE, text.getvalue())


def power_law(sizes: Sequence[float], losses: Sequence[float]) -> tuple[float, float] | None:
    """Fit ``loss = a * size ** b`` by least squares of the logarithms; None with fewer than three sizes."""
    if len(set(sizes)) < 3:
        return None
    xs, ys = [math.log(size) for size in sizes], [math.log(loss) for loss in losses]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / sum((x - mean_x) ** 2 for x in xs)
    return math.exp(mean_y - slope * mean_x), slope


def write_plot(results: Sequence[Result], directory: Path) -> None:
    """Draw the loss against active and total parameters and FLOPs, each with its power law, and the balance."""
    done = [each for each in results if each.loss is not None and each.loss > 0]
    if not done:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    axes = figure.subplots(1, len(PANELS) + 1)
    for axis, (name, label) in zip(axes, PANELS.items(), strict=False):
        sizes, losses = [float(getattr(each, name)) for each in done], [float(each.loss or 0) for each in done]
        axis.scatter(sizes, losses, s=18)
        if (fit := power_law(sizes, losses)) is not None:
            ends = [min(sizes), max(sizes)]
            axis.plot(ends, [fit[0] * size ** fit[1] for size in ends], label=f"{fit[0]:.3g} x^{fit[1]:.3f}")
            axis.legend()
        axis.set(xscale="log", xlabel=label, ylabel="loss, nats a token")
    balanced = [each for each in done if each.violation is not None]
    axes[-1].scatter([each.violation for each in balanced], [each.loss for each in balanced], s=18)
    axes[-1].set(xlabel="largest violation of balance", ylabel="loss, nats a token")
    FigureCanvasAgg(figure).print_png(directory / PLOT_FILE)


def table(results: Sequence[Result]) -> str:
    """Format the results as text; invalid trials are listed below with their reasons."""
    from moefoundry.planning.table import columns

    keys = list(dict.fromkeys(key for each in results for key in each.point))
    head = (*(key.rpartition(".")[2] for key in keys), "state", "held-out", "train", "violation", "tokens/s", "active")
    rows = [
        (*(each.point.get(key, "") for key in keys), _state(each), *map(_short, _numbers(each)))
        for each in results
        if each.state != "invalid"
    ]
    lines = columns([head, *rows]) if rows else []
    invalid = [each for each in results if each.state == "invalid"]
    if invalid:
        lines += [*([""] if lines else []), f"{len(invalid)} combinations are not valid:"]
        for each in invalid:
            lines.append(f"  {' '.join(f'{key}={text}' for key, text in each.point.items())}: {each.problem}")
    return "\n".join(lines)


def _state(each: Result) -> str:
    return each.state if each.diverged_at is None else f"{each.state} at {each.diverged_at}"


def _numbers(each: Result) -> tuple[float | None, ...]:
    return each.held_out, each.train, each.violation, each.tokens_per_second, each.active


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4f}"
