"""Write and read one checkpoint directory with torch's distributed checkpoint (DCP).

Each rank writes its shards; DCP works out which bytes of which file a reader on another mesh needs. DCP's own reader
unpickles ``.metadata`` without restriction; here only the few classes that belong there are accepted, and since every
entry is a tensor, nothing else is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefoundry.checkpoint.document import read_state
from moefoundry.checkpoint.format import read_metadata, tensor_entries
from moefoundry.checkpoint.load import LoadReport, load, read_index
from moefoundry.checkpoint.manifest import Origin
from moefoundry.checkpoint.ranks import from_every_rank, rank
from moefoundry.checkpoint.store import STATE_FILE
from moefoundry.checkpoint.writer import (
    data_file,
    local_pieces,
    make_plan,
    saying,
    together,
    write_index,
    write_pieces,
)
from moefoundry.config import ConfigError, ModelConfig
from moefoundry.config.build import Builder


def write(
    directory: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], origin: Origin | None = None
) -> None:
    """Write and commit a checkpoint in an existing, empty directory; every rank calls it.

    Args:
        directory: The staging directory, on storage that all ranks share.
        tensors: This rank's tensors (shards as DTensors); names that several ranks give must mean the same tensor.
        state: JSON document, the same on every rank.
        origin: Where the checkpoint comes from.

    Raises:
        UserError: A disk is full or fails.
        ValueError: The shards of a tensor do not make it up.
    """
    held = local_pieces(tensors)
    plan = make_plan(from_every_rank(list(held)))
    with together(), saying("cannot write"):
        written = write_pieces(directory / data_file(rank()), [held[piece] for piece in plan[rank()]])
    parts = from_every_rank(written)
    with together(), saying("cannot write"):
        if rank() == 0:
            places = {
                piece: place
                for pieces, (places, _) in zip(plan, parts, strict=True)
                for piece, place in zip(pieces, places, strict=True)
            }
            blocks = {data_file(number): blocks for number, (_, blocks) in enumerate(parts)}
            write_index(directory, places, blocks, state, origin or Origin(world_size=len(plan)))


def read_model_config(directory: Path) -> ModelConfig:
    """The model that a checkpoint holds.

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


def stored_shapes(directory: Path) -> dict[str, torch.Size]:
    """Name and full shape of every tensor of a checkpoint."""
    return {name: entry.size for name, entry in tensor_entries(read_metadata(directory)).items()}


def holds_ema(directory: Path) -> bool:
    """Whether a checkpoint holds the moving average of the parameters."""
    return any(name.startswith("ema/") for name in stored_shapes(directory))


def read_into(directory: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> LoadReport:
    """:func:`load.load`: fill ``tensors``, and ``own`` of this rank alone, in place from a checkpoint of any mesh."""
    return load(read_index(directory), tensors, own)
