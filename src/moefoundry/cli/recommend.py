"""``moefoundry recommend``: mesh, micro-batch, checkpointing, chunks and precision that are fastest, by estimate."""

from __future__ import annotations

import json

import click

from moefoundry.cli.arguments import RECIPE_COMMAND, json_option, num_ranks, positive, recipe_arguments
from moefoundry.cli.estimate import gpu_option
from moefoundry.cli.exits import EXIT_NO


@click.command("recommend", context_settings=RECIPE_COMMAND)
@recipe_arguments
@click.option("--world-size", type=num_ranks, required=True, metavar="N", help="Number of devices.")
@gpu_option
@click.option("--count", type=positive, default="3", metavar="K", help="Number of results (default 3).")
@json_option
def command(arguments: list[str], world_size: int, gpu: str, count: int, as_json: bool) -> int:
    """Search for the fastest ways to train a recipe on N devices, and for the smallest change that makes it fit.

    Every mesh of N devices is tried with each activation checkpointing, with micro-batches of 1, 2, 4, ... sequences,
    where experts are divided with exchanges in 1, 2, 4 and 8 chunks, and with FP8 and BF16 where the device has them.
    The global batch and the model stay as they are, and so do the losses; a faster one with another precision is shown
    apart. Overrides to add to the command are printed.

    Times and memory are those of `moefoundry estimate`; 8% of the memory is left free. Exit status 1 says that nothing
    fits.
    """
    from moefoundry.config import load_recipe, split_arguments

    path, overrides = split_arguments(arguments)
    recipe = load_recipe(path, overrides)

    from moefoundry.planning.choose import choose
    from moefoundry.planning.choose_table import choose_table
    from moefoundry.planning.devices import accelerator

    device = accelerator(gpu)
    choice = choose(recipe, world_size, device, count)
    print(json.dumps(choice.to_json(), indent=2) if as_json else choose_table(choice, world_size, device))
    return 0 if choice.best or choice.smallest else EXIT_NO
