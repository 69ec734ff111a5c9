"""``moefoundry verify``: proofs about a recipe, on this machine. Heavy imports happen when it runs."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moefoundry.cli.arguments import RECIPE_COMMAND, json_option, recipe_arguments
from moefoundry.cli.exits import EXIT_NO

if TYPE_CHECKING:
    from moefoundry.verify.checks import Answer
    from moefoundry.verify.twin import Twin


@click.command("verify", context_settings=RECIPE_COMMAND)
@recipe_arguments
@click.option("--only", multiple=True, metavar="NAME", help="Run this check alone; may be given several times.")
@click.option("--faults", is_flag=True, help="Also kill, damage and stall runs, and say what that costs.")
@click.option(
    "--ranks",
    type=click.Choice(["2", "4", "8"]),
    default="4",
    help="Ranks of the largest world that is tried (default 4).",
)
@click.option("--gpu", is_flag=True, help="Compute on the GPUs of this machine, one a rank; default: on CPU ranks.")
@json_option
def command(arguments: list[str], only: tuple[str, ...], faults: bool, ranks: str, gpu: bool, as_json: bool) -> int:
    """Prove that a recipe trains right, with a twin of it in small sizes, on this machine.

    Prints a line for each claim: what was measured, the bound, and, where it fails, the first tensor that differs. Exit
    status 1 if one fails.
    """
    from moefoundry.config import UserError, load_recipe, split_arguments

    path, overrides = split_arguments(arguments)
    recipe = load_recipe(path, overrides)

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if gpu and (there := _num_gpus()) < int(ranks):
        raise UserError(f"--gpu: {ranks} ranks need as many GPUs, and this machine has {there}; without it, CPUs do")
    from moefoundry.verify.checks import CHECKS, FAULTS, run
    from moefoundry.verify.table import lines_of
    from moefoundry.verify.twin import make_twin

    known = CHECKS | FAULTS
    if unknown := [name for name in only if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r}: there are {', '.join(known)}", param_hint="--only")
    names = [name for name in known if name in only or (name in FAULTS and faults) or (name in CHECKS and not only)]
    with tempfile.TemporaryDirectory(prefix="moefoundry-verify-") as room:
        twin = make_twin(recipe, Path(room), int(ranks), gpu)
        if not as_json:
            print(f"{recipe.run_name}: twin of {twin}", flush=True)
            print("".join(f"not in the twin: {line}\n" for line in twin.lost), end="", flush=True)
        answers = []
        for answer in run(twin, names):
            answers.append(answer)
            if not as_json:
                print("\n".join(lines_of(answer)), flush=True)
    if as_json:
        print(json.dumps(_to_json(twin, answers), indent=2))
    return 0 if all(answer.passed for answer in answers) else EXIT_NO


def _num_gpus() -> int:
    """Count GPUs without touching one: ranks are forked from this process."""
    import torch

    return torch.cuda.device_count()


def _to_json(twin: Twin, answers: list[Answer]) -> dict[str, object]:
    from moefoundry.config import flatten

    return {
        "run_name": twin.original.run_name,
        "passed": all(answer.passed for answer in answers),
        "twin": flatten(twin.recipe),
        "lost": list(twin.lost),
        "checks": [answer.to_json() for answer in answers],
    }
