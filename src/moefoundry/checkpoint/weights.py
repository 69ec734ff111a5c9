"""Read the model of a checkpoint on one device or a mesh, its config and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from moefoundry.adapters import apply_lora, merge, trained_names, unloaded
from moefoundry.checkpoint.base import base_at
from moefoundry.checkpoint.format import read_metadata, stored_tensors
from moefoundry.checkpoint.load import read_into
from moefoundry.checkpoint.manifest import BASE, STATE_FILE, read_state
from moefoundry.checkpoint.store import TOKENIZER, find_checkpoint, using
from moefoundry.config import ConfigError, LoraConfig, ModelConfig, PrecisionConfig, UserError
from moefoundry.config.build import Builder
from moefoundry.data.tokenizer_files import has_tokenizer
from moefoundry.mesh import Meshes
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.parallel import parallelize

PREFIX = "model/model."
"""Prefix of a parameter's name in a checkpoint: Composer's model holds ours under ``model``."""


class Weights(StrEnum):
    """Kind of values of the parameters; their names in a checkpoint begin with it. Buffers have one value."""

    trained = "model"
    ema = "ema"


def load_model(
    checkpoint: Path,
    weights: Weights = Weights.trained,
    meshes: Meshes | None = None,
    device: torch.device | str = "cpu",
    base_place: str | None = None,
) -> MoETransformer:
    """Load the model of a checkpoint in fp32, in evaluation mode.

    Adapters are merged into their base; on a mesh they stay beside it, which computes the same.

    Args:
        checkpoint: The checkpoint, of any mesh.
        weights: Values to take for the parameters; of a checkpoint of adapters, for these.
        meshes: Meshes to shard it on, on every rank; None loads all of it.
        device: Device of this rank's share.
        base_place: Where the base of the adapters is now; None is where it was.

    Raises:
        UserError: It cannot be read, or lacks the average; or it has adapters, and their base is not to be had.
    """
    model, lora = meta_model(read_model_config(checkpoint)), read_lora_config(checkpoint)
    if lora is not None:
        apply_lora(model, lora)
    if meshes is not None:
        parallelize(model, meshes, PrecisionConfig())
    model.to_empty(device=device)
    names, tensors = stored_names(checkpoint, model, weights), model.state_dict()
    trained = tensors if lora is None else {name: tensors[name] for name in _held(checkpoint, model, names)}
    with using(checkpoint), base_at(checkpoint, base_place) as base:
        if base is not None:
            frozen = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items() if name not in trained}
            read_into(base, frozen)
        read_into(checkpoint, {names[name]: tensor for name, tensor in trained.items()})
    if lora is not None and meshes is None:
        merge(model)
        unloaded(model)
        model.requires_grad_(True)
    return model.eval()


def _held(checkpoint: Path, model: MoETransformer, names: Mapping[str, str]) -> list[str]:
    """List what a checkpoint of adapters holds of its model; buffers that it lacks are as in its base."""
    stored, buffers = stored_shapes(checkpoint), {name for name, _ in model.named_buffers()}
    return sorted(name for name in trained_names(model) if names[name] in stored or name not in buffers)


def stored_names(directory: Path, model: MoETransformer, weights: Weights) -> dict[str, str]:
    """Map each parameter and buffer of a model to its name in a checkpoint.

    Raises:
        UserError: The average is wanted, and it holds none.
    """
    if weights == Weights.ema and not any(name.startswith("ema/") for name in stored_shapes(directory)):
        raise UserError(f"{directory}: the checkpoint holds no moving average; the recipe's key ema keeps one")
    buffers = {name for name, _ in model.named_buffers()}
    return {name: f"{Weights.trained if name in buffers else weights}/model.{name}" for name in model.state_dict()}


def read_model_config(directory: Path) -> ModelConfig:
    """Read the config of the model that a checkpoint holds.

    Raises:
        UserError: As :func:`read_state`; or its keys are not those of this release.
    """
    cfg: ModelConfig = read_section(directory, "model", ModelConfig)
    return cfg


def read_lora_config(directory: Path) -> LoraConfig | None:
    """Read the config of the adapters that a checkpoint holds; None where it holds whole weights.

    Raises:
        UserError: As :func:`read_model_config`.
    """
    if BASE not in read_state(directory):
        return None
    cfg: LoraConfig = read_section(directory, "lora", LoraConfig)
    return cfg


def read_section(directory: Path, name: str, cls: type) -> Any:
    """Read one mapping of the recipe that a checkpoint holds; as :func:`read_model_config`.

    Args:
        directory: The checkpoint.
        name: Key of the mapping.
        cls: Its dataclass.
    """
    tree: dict[str, Any] = {}
    for key, value in read_state(directory)["recipe"].items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    builder = Builder()
    cfg = builder.build(cls, tree.get(name, {}), name)
    if builder.problems:
        raise ConfigError(builder.problems, str(directory / STATE_FILE))
    return cfg


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Read name and full shape of every tensor of a checkpoint."""
    return {name: tensor.spec.shape for name, tensor in stored_tensors(read_metadata(directory)).items()}


def named_checkpoint(path: Path) -> Path:
    """Find the checkpoint that a directory is, or the newest of the run that it holds.

    Raises:
        UserError: There is none.
    """
    try:
        return find_checkpoint(str(path))
    except UserError:
        raise UserError(f"{path}: no complete checkpoint there") from None


def tokenizer_of(checkpoint: Path, recipe: dict[str, Any]) -> Path | None:
    """Find the tokenizer of a checkpoint: its own, or else that of its run; None where it has neither."""
    if has_tokenizer(checkpoint / TOKENIZER):
        return checkpoint / TOKENIZER
    name = recipe.get("tokenizer.name")
    return None if name is None else Path(name)
