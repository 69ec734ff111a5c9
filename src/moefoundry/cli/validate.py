"""``moefoundry validate``: what can be wrong with a recipe, on any machine, in under a second.

Nothing heavy is imported, with one exception: which modules there are, for ``precision.fp8.exclude`` to name, only the
model itself can say, so it is built on meta. That takes about three seconds, nearly all of them to import torch.

The rules are those by which training refuses a recipe: ``config/`` for the recipe, ``data/fit.py`` for its data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefoundry.cli.arguments import add_recipe, positive
from moefoundry.config.errors import Problem

if TYPE_CHECKING:
    from moefoundry.config import ModelConfig, Recipe

DESCRIPTION = """\
Check a recipe and its overrides; list every problem at once (exit status 2). Names of modules in precision.fp8.exclude
are looked up when all else is right, and so are local data: where they are not on this machine, a note says so, and how
to make them. Otherwise the machine plays no part: a recipe for GPUs is checked on any other computer, and what the
devices must be able to do is checked when training starts. Also says what the model can be exported as.
--show prints every key of the recipe, and whether it comes from a file (which), an override or the defaults.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "validate",
        help="check a recipe, on any machine",
        description=DESCRIPTION,
        allow_abbrev=False,
    )
    add_recipe(parser)
    parser.add_argument("--world-size", type=positive, metavar="N", help="also check mesh and batch against N ranks")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--show", action="store_true", help="print the resolved recipe, and where each value comes from")
    shown.add_argument("--print", action="store_true", dest="print_recipe", help="print the resolved recipe as YAML")


def run(args: argparse.Namespace) -> int:
    from moefoundry.config import advice, annotated, dump_recipe, load_layers, recipe_of, split_arguments

    path, overrides = split_arguments(args.arguments)
    layers = load_layers(path, overrides)
    recipe = recipe_of(layers, args.world_size)
    _check_names(recipe)
    notes = [f"warning: {problem}" for problem in advice(recipe)]
    notes += [f"note: {problem}" for problem in check_files(recipe, args.world_size or 1)]
    if notes:
        print("\n".join(notes), file=sys.stderr)
    if args.show or args.print_recipe:
        print(annotated(recipe, layers) if args.show else dump_recipe(recipe), end="")
        return 0
    model, moe, precision = recipe.model, recipe.model.moe, recipe.precision
    fp8 = f", fp8 {precision.fp8.recipe}" if precision.fp8.recipe else ""
    print(
        f"OK {recipe.run_name}: {model.name}, {model.n_layers} layers ({model.n_dense_layers} dense), "
        f"d_model {model.d_model}, {moe.num_experts} experts top-{moe.top_k} + {moe.num_shared_experts} shared, "
        f"vocabulary {model.vocab_size}; {recipe.max_duration} of {recipe.global_train_batch_size} x "
        f"{recipe.max_seq_len} tokens, {precision.compute}{fp8}\n"
        f"export: {exports_as(model)}"
    )
    return 0


def check_files(recipe: Recipe, world_size: int) -> list[Problem]:
    """Refuse data, and a local ``load_path``, that do not fit, as training does. Where none of it is on this machine,
    return what is not."""
    from moefoundry.config.urls import is_url, resolved
    from moefoundry.data.fit import all_absent, check_data

    absent = all_absent(recipe)
    if not absent:
        check_data(recipe, world_size)
    if recipe.load_path is None or is_url(path := resolved(recipe.load_path)) or _goes_on(recipe):
        return absent
    if absent and not Path(path).exists():
        return [*absent, Problem("load_path", f"{path}: no such directory")]

    from moefoundry.checkpoint.start import check_start, known_digests
    from moefoundry.checkpoint.store import find_checkpoint

    check_start(find_checkpoint(path), False, recipe, known_digests(recipe))
    return absent


def _goes_on(recipe: Recipe) -> bool:
    """Whether the run has a checkpoint of its own, which comes before ``load_path``."""
    from moefoundry.checkpoint.store import CheckpointStore

    return recipe.autoresume and CheckpointStore(Path(recipe.run_dir, "checkpoints")).latest() is not None


def exports_as(model: ModelConfig) -> str:
    """Name the Hugging Face family that has such a model, or the keys that stand in the way of the nearest."""
    from moefoundry.conversion.families import nearest_family

    family, reasons = nearest_family(model)
    return family.name if family is not None and not reasons else f"no Hugging Face family: {'; '.join(reasons)}"


def _check_names(recipe: Recipe) -> None:
    """Refuse names of modules that there are not, as training does."""
    from moefoundry.config import Fp8Config

    fp8 = recipe.precision.fp8
    if fp8.recipe is None or set(fp8.exclude) <= set(Fp8Config().exclude):
        return

    from moefoundry.model.transformer import meta_model
    from moefoundry.precision import apply_precision

    apply_precision(meta_model(recipe.model), recipe.precision)
