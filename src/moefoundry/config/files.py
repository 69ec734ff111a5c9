"""A recipe file and those that it extends: ``extends: other.yaml`` at its top, relative to the file, chains allowed."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from moefoundry.config.errors import ConfigError, Problem, RecipeFileError
from moefoundry.config.layers import EXTENDS, Layers, leaves_of
from moefoundry.config.spec import every_key, show
from moefoundry.config.urls import expanded, naming_problem, path_problem
from moefoundry.config.yaml_reader import parse_yaml


def read_layers(path: Path) -> Layers:
    """Read a recipe file and lay it over the file that it extends, and so on.

    Raises:
        ConfigError: A file of the chain is absent, cannot be read or is no recipe, or the chain comes back to one. The
            chain is named.
    """
    chain, trees = [path], [read_tree(path)]
    try:
        while EXTENDS in trees[-1]:
            base = _base(trees[-1].pop(EXTENDS), chain[-1])
            comes_back = base.resolve() in [file.resolve() for file in chain]
            chain.append(base)
            if comes_back:
                raise ConfigError([Problem(EXTENDS, f"{chain[-2]}: a recipe cannot extend itself")])
            trees.append(read_tree(base))
    except ConfigError as error:
        steps = " extends ".join(map(str, chain))
        raise type(error)(error.problems, str(path), f"({steps})" if len(chain) > 1 else "") from None
    layers = Layers(str(path), chained=len(chain) > 1)
    for file, tree in reversed([*zip(chain, trees, strict=True)]):
        layers.add(leaves_of(tree), str(file))
    return layers


def _base(value: Any, file: Path) -> Path:
    """Find the file that ``file`` extends."""
    allowed = "the path of another recipe file, relative to this one"
    if not isinstance(value, str):
        problem = f"got {show(value)}"
    elif "${" in value:
        problem = f"{show(value)}: files are read before interpolations are resolved"
    elif problem := path_problem(value) or naming_problem(expanded(value)):
        problem = f"{show(value)} {problem}".removeprefix("'' ")
    if problem:
        raise ConfigError([Problem(EXTENDS, f"{file}: {problem}", allowed)])
    return _shortest(file.parent / expanded(value))


def _shortest(path: Path) -> Path:
    """Take ``x/..`` out of a path, where that is the same file (with symbolic links it may be another)."""
    shorter = Path(os.path.normpath(path))
    return shorter if shorter.resolve() == path.resolve() else path


def read_tree(path: Path) -> dict[str, Any]:
    """Read one recipe file as dicts, lists and scalars.

    Raises:
        RecipeFileError: It is absent or cannot be read.
        ConfigError: It is not YAML, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeFileError([Problem(str(path), "no such recipe file", suggestion=_near(path))], str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeFileError([Problem(str(path), f"cannot be read: {reason}")], str(path)) from None
    tree = parse_yaml(text, str(path))
    if isinstance(tree, dict):
        return tree
    message = "is empty" if tree is None else f"the top level is {show(tree)}"
    raise ConfigError([Problem(str(path), message, allowed="a mapping of keys to values")], str(path))


def _near(path: Path) -> str:
    """Find the file, or the override, that was probably meant by the name of a file that does not exist."""
    if str(path) in every_key():
        return f"{path}=..."
    nearby = [*path.parent.glob("*.y*ml"), *Path("configs").rglob("*.y*ml")]
    by_name = {key: str(file) for file in nearby for key in (file.stem, str(file.with_suffix("")))}
    wanted = str(path.with_suffix("")), path.stem  # suffixes make any two names alike
    names = [near for name in wanted for near in difflib.get_close_matches(name, by_name, 1)]
    return by_name[names[0]] if names else ""
