"""``moefoundry report``: one HTML file about runs, from their files alone. Nothing heavy is imported but the plots."""

from __future__ import annotations

from pathlib import Path

import click

from moefoundry.cli.arguments import local_path


@click.command("report")
@click.argument("run_dirs", type=local_path, metavar="RUN...", nargs=-1, required=True, help="Directories of runs.")
@click.option(
    "-o", "--output", type=local_path, metavar="FILE", help="Default: report.html, in the run_dir of a single run."
)
def command(run_dirs: tuple[Path, ...], output: Path | None) -> None:
    """Write losses, throughput, expert load, memory, waits, recipe and history of a run into one HTML file.

    A running or broken run gets one, too. Of several runs the file has their differences and their curves together
    first, then each of them. It has no script and loads nothing.
    """
    from moefoundry.runs.facts import existing_run
    from moefoundry.runs.report import REPORT_FILE, report_page

    runs = [existing_run(path) for path in dict.fromkeys(run_dirs)]
    if output is None:
        output = runs[0] / REPORT_FILE if len(runs) == 1 else Path(REPORT_FILE)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report_page(runs))
    print(output)
