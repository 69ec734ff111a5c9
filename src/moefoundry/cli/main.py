"""Entry point of the ``moefoundry`` command.

A command is a module of this package named like it, with ``add_parser(subparsers)`` and ``run(args) -> int``. Only the
chosen one is imported, and heavy libraries only inside ``run``, so that each command starts as fast as it can.
A command that takes overrides declares them with ``arguments.add_recipe`` and takes them apart with
``moefoundry.config.split_arguments``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence

from moefoundry import __version__
from moefoundry.config.errors import UserError

COMMANDS = ["checkpoint", "convert", "generate", "plan", "prepare", "train", "validate"]
EXIT_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status; 2 is something the user can put right, named on standard error."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="moefoundry", description="Train Mixture-of-Experts language models.")
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
    return exit_status(lambda: modules[args.command].run(args))


def _in_order(words: list[str], argv: Sequence[str]) -> list[str]:
    """``words`` as they follow each other in ``argv``; of words that look alike, options have the first as values."""
    left, found = Counter(words), []
    for word in reversed(argv):
        if left[word]:
            left[word] -= 1
            found.append(word)
    return found[::-1]


def exit_status(run: Callable[[], int]) -> int:
    """What ``run`` returns; a :class:`UserError` is printed to standard error, without a traceback, and becomes 2."""
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
