"""``moefoundry replay``: repeat the step that was not finite. Heavy imports happen when it runs."""

from __future__ import annotations

import os
from pathlib import Path

import click

from moefoundry.cli.world import join_world


@click.command("replay")
@click.argument("run", type=click.Path(path_type=Path), metavar="RUN")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def command(run: Path, overrides: tuple[str, ...]) -> int:
    """Repeat the step at which the run in directory RUN was not finite, and say where that began.

    A run that stops for it saves the state before the step. Its forward and backward passes are repeated with its
    recipe, perhaps with other values, and every module is looked at; nothing is trained and nothing of RUN changes.
    For several ranks: composer -n N -m moefoundry replay RUN; on another number of ranks: mesh.shard=-1.
    """
    from moefoundry.checkpoint.nonfinite import newest_saved
    from moefoundry.config import UserError

    if not run.is_dir():
        raise UserError(f"{run}: no such directory; name the directory of a run")
    newest_saved(run)  # before the imports, which take long
    join_world(os.environ)

    from moefoundry.replay import replay

    text = replay(run, overrides)
    if int(os.environ.get("RANK", "0")) == 0:
        print(text)
    return 0
