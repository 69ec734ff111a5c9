"""Entry point of the ``moefoundry`` command.

A command is a module of this package that is named like it and holds it as ``command``. Only the chosen one is
imported, and heavy libraries only when it runs: each command starts as fast as it can.
A command that takes a recipe declares it with ``arguments.recipe_arguments`` and the settings ``RECIPE_COMMAND``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from moefoundry.cli.arguments import Group
from moefoundry.cli.exits import ended_by_sigterm, exit_status, hide_arguments, hide_secrets, refuse_other_text
from moefoundry.version import __version__

COMMANDS = {
    "checkpoint": "List, verify, show and delete checkpoints.",
    "convert": "Convert from and to Hugging Face.",
    "data": "Look at prepared data.",
    "doctor": "Check this machine: GPUs, versions, space, limits, an all-reduce.",
    "estimate": "Time of a step and length of a run on N devices.",
    "eval": "Score a checkpoint: tasks, held-out data, code, lm-evaluation-harness.",
    "explain": "Meaning of a key of a recipe.",
    "generate": "Continue a prompt with a checkpoint.",
    "init": "Write a commented recipe to start from.",
    "launch": "Hand a recipe to Slurm, SkyPilot, Kubernetes or Ray, or start it here.",
    "migrate": "Turn another project's recipe into one of this project.",
    "plan": "Memory and traffic of a recipe on N ranks.",
    "prepare": "Turn text into token shards.",
    "recommend": "Fastest mesh and micro-batch of a recipe on N devices, and what makes it fit.",
    "reference": "Score preference data with a frozen reference, for dpo.",
    "replay": "Repeat the step at which a run was not finite, and say where that began.",
    "report": "One HTML file about a run, or about several.",
    "runs": "Table of the runs in a directory.",
    "sweep": "Train a recipe over values of its keys, and compare.",
    "train": "Train a recipe on this rank.",
    "validate": "Check a recipe, on any machine.",
    "verify": "Prove that a recipe trains right, with a small twin of it.",
    "watch": "Follow runs from their files, on a terminal or as lines.",
}
COMPLETE = "_MOEFOUNDRY_COMPLETE"
"""Variable by which a shell asks for its script (``bash_source``) and for completions (``bash_complete``)."""


class Commands(Group):
    """The commands of :data:`COMMANDS`, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"moefoundry.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])


@click.command(
    cls=Commands,
    subcommand_metavar="COMMAND ...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def commands() -> None:
    """Train Mixture-of-Experts language models."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status; ``exits.py`` lists them."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_status(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    if COMPLETE in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(commands, {}, "moefoundry", COMPLETE, os.environ[COMPLETE])
    refuse_other_text(argv)
    try:
        with commands.make_context("moefoundry", argv) as context:
            hide_secrets()
            hide_arguments()
            with ended_by_sigterm():
                return commands.invoke(context) or 0
    except click.exceptions.Exit as end:  # of --help and --version
        return end.exit_code


if __name__ == "__main__":
    sys.exit(main())
