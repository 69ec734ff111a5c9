"""From a YAML file and overrides to a :class:`Recipe`, or to one :class:`ConfigError` that lists everything wrong.

Read strictly; fill in the schema's defaults, so that an interpolation can refer to any key; resolve interpolations;
check every value against the schema and build the dataclasses; then check across keys, those whose values are sound.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moefoundry.config.build import Builder
from moefoundry.config.checks import check_recipe
from moefoundry.config.errors import ConfigError, Problem
from moefoundry.config.fitting import KEYS, fitting_overrides
from moefoundry.config.interpolation import Resolver
from moefoundry.config.overrides import apply_overrides
from moefoundry.config.schema import Recipe
from moefoundry.config.spec import chosen_class, every_key, plain, show, specs
from moefoundry.config.yaml_reader import parse_yaml

LLM_FOUNDRY_MODELS = (
    "mpt_causal_lm",
    "hf_causal_lm",
    "hf_t5",
    "hf_prefix_lm",
    "fc_causal_lm",
    "finetune_embedding_model",
    "contrastive_lm",
    "openai_causal_lm",
    "openai_chat",
    "fmapi_causal_lm",
    "fmapi_chat",
)


def load_recipe(
    path: str | Path | None = None, overrides: Sequence[str] = (), world_size: int | None = None, check: bool = True
) -> Recipe:
    """Read, resolve and check a recipe.

    Args:
        path: A YAML file; None is the built-in default, which equals ``configs/quickstart.yaml``.
        overrides: Dotted ``key=value`` strings; see :mod:`moefoundry.config.overrides`.
        world_size: Number of ranks, where it is known; the mesh and the batch size are then checked against it.
        check: Check relations between keys. A stored recipe need not pass the checks of a later release.

    Raises:
        ConfigError: With every problem found.
    """
    source = str(path) if path is not None else "default recipe"
    tree = _read(Path(path)) if path is not None else {}
    problems = apply_overrides(tree, overrides)
    _refuse_llm_foundry(tree, source)
    return recipe_of(tree, source, world_size, problems, check)


def recipe_of(
    tree: dict[str, Any],
    source: str = "recipe",
    world_size: int | None = None,
    problems: Sequence[Problem] = (),
    check: bool = True,
) -> Recipe:
    """Resolve and check what a recipe file holds.

    Args:
        tree: Dicts, lists and scalars.
        source: What to call it in errors.
        world_size: As in :func:`load_recipe`.
        problems: What is wrong with it already.
        check: As in :func:`load_recipe`.

    Raises:
        ConfigError: With every problem found.
    """
    resolver, builder = Resolver(), Builder()
    recipe = builder.build(Recipe, resolver.resolve(_fill(Recipe(), tree)))
    found = resolver.problems | {problem.path: problem for problem in builder.problems}
    # One bad value is one problem, not one more for each key that refers to it.
    derived = {path for path in found if not found.keys().isdisjoint(_sources(path, resolver.references))}
    own = [problem for path, problem in found.items() if path not in derived] or list(found.values())
    related = check_recipe(recipe, world_size, skip=builder.unsound) if check else []
    if problems := [*problems, *own, *related]:
        raise ConfigError(problems, source, _advice(recipe, problems, world_size))
    return recipe


def _advice(recipe: Recipe, problems: list[Problem], world_size: int | None) -> str:
    """What would make a recipe that is right but for its number of ranks fit that number."""
    if world_size is None or not {problem.path for problem in problems} <= {*KEYS}:
        return ""
    overrides = fitting_overrides(recipe, world_size)
    return f"a world size of {world_size} fits with: {' '.join(overrides)}" if overrides else ""


def _sources(path: str, references: dict[str, list[str]]) -> set[str]:
    """The paths that the value at ``path`` comes from: those it refers to, or that a mapping above it refers to."""
    sources = set()
    for referrer, targets in references.items():
        if path == referrer or path.startswith(f"{referrer}."):
            sources |= {target + path[len(referrer) :] for target in targets}
    return sources


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        nearby = [*path.parent.glob("*.y*ml"), *Path("configs").rglob("*.y*ml")]
        by_name = {key: str(file) for file in nearby for key in (file.stem, str(file.with_suffix("")))}
        wanted = str(path.with_suffix("")), path.stem  # what files of one kind have in common tells nothing
        names = [near for name in wanted for near in difflib.get_close_matches(name, by_name, 1)]
        suggestion = f"{path}=..." if str(path) in every_key() else by_name[names[0]] if names else ""
        raise ConfigError([Problem(str(path), "no such recipe file", suggestion=suggestion)], str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError([Problem(str(path), f"cannot be read: {reason}")], str(path)) from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        raise ConfigError([Problem(str(path), "is empty", allowed="a mapping of keys to values")], str(path))
    if not isinstance(tree, dict):
        problem = Problem(str(path), f"the top level is {show(tree)}", allowed="a mapping of keys to values")
        raise ConfigError([problem], str(path))
    return tree


def _refuse_llm_foundry(tree: dict[str, Any], source: str) -> None:
    model = tree.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if name in LLM_FOUNDRY_MODELS:
        message = f"{show(name)} is a model of LLM Foundry, whose recipes are another schema, not available yet"
        raise ConfigError([Problem("model.name", message, allowed="moe_causal_lm")], source)


def _fill(default: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` with the missing keys of ``default`` (a schema object) added at every depth; unknown keys stay."""
    filled = {}
    for name, spec in specs(type(default)).items():
        value = getattr(default, name)
        if name not in tree:
            filled[name] = plain(value)
        elif isinstance(tree[name], dict) and (cls := chosen_class(spec, tree[name], value)):
            filled[name] = _fill(value if type(value) is cls else cls(), tree[name])
        else:
            filled[name] = tree[name]
    return filled | {name: value for name, value in tree.items() if name not in filled}
