"""``moefoundry migrate``: another project's recipe becomes one of this project. Heavy imports happen when it runs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moefoundry.cli.arguments import json_option, local_path, output_option, positive


@click.command("migrate")
@click.argument("recipe", type=local_path, metavar="OLD", help="A YAML file of LLM Foundry, Composer or axolotl.")
@output_option("NEW", "File to write; an existing one is never replaced.")
@click.option("--world-size", type=positive, default="1", metavar="N", help="Ranks, for axolotl's batch (default 1).")
@json_option
def command(recipe: Path, output: Path, world_size: int, as_json: bool) -> None:
    """Turn a recipe of LLM Foundry, Composer or axolotl into one of this project, and account for every key.

    Tells which keys have a new name, which values changed, where defaults differ, what has no equal and why, and what
    is still to fill in. Keys that are to fill in aside, the new recipe is valid. An MPT that cannot be expressed here
    stays a recipe of LLM Foundry, with our experts in place of others: `moefoundry train` runs it. Secrets are neither
    shown nor copied.
    """
    from moefoundry.config.errors import UserError
    from moefoundry.migration.migrate import migrate_recipe

    found = migrate_recipe(recipe, world_size)
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(found.text)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    if as_json:
        print(json.dumps(found.as_dict() | {"output": str(output)}, indent=2, default=str))
    else:
        print(found)
        print(f"{output}: check it with: moefoundry validate {output}")
