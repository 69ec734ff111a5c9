"""``moefoundry train``: what ``scripts/train.py`` runs in every rank of a launch."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from moefoundry.cli.arguments import add_recipe


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a recipe on this rank",
        description="Train a recipe. For several ranks: composer -n N scripts/train.py [RECIPE] [key=value ...]",
        allow_abbrev=False,
    )
    add_recipe(parser)


def run(args: argparse.Namespace) -> int:
    from moefoundry.config import DataError, UserError, load_recipe, redact_argument, split_arguments

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    try:
        path, overrides = split_arguments(args.arguments)
        recipe = load_recipe(path, overrides, world_size=world_size)

        from moefoundry.data.fit import check_data

        check_data(recipe, world_size)  # before what takes seconds to import

        from moefoundry.callbacks.signals import EXIT_STOPPED
        from moefoundry.train import stopped_by, train

        sys.argv[1:] = map(redact_argument, sys.argv[1:])  # trackers keep it
        arguments = map(redact_argument, args.arguments)
        trainer = train(recipe, command=[*_launcher(world_size), "scripts/train.py", *arguments])
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", 0)) == 0 or isinstance(error, DataError):
            raise
        time.sleep(1)  # launchers end every rank when one ends: let the first of this node say why
        return 2
    return EXIT_STOPPED if stopped_by(trainer) else 0


def _launcher(world_size: int) -> list[str]:
    """What starts as many ranks with this environment's interpreter, whether or not the environment is activated."""
    binaries = Path(sys.executable).parent
    if binaries.is_relative_to(Path.cwd()):
        binaries = binaries.relative_to(Path.cwd())
    return [str(binaries / "composer"), "-n", str(world_size)] if world_size > 1 else [str(binaries / "python")]
