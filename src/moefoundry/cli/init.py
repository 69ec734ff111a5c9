"""``moefoundry init``: a commented recipe to start from."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from moefoundry.cli.arguments import local_path, positive

DESCRIPTION = """\
Write a commented recipe: of a family's published model, of the config.json in a Hugging Face directory, or of about so
many parameters. Rate, batch, length and warm-up follow from the active parameters, by rules that the comments state.
"""
UNITS = {"": 1, "M": 10**6, "B": 10**9}


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser(
        "init", help="write a recipe to start from", description=DESCRIPTION, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--family", metavar="F", help="a model_type, such as olmoe, qwen3_moe or deepseek_v3")
    source.add_argument("--from", type=local_path, dest="hf", metavar="HF_DIR", help="a directory with config.json")
    source.add_argument("--active", type=_count, metavar="N", help="parameters that a token meets, such as 600M")
    parser.add_argument("--total", type=_count, metavar="N", help="all parameters, with --active; such as 3B")
    parser.add_argument(
        "--vocab-size", type=positive, default=50304, metavar="V", help="with --active (default: 50304)"
    )
    parser.add_argument("-o", "--output", type=local_path, metavar="FILE", help="where to (default: standard output)")


def run(args: argparse.Namespace) -> int:
    """Write the recipe; an existing file is never replaced."""
    from moefoundry.config import UserError

    text = _recipe(args)
    if args.output is None:
        sys.stdout.write(text)
        return 0
    try:
        with args.output.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be written: {error.strerror}") from None
    print(f"{args.output}: check it with: moefoundry validate {args.output}")
    return 0


def _recipe(args: argparse.Namespace) -> str:
    from moefoundry.config import UserError
    from moefoundry.conversion.families import FAMILIES, family_of
    from moefoundry.conversion.hf_config import read_hf_config
    from moefoundry.conversion.starting_recipe import recipe_of_config, recipe_of_family, recipe_of_size

    if (args.active is None) != (args.total is None):
        raise UserError("a size is --active N and --total N together")
    if args.active is not None:
        return recipe_of_size(args.active, args.total, args.vocab_size)
    if args.hf is not None:
        config = read_hf_config(args.hf)
        return recipe_of_config(family_of(config), config, Path(args.hf).resolve().name)
    if args.family not in FAMILIES:
        raise UserError(f"--family: no model family {args.family!r}; there are {', '.join(sorted(FAMILIES))}")
    return recipe_of_family(FAMILIES[args.family])


def _count(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MB]?)", text)
    if not match or not (count := int(float(match[1]) * UNITS[match[2]])):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of parameters; write one such as 600M or 3B")
    return count
