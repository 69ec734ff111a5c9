"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from moefoundry.config.spec import redact
from moefoundry.config.urls import path_problem, resolved, url_problem


class Parser(argparse.ArgumentParser):
    """A parser whose errors hide secrets; so do those of its subcommands."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """``[RECIPE] key=value ...``, as ``arguments``."""
    parser.add_argument("arguments", nargs="*", metavar="[RECIPE] key=value", help="a YAML file, then overrides")


def positive(text: str) -> int:
    """A positive integer, in decimal digits."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def place(text: str) -> str:
    """Where something is read from: a path, or a URL as ``config/urls.py`` has it; ``file://`` becomes a path."""
    if problem := url_problem(text):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return resolved(text)


def local_path(text: str) -> Path:
    """A path of this machine."""
    if problem := path_problem(text):
        raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
    return Path(resolved(text))
