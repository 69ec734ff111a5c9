"""``moefoundry plan``: a recipe at any number of ranks, on one CPU. Heavy imports happen in :func:`run`."""

from __future__ import annotations

import argparse
from typing import Any

from moefoundry.cli.arguments import add_recipe, positive
from moefoundry.cli.exits import EXIT_NO

DESCRIPTION = """\
Memory of a rank and bytes that it sends, by collective and mesh axis, for a recipe at any number of ranks. Nothing is
allocated: the model is built and sharded on meta tensors, as training would. docs/plan.md says what is exact.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan", help="memory and traffic of a recipe on N ranks", description=DESCRIPTION, allow_abbrev=False
    )
    add_recipe(parser)
    parser.add_argument("--world-size", type=positive, required=True, metavar="N", help="number of ranks")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="ranks of a node (default: 8)")
    parser.add_argument(
        "--memory-gb", type=positive, default=80, metavar="GB", help="a device's, in 1e9 bytes (default: 80)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes; memory.fits says if it fits")
    parser.add_argument("--exit-code", action="store_true", help="exit status 1 if it does not fit")


def run(args: argparse.Namespace) -> int:
    import json

    from moefoundry.config import load_recipe, split_arguments

    path, overrides = split_arguments(args.arguments)
    recipe = load_recipe(path, overrides, world_size=args.world_size)

    from moefoundry.planning.plan import make_plan
    from moefoundry.planning.table import plan_table

    plan = make_plan(recipe, args.world_size, args.gpus_per_node)
    print(json.dumps(plan.to_json(args.memory_gb), indent=2) if args.json else plan_table(plan, args.memory_gb))
    return EXIT_NO if args.exit_code and not plan.fits(args.memory_gb) else 0
