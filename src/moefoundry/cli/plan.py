"""``moefoundry plan``: a recipe at any number of ranks, on one CPU. Heavy imports happen when it runs."""

from __future__ import annotations

import json

import click

from moefoundry.cli.arguments import RECIPE_COMMAND, json_option, num_ranks, positive, recipe_arguments
from moefoundry.cli.exits import EXIT_NO


@click.command("plan", context_settings=RECIPE_COMMAND)
@recipe_arguments
@click.option("--world-size", type=num_ranks, required=True, metavar="N", help="Number of ranks.")
@click.option("--gpus-per-node", type=positive, default="8", metavar="N", help="Ranks of a node (default 8).")
@click.option(
    "--memory-gb", type=positive, default="80", metavar="GB", help="Memory of a device, in 1e9 bytes (default 80)."
)
@click.option("--exit-code", is_flag=True, help="End with exit status 1 if it does not fit.")
@json_option
def command(
    arguments: list[str], world_size: int, gpus_per_node: int, memory_gb: int, exit_code: bool, as_json: bool
) -> int:
    """Print the memory of a rank and the bytes that it sends, by collective and mesh axis.

    Nothing is built: parameters and shards follow from the recipe, as training would have them. docs/plan.md says which
    figures are exact. With --json sizes are in bytes, and memory.fits tells whether the recipe fits.
    """
    from moefoundry.config import load_recipe, split_arguments

    path, overrides = split_arguments(arguments)
    recipe = load_recipe(path, overrides, world_size=world_size)

    from moefoundry.conversion.families import exports_as
    from moefoundry.planning.micro_batch import fitted
    from moefoundry.planning.plan import make_plan
    from moefoundry.planning.table import plan_table

    plan = make_plan(fitted(recipe, world_size, gpus_per_node, memory_gb), world_size, gpus_per_node)
    export = exports_as(recipe.model)
    if as_json:
        print(json.dumps({**plan.to_json(memory_gb), "export": export}, indent=2))
    else:
        print(f"{plan_table(plan, memory_gb)}\nexport: {export}")
    return EXIT_NO if exit_code and not plan.fits(memory_gb) else 0
