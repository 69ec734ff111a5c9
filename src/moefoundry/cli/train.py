"""``moefoundry train``: what ``scripts/train.py`` runs in every rank of a launch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import MutableMapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moefoundry.cli.arguments import RECIPE_COMMAND, Number, recipe_arguments
from moefoundry.cli.world import join_world

if TYPE_CHECKING:
    from moefoundry.config import Recipe, UserError
    from moefoundry.config.layers import Layers
    from moefoundry.llm_foundry.recipe import FoundryRecipe


QUIET = ("log_to_console=false", "progress_bar=false")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables that torch reads its allocators' options from; the second is an older name."""

ROUNDED_MB = 16
"""Size up to which page-locked tensors are rounded up, to be used again for others."""


@click.command("train", context_settings=RECIPE_COMMAND)
@recipe_arguments
@click.option("--allow-code-paths", is_flag=True, help="Run the files that code_paths of an LLM Foundry recipe names.")
@click.option("--quiet", is_flag=True, help="No progress: log_to_console and progress_bar are false.")
@click.option(
    "--wait",
    type=Number(0, 86400),
    default=0,
    metavar="SECONDS",
    help="Wait so long for another run to leave run_dir: one whose machine was lost leaves it after a minute.",
)
def command(arguments: list[str], allow_code_paths: bool, quiet: bool, wait: float) -> int:
    """Train a recipe; one of LLM Foundry is run by LLM Foundry's own trainer.

    For several ranks: composer -n N scripts/train.py [RECIPE] [KEY=VALUE]...
    """
    from moefoundry.checkpoint.lease import held
    from moefoundry.config import UserError, load_layers, recipe_of, split_arguments
    from moefoundry.config.errors import EXIT_USER_ERROR
    from moefoundry.llm_foundry.recipe import read_foundry_recipe

    choose_allocator(os.environ)
    path, overrides = split_arguments([*arguments, *(QUIET if quiet else ())])
    try:
        world_size = join_world(os.environ)
        if (foundry := read_foundry_recipe(path, overrides)) is not None:
            return _train_foundry(foundry, world_size, allow_code_paths)
        if allow_code_paths:
            raise click.UsageError("--allow-code-paths is for recipes of LLM Foundry; code_paths is their key")
        layers = load_layers(path, overrides)
        recipe = recipe_of(layers, world_size)
        with held(Path(recipe.run_dir), wait) if _rank() == 0 else nullcontext():  # before the imports, which take long
            return _train(recipe, layers, world_size, arguments)
    except UserError as error:
        if _is_to_say(error):
            _tell_torchrun(error)
            raise
        time.sleep(1)  # launchers end every rank when one ends: let the one that speaks do so
        return EXIT_USER_ERROR


def _train(recipe: Recipe, layers: Layers, world_size: int, arguments: list[str]) -> int:
    from moefoundry.data.fit import check_data

    check_data(recipe, world_size)  # before what takes seconds to import

    from moefoundry.config import redact_argument
    from moefoundry.config.dump import origins
    from moefoundry.config.errors import EXIT_STOPPED
    from moefoundry.trainer import stopped_by, train

    command = [*_command(world_size, sys.argv[0]), *map(redact_argument, arguments)]
    trainer = train(recipe, command, origins(recipe, layers))
    return EXIT_STOPPED if stopped_by(trainer) else 0


def _train_foundry(recipe: FoundryRecipe, world_size: int, allow_code_paths: bool) -> int:
    from moefoundry.llm_foundry.recipe import check_foundry_recipe

    check_foundry_recipe(recipe, world_size, allow_code_paths)  # before what takes seconds to import

    from moefoundry.llm_foundry.run import run

    run(recipe, _rank())
    return 0


def choose_allocator(environment: MutableMapping[str, str]) -> None:
    """Set options of torch's allocators, unless the environment has some.

    Segments of GPU memory can grow: an expert's rows are as many as come, others in each layer and step; segments of
    fixed sizes would leave gaps. Large tensors in page-locked memory, which saves and averages copy to, keep their own
    size; torch would round it up to a power of two. torch reads the variable when it is imported, or later.
    """
    if any(name in environment for name in ALLOCATOR):
        return
    torch = tuple(map(int, version("torch").split(".")[:2]))
    rounding = f",pinned_max_round_threshold_mb:{ROUNDED_MB}" if torch >= (2, 14) else ""
    environment[ALLOCATOR[0]] = f"expandable_segments:True{rounding}"


def _rank(name: str = "RANK") -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def _is_to_say(error: UserError) -> bool:
    """Tell if this rank prints the error.

    All ranks find the same in a recipe: rank 0 prints it. An error of one node, such as a missing file, is printed by
    the first rank of that node; one of a rank, as in data or for want of memory, by that rank.
    """
    from moefoundry.config import ConfigError, LocalError
    from moefoundry.config.errors import RecipeFileError

    if isinstance(error, ConfigError) and not isinstance(error, RecipeFileError):
        return _rank() == 0
    return _rank("LOCAL_RANK") == 0 or isinstance(error, LocalError)


def _tell_torchrun(error: UserError) -> None:
    """Leave the error in the file whose content torchrun shows at its end."""
    if (file := os.environ.get("TORCHELASTIC_ERROR_FILE")) is not None:
        extra = {"py_callstack": f"error: {error}", "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": f"error: {error}", "extraInfo": extra}}))


def _command(world_size: int, program: str) -> list[str]:
    """Build the command that starts as many ranks with this environment, activated or not.

    Args:
        world_size: Number of ranks.
        program: ``sys.argv[0]``: a script such as ``scripts/train.py``, or ``moefoundry`` itself.
    """
    binaries = Path(sys.executable).parent
    if binaries.is_relative_to(Path.cwd()):
        binaries = binaries.relative_to(Path.cwd())
    from moefoundry.launching.local import launcher

    start = launcher(world_size, binaries / "python")
    return [*start, program] if Path(program).name == "train.py" else [*start, "-m", "moefoundry", "train"]
