"""``moefoundry sweep``: the runs of a recipe over values of its keys."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moefoundry.cli.arguments import (
    RECIPE_COMMAND,
    Number,
    json_option,
    num_ranks,
    options_named,
    positive,
    recipe_arguments,
)
from moefoundry.cli.exits import EXIT_NO

if TYPE_CHECKING:
    from moefoundry.data.options import Part
    from moefoundry.sweeping.trials import Sweep, Trial

SAMPLERS, PRUNERS = ("tpe", "random", "gp"), ("none", "median", "hyperband")


@click.command("sweep", context_settings=RECIPE_COMMAND)
@recipe_arguments
@click.option("-o", "--output", required=True, metavar="DIR", help="Directory of the sweep.")
@click.option("--random", "draws", type=positive, metavar="N", help="Draw N combinations instead of trying all.")
@click.option("--optuna", "searched", type=positive, metavar="N", help="Search with N trials of Optuna.")
@click.option("--sampler", type=click.Choice(SAMPLERS), default="tpe", help="Sampler of --optuna (default tpe).")
@click.option("--pruner", type=click.Choice(PRUNERS), default="median", help="Pruner of --optuna (default median).")
@click.option("--seed", type=int, default=17, metavar="S", help="Seed of --random and --optuna (default 17).")
@click.option("--zip", "zipped", multiple=True, metavar="KEY,KEY", help="Keys that change together.")
@click.option("--tokens", type=positive, metavar="N", help="Train every run for as many tokens.")
@click.option("--flops", type=Number(min=1), metavar="X", help="Train every run for as many FLOPs.")
@click.option("--ranks", type=num_ranks, default="1", metavar="N", help="Ranks of a run (default 1).")
@click.option("--parallel", type=positive, default="1", metavar="N", help="Runs side by side (default 1).")
@click.option("--part", "part_text", metavar="I/N", help="Run one part of N, as a task of an array job.")
@click.option("--dry-run", is_flag=True, help="Print the command of each run, and run none.")
@json_option
def command(
    arguments: list[str],
    output: str,
    draws: int | None,
    searched: int | None,
    sampler: str,
    pruner: str,
    seed: int,
    zipped: tuple[str, ...],
    tokens: int | None,
    flops: float | None,
    ranks: int,
    parallel: int,
    part_text: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Train a recipe with every combination of the values that its overrides list, and compare the results.

    A key gets several values by commas, model.moe.top_k=1,2,4, or as a range, 'optimizer.lr=1e-4..1e-2 log 5' (even in
    the logarithm; without "log" even; for --random and --optuna the number of values is left out). Other overrides hold
    for all.

    The same command goes on after a kill: finished runs are kept, begun ones resume. Combinations that do not validate
    are left out, and listed with the reason. DIR holds runs/, results.csv and results.png; the table is sorted by
    held-out loss. Exit status 1 says that a run failed; its log is DIR/runs/NAME/log.txt.
    """
    from moefoundry.config import UserError, split_arguments
    from moefoundry.sweeping.axes import MAX_POINTS, drawn, grid, read_axes
    from moefoundry.sweeping.results import results_of, table, write_csv, write_plot
    from moefoundry.sweeping.run import Stopped, command_of, run_all
    from moefoundry.sweeping.trials import Budget, Sweep, part_of

    if searched and (draws or part_text or dry_run):
        raise click.UsageError("--optuna goes with neither --random, --part nor --dry-run")
    if tokens and flops:
        raise click.UsageError("--tokens and --flops are two lengths of a run; give one")
    if max(draws or 0, searched or 0, parallel) > MAX_POINTS:
        raise click.UsageError(f"--random, --optuna and --parallel are at most {MAX_POINTS:,}")
    part = _part(part_text)
    path, overrides = split_arguments(arguments)
    axes, same = read_axes(overrides, zipped)
    if not axes:
        raise UserError("no key has several values; write model.moe.top_k=1,2,4")
    sweep = Sweep(Path(output), path, tuple(same), Budget(tokens, flops), ranks)

    def report(trial: Trial, word: str) -> None:
        print(f"{trial.label}: {word}", file=sys.stderr, flush=True)

    def start(trial: Trial) -> list[str]:
        return command_of(path, trial, ranks)

    try:
        if searched:
            from moefoundry.sweeping.search import search

            sweep.remember()
            trials, any_failed = search(sweep, axes, searched, (sampler, pruner, seed), start, parallel, report)
        else:
            trials = sweep.trials(drawn(axes, draws, seed) if draws else grid(axes))
            chosen = trials if part is None else part_of(trials, part)
            if dry_run:
                _print_commands(path, chosen, ranks)
                return 0
            _announce(sweep, trials, chosen)
            any_failed = bool(run_all(chosen, start, parallel, report))
    except Stopped as stopped:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + stopped.number
    results = results_of(sweep, trials)
    write_csv(results, sweep.directory)
    write_plot(results, sweep.directory)
    print(json.dumps([asdict(each) for each in results], indent=2) if as_json else table(results))
    return EXIT_NO if any_failed else 0


def _part(text: str | None) -> Part | None:
    if text is None:
        return None
    from moefoundry.data.options import Part

    with options_named({"part": "--part"}):
        return Part.named(text)


def _announce(sweep: Sweep, trials: list[Trial], chosen: list[Trial]) -> None:
    """Say how much there is to do, and keep what all runs have in common."""
    from moefoundry.config import UserError
    from moefoundry.sweeping.run import is_done

    problems = [trial.problem for trial in trials if trial.problem]
    if len(problems) == len(trials):
        raise UserError(f"none of the {len(trials)} combinations is valid; the first: {problems[0]}")
    sweep.remember()
    ahead = sum(not trial.problem and not is_done(trial) for trial in chosen)
    print(f"{len(chosen)} combinations, {ahead} to run, {len(problems)} not valid", file=sys.stderr, flush=True)


def _print_commands(path: str | None, trials: list[Trial], ranks: int) -> None:
    from moefoundry.sweeping.run import command_of

    for trial in trials:
        if trial.problem:
            print(f"# {trial.label}: {trial.problem}")
        else:
            print(shlex.join(command_of(path, trial, ranks)))
