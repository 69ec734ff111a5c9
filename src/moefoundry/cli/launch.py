"""``moefoundry launch``: hand a recipe to a scheduler. Heavy imports happen when it runs."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moefoundry.cli.arguments import RECIPE_COMMAND, json_option, local_path, positive, recipe_arguments

if TYPE_CHECKING:
    from moefoundry.config import Recipe

NAMES = ("slurm", "skypilot", "k8s", "ray", "local")


@click.command("launch", context_settings=RECIPE_COMMAND)
@recipe_arguments
@click.option("--on", "scheduler", type=click.Choice(NAMES), required=True, help="Scheduler that starts the run.")
@click.option("--nodes", type=positive, metavar="N", help="Machines; the same as launch.nodes=N.")
@click.option("--dry-run", is_flag=True, help="Write the files, submit nothing, and print the command that would.")
@click.option(
    "-o",
    "--output",
    type=local_path,
    metavar="DIR",
    help="Directory of the files (default launches/RUN-SCHEDULER-DIGEST).",
)
@json_option
def command(
    arguments: list[str], scheduler: str, nodes: int | None, dry_run: bool, output: Path | None, as_json: bool
) -> int:
    """Check a recipe for the ranks of its launch, write what a scheduler needs, and submit it.

    Machines, limits, image and variables are keys of `launch` in the recipe (docs/launching.md), which KEY=VALUE
    changes, too. Each scheduler gets a script or manifest of its own kind, and the recipe with every key resolved. The
    run goes on by itself after a preemption or a time limit: autoresume is on.

    Nothing is submitted where the recipe, or its data if they are here, would be refused by training.
    """
    from moefoundry.config import load_recipe, split_arguments
    from moefoundry.launching.launch import become, make_launch, submit, world_size, write

    if as_json and scheduler == "local" and not dry_run:
        raise click.UsageError("--json goes with --on local only in a --dry-run: the output is that of training")
    path, overrides = split_arguments(arguments)
    overrides += ["autoresume=true", *([f"launch.nodes={nodes}"] if nodes else [])]
    ranks = world_size(load_recipe(path, overrides).launch)
    recipe = load_recipe(path, overrides, world_size=ranks)
    shown = (*arguments, "--on", scheduler, *(["--nodes", str(nodes)] if nodes else []))
    launch = make_launch(recipe, scheduler, shown, output)
    notes = [*launch.notes, *_check_data(recipe, ranks)]
    write(launch)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    said = "" if dry_run or scheduler == "local" else submit(launch)
    if as_json:
        found = {"directory": str(launch.directory), "files": [*launch.files], "command": launch.command}
        print(json.dumps({**found, "ranks": ranks, "submitted": not dry_run, "output": said, "notes": notes}, indent=2))
    else:
        print(f"{ranks} ranks; {', '.join(launch.files)} in {launch.directory}")
        print(said if said else shlex.join(launch.command))
    if scheduler == "local" and not dry_run:
        become(launch)
    return 0


def _check_data(recipe: Recipe, ranks: int) -> list[str]:
    """Refuse what training would refuse, and say which data are not here; with another directory, nothing is known."""
    from moefoundry.cli.validate import check_files, check_names

    check_names(recipe)
    workdir = recipe.launch.workdir if recipe.launch else None
    if workdir is not None and Path(workdir).absolute() != Path.cwd():
        return []
    return [str(problem) for problem in check_files(recipe, ranks)]
