"""From a YAML file and overrides to a :class:`Recipe`, or to one :class:`ConfigError` that lists everything wrong.

Read the file and those that it extends, strictly; lay overrides over them; fill in the schema's defaults, so that an
interpolation can refer to any key; resolve interpolations; check every value against the schema and build the
dataclasses; then check across keys, those whose values are sound.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moefoundry.config.advice import fit_advice
from moefoundry.config.build import Builder
from moefoundry.config.checks import check_recipe
from moefoundry.config.errors import ConfigError, Problem
from moefoundry.config.files import read_layers
from moefoundry.config.interpolation import Resolver
from moefoundry.config.layers import OVERRIDE, Layers, leaves_of
from moefoundry.config.overrides import add_overrides
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_model import ModelConfig
from moefoundry.config.spec import filled, show
from moefoundry.config.versions import FORMAT_VERSION, VERSION_KEY, upgraded

NOT_OF_THE_MODEL = (
    *("run_name=llm-foundry", "max_seq_len=4096", "train_loader.dataset.local=none", "optimizer.lr=1"),
    *("scheduler.t_warmup=0ba", "max_duration=1ba", "global_train_batch_size=1"),
)
"""Required keys of a recipe that :func:`load_model` does without; nothing reads them."""
OVERRIDES = "overrides"
"""Name of a recipe without a file."""
NO_RECIPE = "moefoundry init writes a recipe to start from; configs/quickstart.yaml is a small one"
LACKING = "moefoundry init writes a whole recipe; `extends: configs/quickstart.yaml` gives former defaults"
LLM_FOUNDRY_MODELS = re.compile(
    r"(mpt|hf|fc|openai|fmapi)_causal_lm|(openai|fmapi)_chat|hf_t5|hf_prefix_lm|finetune_embedding_model|contrastive_lm"
)


def load_recipe(
    path: str | Path | None = None, overrides: Sequence[str] = (), world_size: int | None = None, stored: bool = False
) -> Recipe:
    """Read, resolve and check a recipe.

    Args:
        path: A YAML file; None where the overrides are the whole recipe.
        overrides: Dotted ``key=value`` strings; see :mod:`moefoundry.config.overrides`.
        world_size: Number of ranks, where it is known; the mesh and the batch size are then checked against it.
        stored: The file is a run's own copy: perhaps of an earlier format version, and not to be checked across keys.

    Raises:
        ConfigError: With every problem found.
    """
    return recipe_of(load_layers(path, overrides, stored), world_size, check=not stored)


def load_model(keys: Mapping[str, Any]) -> ModelConfig:
    """Check the keys of ``model`` alone, where another project's recipe has all others.

    Args:
        keys: Keys of the mapping ``model``, plain.

    Raises:
        ConfigError: With every problem found.
    """
    return load_recipe(None, [*NOT_OF_THE_MODEL, f"model={json.dumps(keys)}"]).model


def load_layers(path: str | Path | None = None, overrides: Sequence[str] = (), stored: bool = False) -> Layers:
    """Read a recipe file, those that it extends, and overrides; the arguments are :func:`load_recipe`'s.

    Raises:
        ConfigError: The file, or one that it extends, cannot be used.
    """
    if path is None and not overrides:
        raise ConfigError([Problem("recipe", "none is given", allowed="a YAML file")], "moefoundry", NO_RECIPE)
    layers = read_layers(Path(path)) if path is not None else Layers(OVERRIDES)
    if stored or VERSION_KEY in layers.tree:
        _upgrade(layers)
    add_overrides(layers, overrides)
    _refuse_llm_foundry(layers.tree, layers.name)
    return layers


def recipe_of(layers: Layers, world_size: int | None = None, check: bool = True) -> Recipe:
    """Resolve and check what recipe files and overrides say; the arguments are :func:`load_recipe`'s.

    Raises:
        ConfigError: With every problem found.
    """
    resolver, builder = Resolver(), Builder()
    recipe = builder.build(Recipe, resolver.resolve(with_defaults(layers.tree)))
    found = resolver.problems | {problem.path: problem for problem in builder.problems}
    elsewhere = tuple(f"{problem.suggestion}." for problem in found.values() if problem.suggestion)
    said = {path for path in builder.missing if f"{path}.".startswith(elsewhere)}  # under another name
    found = {path: problem for path, problem in found.items() if path not in said}
    # One bad value is one problem, not one more for each key that refers to it.
    derived = {path for path in found if not found.keys().isdisjoint(_sources(path, resolver.references))}
    own = [problem for path, problem in found.items() if path not in derived] or list(found.values())
    related = check_recipe(recipe, world_size, skip=builder.unsound) if check else []
    if problems := [*layers.problems, *own, *related]:
        if layers.chained:
            found_here = [*own, *related]
            problems = [*layers.problems, *(_located(each, layers.origin(each.path)) for each in found_here)]
        if builder.missing:
            advice = NO_RECIPE if layers.name == OVERRIDES else LACKING if len(builder.missing) > 3 else ""
        else:
            advice = fit_advice(recipe, problems, world_size) if world_size and not builder.unsound else ""
        raise ConfigError(problems, layers.name, advice)
    return recipe


def _upgrade(layers: Layers) -> None:
    """Give a recipe of an earlier format version what its absent keys meant."""
    said = {".".join(leaf): value for leaf, value in leaves_of(layers.tree).items()}
    try:
        now = upgraded(said)
    except ValueError:
        return  # the schema's bounds say the same of the key
    layers.add({tuple(key.split(".")): value for key, value in now.items() if key not in said}, layers.name)
    layers.add({(VERSION_KEY,): FORMAT_VERSION}, layers.name)


def _located(problem: Problem, origin: str) -> Problem:
    return problem if problem.file or origin in ("", OVERRIDE) else replace(problem, file=origin)


def _sources(path: str, references: dict[str, list[str]]) -> set[str]:
    """Find the paths that the value at ``path`` comes from: it, or a mapping above it, refers to them."""
    sources = set()
    for referrer, targets in references.items():
        if path == referrer or path.startswith(f"{referrer}."):
            sources |= {target + path[len(referrer) :] for target in targets}
    return sources


def _refuse_llm_foundry(tree: dict[str, Any], source: str) -> None:
    model = tree.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(name, str) and LLM_FOUNDRY_MODELS.fullmatch(name):
        message = f"{show(name)} is a model of LLM Foundry, whose recipes only `train` and `validate` take, as a file"
        raise ConfigError([Problem("model.name", message, allowed="moe_causal_lm")], source)


def with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """Add every missing key of the schema to ``tree``; interpolations stay as they are written."""
    return filled(Recipe(), tree)
