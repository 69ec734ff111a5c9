"""The model of a checkpoint on one device, and what belongs to it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from moefoundry.checkpoint import io
from moefoundry.checkpoint.store import TOKENIZER, find_checkpoint, using
from moefoundry.config import UserError
from moefoundry.data.tokenizer_files import has_tokenizer
from moefoundry.model.transformer import MoETransformer, meta_model


class Weights(StrEnum):
    """Which values of the parameters are read; their names in a checkpoint begin with it. Buffers have one value."""

    trained = "model"
    ema = "ema"


def load_model(checkpoint: Path, weights: Weights = Weights.trained) -> MoETransformer:
    """The model of a checkpoint in fp32 on the CPU, in evaluation mode.

    Raises:
        UserError: It cannot be read, or lacks the average.
    """
    model = meta_model(io.read_model_config(checkpoint)).to_empty(device="cpu")
    names = stored_names(checkpoint, model, weights)
    with using(checkpoint):
        io.read_into(checkpoint, {names[name]: tensor for name, tensor in model.state_dict().items()})
    return model.eval()


def stored_names(directory: Path, model: MoETransformer, weights: Weights) -> dict[str, str]:
    """What a checkpoint calls each parameter and buffer of its model.

    Raises:
        UserError: The average is wanted, and it holds none.
    """
    if weights == Weights.ema and not io.holds_ema(directory):
        raise UserError(f"{directory}: the checkpoint holds no moving average; the recipe's key ema keeps one")
    buffers = {name for name, _ in model.named_buffers()}
    return {name: f"{Weights.trained if name in buffers else weights}/model.{name}" for name in model.state_dict()}


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
    """Where a checkpoint's tokenizer should be: its own, or else that of its run; None where it has neither."""
    if has_tokenizer(checkpoint / TOKENIZER):
        return checkpoint / TOKENIZER
    name = recipe.get("tokenizer.name")
    return None if name is None else Path(name)
