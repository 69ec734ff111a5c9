"""``moefoundry validate``: everything that can be wrong with a recipe, in under a second, before anything is built."""

from __future__ import annotations

import argparse
from typing import Any

from moefoundry.cli.arguments import add_recipe, positive


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "validate",
        help="check a recipe without building anything",
        description="Check a recipe and its overrides; list every problem at once (exit status 2).",
        allow_abbrev=False,
    )
    add_recipe(parser)
    parser.add_argument("--world-size", type=positive, metavar="N", help="also check mesh and batch against N ranks")
    parser.add_argument("--print", action="store_true", dest="print_recipe", help="print the resolved recipe as YAML")


def run(args: argparse.Namespace) -> int:
    from moefoundry.config import dump_recipe, load_recipe, split_arguments

    path, overrides = split_arguments(args.arguments)
    recipe = load_recipe(path, overrides, world_size=args.world_size)
    if args.print_recipe:
        print(dump_recipe(recipe), end="")
        return 0
    model, moe = recipe.model, recipe.model.moe
    print(
        f"OK {recipe.run_name}: {model.name}, {model.n_layers} layers ({model.n_dense_layers} dense), "
        f"d_model {model.d_model}, {moe.num_experts} experts top-{moe.top_k} + {moe.num_shared_experts} shared, "
        f"vocabulary {model.vocab_size}; {recipe.max_duration} of {recipe.global_train_batch_size} x "
        f"{recipe.max_seq_len} tokens, {recipe.precision.compute}"
    )
    return 0
