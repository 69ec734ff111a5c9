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
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from moefoundry.checkpoint.store import STATE_FILE
from moefoundry.config import UserError

METADATA_FILE = ".metadata"
STATE_KEYS = ("timestamp", "schedulers", "data", "world_size", "recipe")
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
        UserError: It is missing or damaged.
    """
    path = directory / STATE_FILE
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable checkpoint state: {error}") from error
    missing = [key for key in STATE_KEYS if key not in state] if isinstance(state, dict) else STATE_KEYS
    if missing:
        raise UserError(f"{path}: incomplete checkpoint state: it lacks {', '.join(missing)}")
    return state


def stored_shapes(directory: Path) -> dict[str, torch.Size]:
    """Name and full shape of every tensor of a checkpoint."""
    entries = _Reader(directory).read_metadata().state_dict_metadata
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
