"""Entry point of the ``moefoundry`` command.

A command is a module of this package named like it, with ``add_parser(subparsers)`` and ``run(args) -> int``. Only the
chosen one is imported, and heavy libraries only inside ``run``, so that each command starts as fast as it can.
A command that takes overrides declares them with ``arguments.add_recipe`` and takes them apart with
``moefoundry.config.split_arguments``.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Sequence

from moefoundry.cli.arguments import Parser
from moefoundry.cli.exits import ended_by_sigterm, exit_status, refuse_other_text
from moefoundry.version import __version__

COMMANDS = ["checkpoint", "convert", "generate", "init", "plan", "prepare", "train", "validate"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status; ``exits.py`` lists them."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return exit_status(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    refuse_other_text(argv)
    parser = Parser(prog="moefoundry", description="Train Mixture-of-Experts language models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    chosen = [argv[0]] if argv and argv[0] in COMMANDS else COMMANDS
    modules = {name: importlib.import_module(f"moefoundry.cli.{name}") for name in chosen}
    for module in modules.values():
        module.add_parser(subparsers)
    args, unknown = parser.parse_known_args(argv)
    if hasattr(args, "arguments"):  # overrides after an option, and --key value, whose error the recipe loader words
        args.arguments = _in_order([*args.arguments, *unknown], argv)
    elif unknown:
        subparsers.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    with ended_by_sigterm():
        status: int = modules[args.command].run(args)
    return status


def _in_order(words: list[str], argv: Sequence[str]) -> list[str]:
    """``words`` as they follow each other in ``argv``; of words that look alike, options have the first as values."""
    left, found = Counter(words), []
    for word in reversed(argv):
        if left[word]:
            left[word] -= 1
            found.append(word)
    return found[::-1]


if __name__ == "__main__":
    sys.exit(main())
