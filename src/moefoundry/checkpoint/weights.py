"""Read the model of a checkpoint on one device, its config and its tokenizer; adapters are merged into their base."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from moefoundry.adapters import apply_lora, merge, trained_names, unloaded
from moefoundry.checkpoint.base import base_at
from moefoundry.checkpoint.format import read_metadata, stored_tensors
from moefoundry.checkpoint.load import read_into
from moefoundry.checkpoint.manifest import BASE, STATE_FILE, read_state
from moefoundry.checkpoint.store import TOKENIZER, find_checkpoint, using
from moefoundry.config import ConfigError, LoraConfig, ModelConfig, UserError
from moefoundry.config.build import Builder
from moefoundry.data.tokenizer_files import has_tokenizer
from moefoundry.model.transformer import MoETransformer, meta_model

PREFIX = "model/model."
"""Prefix of a parameter's name in a checkpoint: Composer's model holds ours under ``model``."""


class Weights(StrEnum):
    """Kind of values of the parameters; their names in a checkpoint begin with it. Buffers have one value."""

    trained = "model"
    ema = "ema"


def load_model(checkpoint: Path, weights: Weights = Weights.trained) -> MoETransformer:
    """Load the model of a checkpoint in fp32 on the CPU, in evaluation mode.

    Raises:
        UserError: It cannot be read, or lacks the average; or it has adapters, and their base is not to be had.
    """
    model, lora = meta_model(read_model_config(checkpoint)), read_lora_config(checkpoint)
    if lora is not None:
        apply_lora(model, lora)
    model.to_empty(device="cpu")
    names, tensors = stored_names(checkpoint, model, weights), model.state_dict()
    stored_here = trained_names(model)
    trained = {name: tensor for name, tensor in tensors.items() if lora is None or name in stored_here}
    with using(checkpoint), base_at(checkpoint) as base:
        if base is not None:
            frozen = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items() if name not in trained}
            read_into(base, frozen)
        read_into(checkpoint, {names[name]: tensor for name, tensor in trained.items()})
    if lora is not None:
        merge(model)
        unloaded(model)
        model.requires_grad_(True)
    return model.eval()


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
    cfg: ModelConfig = _section(directory, "model", ModelConfig)
    return cfg


def read_lora_config(directory: Path) -> LoraConfig | None:
    """Read the config of the adapters that a checkpoint holds; None where it holds whole weights.

    Raises:
        UserError: As :func:`read_model_config`.
    """
    if BASE not in read_state(directory):
        return None
    cfg: LoraConfig = _section(directory, "lora", LoraConfig)
    return cfg


def _section(directory: Path, name: str, cls: type) -> Any:
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
