"""``moefoundry runs``: a table of runs, from their files alone. Nothing heavy is imported."""

from __future__ import annotations

import json
from pathlib import Path

import click

from moefoundry.cli.arguments import json_option, local_path


@click.command("runs")
@click.argument("directory", type=local_path, metavar="DIR", help="Directory that holds runs, or a run.")
@json_option
def command(directory: Path, as_json: bool) -> None:
    """Print one line for each run at and below DIR: its state, its losses, and the keys in which recipes differ.

    A run is `running` while its lease is held; `finished`, `stopped` (by a signal) or `failed` as it has noted itself;
    `stale` where it was killed. `held out` is the last held-out loss, `best` the lowest and `at` its batch; `saved` is
    the newest checkpoint. What cannot be read is named below the table.
    """
    from moefoundry.config.errors import UserError
    from moefoundry.runs.facts import find_runs, read_facts
    from moefoundry.runs.table import runs_table, table_json

    paths = find_runs(directory)
    if not paths:
        raise UserError(f"{directory}: no runs there")
    runs = [read_facts(path) for path in paths]
    print(json.dumps(table_json(runs), indent=2) if as_json else runs_table(runs, directory))
