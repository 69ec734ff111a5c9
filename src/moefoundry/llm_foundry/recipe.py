"""Recipes of LLM Foundry: recognized by ``model.name``, read as LLM Foundry reads them, their keys checked."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from moefoundry.config.dump import redacted
from moefoundry.config.errors import ConfigError, Problem, first_few
from moefoundry.config.loader import LLM_FOUNDRY_MODELS
from moefoundry.config.secrets import REDACTED, looks_secret
from moefoundry.config.spec import show
from moefoundry.llm_foundry.keys import BOOLEAN, INTEGER, LIST, MAPPING, REQUIRED, TOGETHER_WITH, TRAIN_KEYS

ALLOW_CODE = "--allow-code-paths"
_FITS = {
    MAPPING: lambda value: isinstance(value, dict),
    LIST: lambda value: isinstance(value, list),
    INTEGER: lambda value: isinstance(value, int) or (isinstance(value, str) and value.lstrip("-").isdecimal()),
    BOOLEAN: lambda value: isinstance(value, (bool, int, str)),
}


@dataclass(frozen=True)
class FoundryRecipe:
    """A recipe of LLM Foundry.

    Attributes:
        path: Its file.
        tree: Its keys and values; interpolations are resolved.
    """

    path: str
    tree: dict[str, Any]

    def describe(self) -> str:
        """Sum the recipe up in a line."""
        model, tree = self.tree["model"], self.tree
        ffn = (model.get("ffn_config") or {}).get("ffn_type")
        return (
            f"{self.path}: a recipe of LLM Foundry: {model['name']}{f' with ffn_type {ffn}' if ffn else ''}; "
            f"{tree['max_duration']} of {tree['global_train_batch_size']} x {tree['max_seq_len']} tokens"
        )


def read_foundry_recipe(path: str | None, overrides: Sequence[str] = ()) -> FoundryRecipe | None:
    """Read a recipe of LLM Foundry; return None if it is none, or no readable file.

    Args:
        path: A YAML file.
        overrides: ``key=value`` strings, read as LLM Foundry reads them.

    Raises:
        ConfigError: An override is not ``key=value``, or an interpolation cannot be resolved.
    """
    try:
        text = Path(path).read_text() if path is not None else ""
        if path is None or not any(map(LLM_FOUNDRY_MODELS.search, (text, *overrides))):
            return None
        config = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(list(overrides)))
        name = OmegaConf.select(config, "model.name")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, ValueError):
        return None  # the reader of this project's own recipes says what is wrong
    if not isinstance(name, str) or not LLM_FOUNDRY_MODELS.fullmatch(name):
        return None
    if bad := [word for word in overrides if "=" not in word]:
        raise ConfigError([Problem(word, "an override is written key=value") for word in bad], path)
    return FoundryRecipe(path, resolved(config, path))


def resolved(config: Any, path: str) -> dict[str, Any]:
    """Resolve interpolations. The environment is not read: LLM Foundry takes ``oc.env`` away, too."""
    assert isinstance(config, DictConfig)
    known = OmegaConf.has_resolver("oc.env")
    OmegaConf.clear_resolver("oc.env")
    try:
        tree: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key or "recipe")
        raise ConfigError([Problem(key, f"cannot be resolved: {str(error).splitlines()[0]}")], path) from None
    finally:
        if known:
            OmegaConf.register_resolver("oc.env", oc.env)  # recipes of this project may use it
    return dict(tree)


def check_foundry_recipe(recipe: FoundryRecipe, world_size: int | None, allow_code: bool) -> None:
    """Check the keys as LLM Foundry does, before its imports.

    Args:
        recipe: The recipe.
        world_size: Number of ranks, where it is known.
        allow_code: Files of ``code_paths`` may run.

    Raises:
        ConfigError: With every problem found.
    """
    if problems := list(_problems(recipe.tree, world_size, allow_code)):
        raise ConfigError(problems, recipe.path)


def _problems(tree: dict[str, Any], world_size: int | None, allow_code: bool) -> Iterator[Problem]:
    for name, value in tree.items():
        if name not in TRAIN_KEYS:
            near = difflib.get_close_matches(name, TRAIN_KEYS, 1, 0.8)
            allowed = "LLM Foundry's keys; variables stand under `variables`"
            yield Problem(name, "no key of LLM Foundry's train recipes", allowed, near[0] if near else "")
        elif value is not None and (kind := TRAIN_KEYS[name]) and not _FITS[kind](value):
            yield Problem(name, f"got {show(value)}", kind)
        if name in TOGETHER_WITH and TOGETHER_WITH[name] in tree:
            yield Problem(name, f"is computed from {TOGETHER_WITH[name]} and not set beside it")
    for name in REQUIRED:
        if tree.get(name) is None:
            yield Problem(name, "missing, and LLM Foundry has no default")
    for name in ("model", "optimizer", "scheduler", "train_loader", "tokenizer"):
        if isinstance(section := tree.get(name), dict) and not isinstance(section.get("name"), str):
            yield Problem(f"{name}.name", "missing", "a string")
    for name in ("ffn_config", "attn_config"):
        model = tree.get("model")
        if isinstance(model, dict) and (value := model.get(name)) is not None and not isinstance(value, dict):
            yield Problem(f"model.{name}", f"got {show(value)}", MAPPING)
    yield from _loader_problems(tree)
    if (files := tree.get("code_paths")) and not allow_code:
        shown = first_few([str(file) for file in files])
        yield Problem("code_paths", f"would run the code of {shown}", f"the option {ALLOW_CODE}, if you trust it")
    batch = tree.get("global_train_batch_size")
    if world_size and isinstance(batch, int) and batch % world_size:
        yield Problem("global_train_batch_size", f"{batch} is not divisible by {world_size} ranks")


def _loader_problems(tree: dict[str, Any]) -> Iterator[Problem]:
    loaders: dict[str, Any] = {"train_loader": tree.get("train_loader"), "eval_loader": tree.get("eval_loader")}
    if isinstance(several := tree.get("eval_loader"), list):
        loaders = {"train_loader": tree.get("train_loader")}
        loaders |= {f"eval_loader[{index}]": loader for index, loader in enumerate(several)}
        for path in [path for path, loader in loaders.items() if path != "train_loader" and isinstance(loader, dict)]:
            if not loaders[path].get("label"):
                yield Problem(f"{path}.label", "missing: there are several loaders", "a name for its metrics")
    for path, loader in loaders.items():
        if loader is not None and not isinstance(loader, dict):
            yield Problem(path, f"got {show(loader)}", MAPPING)
        elif isinstance(loader, dict) and path != "train_loader" and not isinstance(loader.get("name"), str):
            yield Problem(f"{path}.name", "missing", "a string")


def without_secrets(value: Any, path: str = "") -> Any:
    """Copy a plain value; hide strings that look like secrets, and those under keys that are named like one."""
    if isinstance(value, dict):
        return {
            name: REDACTED
            if isinstance(child, str) and looks_secret(str(name))
            else without_secrets(child, f"{path}.{name}" if path else str(name))
            for name, child in value.items()
        }
    if isinstance(value, list):
        return [without_secrets(item, path) for item in value]
    return redacted(value, path)
