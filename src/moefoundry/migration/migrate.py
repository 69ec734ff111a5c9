"""Recognize an old recipe, and turn it into a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moefoundry.config.errors import ConfigError, Problem, UserError
from moefoundry.config.layers import EXTENDS
from moefoundry.config.versions import VERSION_KEY
from moefoundry.llm_foundry.recipe import resolved
from moefoundry.migration import axolotl, composer, llm_foundry
from moefoundry.migration.report import Migration


def migrate_recipe(path: Path, world_size: int = 1) -> Migration:
    """Turn a recipe of LLM Foundry, Composer or axolotl into one of this project, in memory.

    Args:
        path: A YAML file.
        world_size: Number of ranks, from which some recipes' batch size follows.

    Raises:
        UserError: It cannot be read, or is none of these.
    """
    config = _load(path)
    written: Any = OmegaConf.to_container(config, resolve=False)
    if is_own(written):  # whose interpolations may refer to defaults
        raise UserError(f"{path}: is a recipe of moefoundry already; `moefoundry validate` checks it")
    tree = resolved(config, str(path))
    if llm_foundry.is_llm_foundrys(tree):
        return llm_foundry.migrate(path, written, tree)
    if axolotl.is_axolotls(tree):
        return axolotl.migrate(path, tree, world_size)
    if composer.is_composers(tree):
        return composer.migrate(path, tree)
    raise UserError(f"{path}: no recipe of LLM Foundry (model.name), Composer (max_duration) or axolotl (base_model)")


def is_own(tree: dict[str, Any]) -> bool:
    """Tell a recipe of this project by keys that no other has."""
    model = tree.get("model")
    own = isinstance(model, dict) and ("moe" in model or model.get("name") == "moe_causal_lm")
    return own or EXTENDS in tree or VERSION_KEY in tree or any(key.startswith("model.moe.") for key in tree)


def read_tree(path: Path) -> dict[str, Any]:
    """Read a file as OmegaConf does, with interpolations resolved.

    Raises:
        UserError: It cannot be read, is no mapping, or an interpolation cannot be resolved.
    """
    return resolved(_load(path), str(path))


def _load(path: Path) -> DictConfig:
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
        raise UserError(f"{path}: cannot be read: {reason}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, DictConfig):
        raise ConfigError([Problem(str(path), "the top level is a list", allowed="a mapping of keys to values")])
    return config
