"""Write and read one checkpoint directory with torch's distributed checkpoint (DCP).

Each rank writes its shards; DCP works out which bytes of which file a reader on another mesh needs. DCP's own reader
unpickles ``.metadata`` without restriction; here only the few classes that belong there are accepted, and since every
entry is a tensor, nothing else is ever unpickled.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moefoundry.checkpoint.store import STATE_FILE
from moefoundry.config import ConfigError, ModelConfig, UserError
from moefoundry.config.build import Builder

METADATA_FILE = ".metadata"
STATE_KEYS = ("timestamp", "schedulers", "data", "world_size", "recipe")
WEIGHTS_ONLY = "weights_only"
"""Marks the state of a checkpoint without optimizer, schedule and position: besides it, only ``recipe`` is there, with
the keys of ``model``. A run that starts from it trains from its first batch on."""

_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "StorageMeta",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_device"),
    ("torch", "device"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if is_dtype or (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there; refused")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA_FILE
        try:
            metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        except Exception as error:  # damaged pickles raise nearly anything
            raise UserError(f"{path}: unreadable checkpoint metadata: {error}") from error
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise UserError(f"{path}: entry {name!r} is no tensor; refused")
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def write(directory: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write a checkpoint into an existing, empty directory; every rank calls it.

    Args:
        directory: The staging directory, on storage that all ranks share.
        tensors: This rank's tensors (shards as DTensors); names that several ranks give must mean the same tensor.
        state: JSON document, the same on every rank; written last, by rank 0.
    """
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(directory, single_file_per_rank=True), no_dist=_no_dist())
    if _no_dist() or dist.get_rank() == 0:
        (directory / STATE_FILE).write_text(json.dumps(state, indent=1))


def read_state(directory: Path) -> dict[str, Any]:
    """The JSON document of a checkpoint.

    Raises:
        UserError: It is missing or damaged, or lacks one of :data:`STATE_KEYS` (with :data:`WEIGHTS_ONLY`: the recipe).
    """
    path = directory / STATE_FILE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable checkpoint state: {error}") from error
    if not isinstance(state, dict):
        state = {}
    missing = [key for key in (("recipe",) if state.get(WEIGHTS_ONLY) else STATE_KEYS) if key not in state]
    if missing:
        raise UserError(f"{path}: incomplete checkpoint state: it lacks {', '.join(missing)}")
    return state


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


def read_metadata(directory: Path) -> Metadata:
    """Which tensors a checkpoint holds, and where.

    Raises:
        UserError: The file is missing or damaged, or names anything but tensors.
    """
    return _Reader(directory).read_metadata()


def slice_reader(directory: Path, file: IO[bytes], place: _StorageInfo) -> IO[bytes]:
    """The part of an open data file that holds one tensor, as a file."""
    return _Reader(directory)._slice_file(file, place)


def stored_shapes(directory: Path) -> dict[str, torch.Size]:
    """Name and full shape of every tensor of a checkpoint."""
    entries = read_metadata(directory).state_dict_metadata
    return {name: entry.size for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def read_into(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place from a checkpoint of any mesh; every rank calls it.

    Raises:
        UserError: A tensor is missing from the checkpoint, or has another shape there (all are named); or a file
            cannot be read.
    """
    stored = stored_shapes(directory)
    problems = [
        f"{name}: "
        + (f"has shape {tuple(stored[name])} there, {tuple(tensor.shape)} here" if name in stored else "missing")
        for name, tensor in tensors.items()
        if stored.get(name) != tensor.shape
    ]
    if problems:
        raise UserError(f"{directory} does not fit this model: " + "; ".join(problems[:8]))
    try:
        dcp.load(tensors, storage_reader=_Reader(directory), no_dist=_no_dist())
    except dcp.CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
        raise UserError(f"{directory}: unreadable checkpoint: {reason}") from error


def _no_dist() -> bool:
    return not dist.is_initialized()
