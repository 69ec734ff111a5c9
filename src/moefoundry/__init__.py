"""Train Mixture-of-Experts language models from YAML recipes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from moefoundry.model.transformer import MoETransformer

__version__ = "0.1.0"


def from_pretrained(
    path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> MoETransformer:
    """The model of a Hugging Face directory, in evaluation mode: ``model(input_ids)`` gives logits [B, S, V].

    Args:
        path: Holds config.json and safetensors.
        dtype: Of the parameters; None is fp32. Buffers keep theirs.
        device: Where the model is.

    Raises:
        UserError: The config means a model that is not here; or a tensor is missing, too many or misshapen (all are
            named); or the weights are pickled, or quantized other than in FP8 blocks.
    """
    convert = importlib.import_module("moefoundry.conversion.convert")  # torch takes seconds to import
    model: MoETransformer = convert.from_pretrained(Path(path), dtype, device)
    return model
