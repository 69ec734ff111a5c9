"""``moefoundry train``: what ``scripts/train.py`` runs in every rank of a launch."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefoundry.cli.arguments import add_recipe
from moefoundry.cli.world import join_world
from moefoundry.config.errors import EXIT_USER_ERROR

if TYPE_CHECKING:
    from moefoundry.config import Recipe, UserError


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a recipe on this rank",
        description="Train a recipe. For several ranks: composer -n N scripts/train.py [RECIPE] [key=value ...]",
        allow_abbrev=False,
    )
    add_recipe(parser)


def run(args: argparse.Namespace) -> int:
    from moefoundry.checkpoint.lease import held
    from moefoundry.config import UserError, load_recipe, split_arguments

    path, overrides = split_arguments(args.arguments)
    try:
        world_size = join_world(os.environ)
        recipe = load_recipe(path, overrides, world_size=world_size)
        with held(Path(recipe.run_dir)) if _rank() == 0 else nullcontext():  # before the imports, which take long
            return _train(recipe, world_size, args.arguments)
    except UserError as error:
        if _is_to_say(error):
            _tell_torchrun(error)
            raise
        time.sleep(1)  # launchers end every rank when one ends: let the one that speaks do so
        return EXIT_USER_ERROR


def _train(recipe: Recipe, world_size: int, arguments: list[str]) -> int:
    from moefoundry.data.fit import check_data

    check_data(recipe, world_size)  # before what takes seconds to import

    from moefoundry.callbacks.signals import EXIT_STOPPED
    from moefoundry.config import redact_argument
    from moefoundry.trainer import stopped_by, train

    sys.argv[1:] = map(redact_argument, sys.argv[1:])  # trackers keep it
    trainer = train(recipe, command=[*_launcher(world_size), "scripts/train.py", *map(redact_argument, arguments)])
    return EXIT_STOPPED if stopped_by(trainer) else 0


def _rank(name: str = "RANK") -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def _is_to_say(error: UserError) -> bool:
    """Whether this rank prints the error. All find the same in a recipe: rank 0 says it. What is amiss on a node, as a
    file that is not there, the first rank of that node says; what is amiss in data, whoever has read them."""
    from moefoundry.config import ConfigError, DataError
    from moefoundry.config.errors import RecipeFileError

    if isinstance(error, ConfigError) and not isinstance(error, RecipeFileError):
        return _rank() == 0
    return _rank("LOCAL_RANK") == 0 or isinstance(error, DataError)


def _tell_torchrun(error: UserError) -> None:
    """What a rank leaves in this file, torchrun shows at the end of all that it prints itself."""
    if (file := os.environ.get("TORCHELASTIC_ERROR_FILE")) is not None:
        extra = {"py_callstack": f"error: {error}", "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": f"error: {error}", "extraInfo": extra}}))


def _launcher(world_size: int) -> list[str]:
    """What starts as many ranks with this environment's interpreter, whether or not the environment is activated."""
    binaries = Path(sys.executable).parent
    if binaries.is_relative_to(Path.cwd()):
        binaries = binaries.relative_to(Path.cwd())
    return [str(binaries / "composer"), "-n", str(world_size)] if world_size > 1 else [str(binaries / "python")]
