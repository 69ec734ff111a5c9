"""Checkpoints of Composer's trainer, which LLM Foundry writes: one ``.pt`` file, or the shards of several ranks.

Both are pickles. Of a file torch's ``weights_only`` reader makes tensors, plain values and objects of the few classes
below, which hold numbers alone; of shards a reader of this project's own makes the metadata. Whatever else a file names
is refused by its name, and nothing of it is imported or run.
"""

from __future__ import annotations

import _codecs
import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from moefoundry.checkpoint.format import METADATA_FILE, TensorSpec, read_foreign_metadata
from moefoundry.checkpoint.out_of_core import ShardedTensors
from moefoundry.config import UserError
from moefoundry.conversion.tensor_map import Source

MODEL = "state.model."
"""Prefix of the model's tensors in a sharded checkpoint."""
WRAPPER = "_checkpoint_wrapped_module."
INNER = "model."
"""The Composer model holds the Hugging Face model, or ours, under this name."""
CONFIG = ("integrations", "huggingface", "model", "config", "content")


class WholeTensors:
    """Tensors that are in memory, or mapped.

    Attributes:
        specs: Shape and dtype of each tensor by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """Read a tensor, or the part in ``ranges`` of its leading dims."""
        return self._tensors[name][tuple(slice(*limits) for limits in ranges)]


class ForeignCheckpoint(NamedTuple):
    """Weights of a checkpoint of another trainer.

    Attributes:
        tensors: Tensors of the model.
        config: Config of the Hugging Face model in it, such as an MPT; None where the checkpoint has none.
    """

    tensors: Source
    config: dict[str, Any] | None


def is_foreign(path: Path) -> bool:
    """Tell a checkpoint of Composer: a file, or a directory of shards without this project's manifest."""
    return path.is_file() or ((path / METADATA_FILE).is_file() and not (path / "manifest.json").exists())


def open_foreign(path: Path) -> ForeignCheckpoint:
    """Open a checkpoint of Composer.

    Raises:
        UserError: It cannot be read, holds no model, or names a class that does not belong there.
    """
    if path.is_dir():
        stored = {name: each for name, each in read_foreign_metadata(path).items() if name.startswith(MODEL)}
        tensors: Any = ShardedTensors(
            path, {_own_name(name.removeprefix(MODEL)): each for name, each in stored.items()}
        )
        config = None
    else:
        state = _load(path)
        model = state.get("model")
        if not isinstance(model, dict) or not all(isinstance(each, Tensor) for each in model.values()):
            raise UserError(f"{path}: no checkpoint of Composer: it has no state.model with tensors")
        tensors = WholeTensors({_own_name(str(name)): each for name, each in model.items()})
        config = _config(state)
    if not tensors.specs:
        raise UserError(f"{path}: no checkpoint of Composer: there are no tensors under {MODEL.rstrip('.')}")
    return ForeignCheckpoint(tensors, config)


def _own_name(name: str) -> str:
    return name.replace(WRAPPER, "").removeprefix(INNER)


def _load(path: Path) -> dict[str, Any]:
    """Read the ``state`` of a file; tensors stay mapped."""
    try:
        with torch.serialization.safe_globals(_harmless()):
            document = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whose text advises to load it without restriction
        named = re.search(r"GLOBAL (\S+)", str(error))
        refusal = f"{named[1]} does not belong there; refused" if named else "not what torch.save has written"
        raise UserError(f"{path}: unreadable checkpoint: {refusal}") from None
    state = document.get("state") if isinstance(document, dict) else None
    return state if isinstance(state, dict) else {}


def _harmless() -> list[Any]:
    """List what Composer's checkpoints hold beside tensors: random states of NumPy, durations and versions."""
    make_array = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    arrays = [make_array, (make_array, "numpy.core.multiarray._reconstruct"), np.ndarray, np.dtype]
    return [*arrays, type(np.dtype(np.uint32)), _codecs.encode, timedelta, TorchVersion]


def _config(state: Mapping[str, Any]) -> dict[str, Any] | None:
    found: Any = state
    for name in CONFIG:
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else None
