"""Arguments that several commands take."""

from __future__ import annotations

import argparse


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """``[RECIPE] key=value ...``, as ``arguments``."""
    parser.add_argument(
        "arguments", nargs="*", metavar="[RECIPE] key=value", help="a YAML file (default: quickstart), then overrides"
    )


def positive(text: str) -> int:
    """A positive integer, in decimal digits."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
