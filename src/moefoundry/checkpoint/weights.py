"""Read the model of a checkpoint on one device, its config and its tokenizer."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from moefoundry.checkpoint.format import read_metadata, stored_tensors
from moefoundry.checkpoint.load import read_into
from moefoundry.checkpoint.manifest import STATE_FILE, read_state
from moefoundry.checkpoint.store import TOKENIZER, find_checkpoint, using
from moefoundry.config import ConfigError, ModelConfig, UserError
from moefoundry.config.build import Builder
from moefoundry.data.tokenizer_files import has_tokenizer
from moefoundry.model.transformer import MoETransformer, meta_model


class Weights(StrEnum):
    """Kind of values of the parameters; their names in a checkpoint begin with it. Buffers have one value."""

    trained = "model"
    ema = "ema"


def load_model(checkpoint: Path, weights: Weights = Weights.trained) -> MoETransformer:
    """Load the model of a checkpoint in fp32 on the CPU, in evaluation mode.

    Raises:
        UserError: It cannot be read, or lacks the average.
    """
    model = meta_model(read_model_config(checkpoint)).to_empty(device="cpu")
    names = stored_names(checkpoint, model, weights)
    with using(checkpoint):
        read_into(checkpoint, {names[name]: tensor for name, tensor in model.state_dict().items()})
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
    tree: dict[str, Any] = {}
    for key, value in read_state(directory)["recipe"].items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    builder = Builder()
    cfg: ModelConfig = builder.build(ModelConfig, tree.get("model", {}), "model")
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
