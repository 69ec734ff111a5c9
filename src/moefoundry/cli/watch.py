"""``moefoundry watch``: follow runs from their files. Nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path

import click

from moefoundry.cli.arguments import Number, local_path


@click.command("watch")
@click.argument("run_dirs", type=local_path, metavar="RUN...", nargs=-1, required=True, help="Directories of runs.")
@click.option(
    "--interval",
    type=Number(0.1, 3600),
    default=2.0,
    metavar="SECONDS",
    help="Time between two looks (default 2).",
)
@click.option("--plain", is_flag=True, help="Print lines, on a terminal too.")
def command(run_dirs: tuple[Path, ...], interval: float, plain: bool) -> None:
    """Show losses, speed, expert load, memory, waits and the last events of runs until they have ended.

    On a terminal it is a view that stays in its place, of several runs side by side; elsewhere it is lines. It reads
    files only: Ctrl-C ends the view and leaves the runs alone.
    """
    from rich.console import Console

    from moefoundry.runs.facts import existing_run
    from moefoundry.runs.live import Drawing, can_draw
    from moefoundry.runs.watching import Watched, follow, print_lines

    runs = [Watched(existing_run(path)) for path in dict.fromkeys(run_dirs)]
    console = Console()
    if plain or not can_draw(console):
        follow(runs, interval, print_lines)
        return
    with Drawing(runs, console) as drawing:
        follow(runs, interval, lambda run, new: drawing.draw())
