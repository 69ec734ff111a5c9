"""Dotted ``key=value`` overrides, as given on the command line after the recipe.

The value is what stands after the first ``=``. Where the key is a text, it is that text as it stands: ``run_name=1``,
``callbacks.report.prompt=# a: b`` (but ``null``, or nothing, is null, and YAML's quotes around all of it are quotes).
Of any other key it is YAML, read as strictly as the recipe itself: ``model.moe.top_k=4``, ``loggers.wandb={}``,
``optimizer.betas=[0.9,0.99]``, ``eval_loader=null``. A mapping is merged into the one that is there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moefoundry.config.errors import ConfigError, Problem
from moefoundry.config.layers import EXTENDS, OVERRIDE, KeyPath, Layers, leaves_of
from moefoundry.config.secrets import looks_secret, redact
from moefoundry.config.spec import every_key, find_key
from moefoundry.config.urls import expanded
from moefoundry.config.yaml_reader import parse_yaml

_PATH = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
_QUOTED = re.compile(r"""(?s)"(?:[^"\\]|\\.)*"|'(?:[^']|'')*'""")
_INDEX = re.compile(r"\[\d+\]|\.\d+$")


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split ``[RECIPE] [key=value ...]`` into the recipe, or None, and overrides. A recipe with a ``=`` must exist."""
    first = expanded(arguments[0]) if arguments else "-"
    if first.startswith("-") or ("=" in first and not Path(first).is_file()):
        return None, list(arguments)
    return first, list(arguments[1:])


def redact_argument(argument: str) -> str:
    """Hide secrets in an argument of the command line, which is shown and kept."""
    path, equals, value = argument.partition("=")
    return path + equals + redact(value, path) if equals else redact(argument)


def add_overrides(layers: Layers, overrides: Sequence[str]) -> None:
    """Merge overrides, in order, into the layers; their problems join those of the layers."""
    leaves: dict[KeyPath, Any] = {}
    words = list(overrides)
    while words:
        token, following = words.pop(0), "..."
        if "=" not in token and words and "=" not in words[0] and words[0].lstrip("-") not in every_key():
            following = words.pop(0)  # `key value`: one mistake
        try:
            path, value = _parse(token, following)
            leaves.update(leaves_of(value, tuple(path.split("."))))
        except ConfigError as error:
            layers.problems += error.problems
    layers.add(leaves, OVERRIDE)


def _parse(token: str, following: str) -> tuple[str, Any]:
    """Split an override into key and value; ``following`` is the probable value where it has none, for the error."""
    path, equals, text = token.partition("=")
    bare = path.lstrip("-")
    shown = "..." if looks_secret(bare) else text or following
    if not equals:
        message = "an override is written key=value" if bare == path else "no such option; overrides are key=value"
        raise ConfigError([Problem(token, message, suggestion=f"{bare}={shown}" if bare in every_key() else "")])
    if bare != path:
        raise ConfigError([Problem(path, "an override has no leading dashes", suggestion=f"{bare}={shown}")])
    if path == EXTENDS:
        message = "a recipe file extends another at its top; no override does"
        raise ConfigError([Problem(path, message, allowed="the other file as the recipe, or a file that extends it")])
    if _INDEX.search(path):
        raise ConfigError([Problem(path, "a list is set as a whole", suggestion=_INDEX.sub("", path) + "=[...]")])
    if not _PATH.fullmatch(path):
        raise ConfigError([Problem(path, "not a dotted key", allowed="key=value or section.key=value")])
    return path, _value(path, text)


def _value(path: str, text: str) -> Any:
    """Read the value of a key."""
    spec = find_key(path)
    if spec is None or not spec.is_text:
        return parse_yaml(text, f"{path}=", comments=False, plain_text=spec is not None and spec.item is str)
    if text in ("", "null", "Null", "NULL") or (text == "~" and spec.optional):
        return None
    if _QUOTED.fullmatch(text):
        return parse_yaml(text, f"{path}=")
    return text
