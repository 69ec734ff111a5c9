"""``moefoundry estimate``: time and length of a run before it is launched. Heavy imports happen when it runs."""

from __future__ import annotations

import json

import click

from moefoundry.cli.arguments import RECIPE_COMMAND, Number, json_option, num_ranks, recipe_arguments
from moefoundry.cli.exits import EXIT_NO

gpu_option = click.option(
    "--gpu",
    default="h100",
    metavar="NAME",
    help="a100, h100 (default), h200, b200, gb200, mi300x, or a YAML file of its numbers (docs/plan.md).",
)


@click.command("estimate", context_settings=RECIPE_COMMAND)
@recipe_arguments
@click.option("--world-size", type=num_ranks, required=True, metavar="N", help="Number of devices.")
@gpu_option
@click.option(
    "--price",
    type=Number(0, 1e6, min_open=True),
    metavar="X",
    help="Price of a device's hour, for the cost of the run.",
)
@click.option("--exit-code", is_flag=True, help="End with exit status 1 if it does not fit.")
@json_option
def command(
    arguments: list[str], world_size: int, gpu: str, price: float | None, exit_code: bool, as_json: bool
) -> int:
    """Print what a plan says, and the time of a step, tokens a second, MFU and the length of the run.

    Memory and traffic are those of `moefoundry plan`. Times are a roofline with one set of constants; docs/plan.md
    compares them with published runs. Expect them to be off by a quarter, sometimes by half.
    """
    from moefoundry.config import load_recipe, split_arguments

    path, overrides = split_arguments(arguments)
    recipe = load_recipe(path, overrides, world_size=world_size)

    from moefoundry.planning.devices import accelerator
    from moefoundry.planning.estimate import estimate
    from moefoundry.planning.estimate_table import estimate_table
    from moefoundry.planning.micro_batch import fitted

    device = accelerator(gpu)
    found = estimate(fitted(recipe, world_size, device.linked_devices, device.memory_gb), world_size, device)
    print(json.dumps(found.to_json(), indent=2) if as_json else estimate_table(found, price))
    return EXIT_NO if exit_code and not found.plan.fits(device.memory_gb) else 0
