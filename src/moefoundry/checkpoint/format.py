"""The file format of torch's distributed checkpoint (DCP): its terms as types, and how to read it without trusting it.

``.metadata`` is a pickle that says which tensors there are and where the shards of each lie; the bytes of a shard are
what ``torch.save`` makes of one tensor. DCP's own reader unpickles ``.metadata`` without restriction; here only the few
classes that belong there are accepted, and since every entry is a tensor, nothing else is ever unpickled.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from moefoundry.config import UserError

if TYPE_CHECKING:
    from typing_extensions import Buffer

METADATA_FILE = ".metadata"

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
_FOREIGN_CLASSES = {("torch.distributed.checkpoint.metadata", "BytesStorageMetadata")}


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Box(NamedTuple):
    """Indices of a tensor, in each dim from ``first`` on and below ``last``."""

    first: tuple[int, ...]
    last: tuple[int, ...]

    @classmethod
    def at(cls, offsets: Sequence[int], sizes: Sequence[int]) -> Box:
        """Make the box of these sizes whose first index is ``offsets``."""
        return cls(tuple(offsets), tuple(a + size for a, size in zip(offsets, sizes, strict=True)))

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Make the box of all indices of a tensor."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def sizes(self) -> torch.Size:
        """Number of indices in each dim."""
        return torch.Size([b - a for a, b in zip(self.first, self.last, strict=True)])

    @property
    def numel(self) -> int:
        """Number of values."""
        return self.sizes.numel()

    def of(self, values: Tensor, outer: Box) -> Tensor:
        """View this box of ``values``, the values of the box ``outer``."""
        return values[tuple(slice(a - o, b - o) for a, b, o in zip(self.first, self.last, outer.first, strict=True))]


class FileRange(NamedTuple):
    """Bytes of a file of a checkpoint: ``length`` from ``offset`` on."""

    file: str
    offset: int
    length: int


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint: its shards do not overlap, and the range of each holds what ``torch.save`` wrote."""

    spec: TensorSpec
    shards: Mapping[Box, FileRange]


class _MetadataUnpickler(pickle.Unpickler):
    """Makes objects of the few classes that belong into metadata; ``further`` ones are those of other trainers."""

    def __init__(self, content: bytes, further: Collection[tuple[str, str]] = ()) -> None:
        super().__init__(io.BytesIO(content))
        self._further = further

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if is_dtype or (module, name) in _METADATA_CLASSES or (module, name) in self._further:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong there; refused")


def read_metadata(directory: Path) -> Metadata:
    """Read which tensors a checkpoint holds, and where.

    Raises:
        UserError: The file is missing or damaged, or names anything but tensors.
    """
    path = directory / METADATA_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: unreadable checkpoint metadata: {error}") from error
    return parse_metadata(path, content)


def read_foreign_metadata(directory: Path) -> dict[str, StoredTensor]:
    """Read which tensors a checkpoint of another trainer holds; its entries that are no tensors are left out, unread.

    Raises:
        UserError: The file is missing or damaged, names a class that does not belong there, or a file elsewhere.
    """
    path = directory / METADATA_FILE
    try:
        metadata: Metadata = _MetadataUnpickler(path.read_bytes(), _FOREIGN_CLASSES).load()
        entries = metadata.state_dict_metadata
        metadata.state_dict_metadata = {
            name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
        }
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"{path}: unreadable checkpoint metadata: {error}") from error
    tensors = stored_tensors(_checked(path, metadata))
    for tensor in tensors.values():
        for place in tensor.shards.values():
            if PurePath(place.file).name != place.file:
                raise UserError(f"{path}: {place.file!r} is no file of the checkpoint; refused")
    return tensors


def parse_metadata(path: Path, content: bytes) -> Metadata:
    """Unpickle the metadata ``content``, which was read from ``path``.

    Raises:
        UserError: As :func:`read_metadata`.
    """
    try:
        metadata: Metadata = _MetadataUnpickler(content).load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise UserError(f"{path}: unreadable checkpoint metadata: {error}") from error
    return _checked(path, metadata)


def _checked(path: Path, metadata: Metadata) -> Metadata:
    try:
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"entry {name!r} is no tensor; refused")
            _check_entry(name, entry, metadata.storage_data)
    except Exception as error:  # unpickled objects may lack anything
        raise UserError(f"{path}: unreadable checkpoint metadata: {error}") from error
    return metadata


def _check_entry(name: str, entry: TensorStorageMetadata, places: Mapping[MetadataIndex, _StorageInfo]) -> None:
    """Check that shards lie inside their tensor, make it up and have the bytes for it, before memory is allocated."""
    if not isinstance(entry.size, torch.Size) or not isinstance(entry.properties.dtype, torch.dtype):
        raise ValueError(f"{name}: no shape or no dtype")
    found = 0
    for chunk in entry.chunks:
        box = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None or any(offset < 0 or size < 0 or offset + size > whole for offset, size, whole in box):
            raise ValueError(f"{name}: a shard is in no file, or outside its tensor")
        numbers = (place.offset, place.length)
        if not isinstance(place.relative_path, str) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name}: {place.relative_path!r}, {numbers} is no place")
        count = math.prod(chunk.sizes)
        if place.length < count * entry.properties.dtype.itemsize:
            raise ValueError(f"{name}: {place.length} bytes for {count} values")
        found += count
    if found != math.prod(entry.size):
        raise ValueError(f"a part of {name} is in no file: shards of {found} values for shape {tuple(entry.size)}")


def stored_tensors(metadata: Metadata) -> dict[str, StoredTensor]:
    """List the tensors of a checkpoint by name, from metadata that :func:`parse_metadata` has checked."""
    entries = cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)
    tensors = {}
    for name, entry in entries.items():
        shards = {}
        for chunk in entry.chunks:
            place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            shards[Box.at(chunk.offsets, chunk.sizes)] = FileRange(place.relative_path, place.offset, place.length)
        tensors[name] = StoredTensor(TensorSpec(tuple(entry.size), entry.properties.dtype), shards)
    return tensors


def layout_in(place: RangeReader, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Read the tensor that ``torch.save`` has written there, on meta: its strides, and where its values are.

    Raises:
        ValueError: It is another tensor than ``shape`` and ``dtype`` say, or none at all.
        OSError: The file cannot be read.
    """
    try:
        layout = torch.load(cast(IO[bytes], place), map_location="meta", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whose text advises to load it without restriction
        named = re.search(r"GLOBAL (\S+)", str(error))
        refusal = f"{named[1]} does not belong there; refused" if named else "not what torch.save has written"
        raise ValueError(refusal) from None
    if not isinstance(layout, Tensor):
        raise ValueError(f"holds a {type(layout).__name__}, no tensor")
    if (layout.shape, layout.dtype) != (shape, dtype):
        raise ValueError(f"holds {layout.dtype} {tuple(layout.shape)}, not {dtype} {tuple(shape)}")
    return layout


def values_in(memory: Buffer, offset: int, layout: Tensor) -> Tensor:
    """View the tensor that ``torch.save`` has written at ``offset`` of ``memory``."""
    storage = layout.untyped_storage()
    count = storage.nbytes() // layout.dtype.itemsize
    if not count:
        return torch.empty(layout.shape, dtype=layout.dtype)
    start = offset + values_offset(layout)
    values = torch.frombuffer(memory, dtype=layout.dtype, count=count, offset=start)
    return values.as_strided(layout.shape, layout.stride(), layout.storage_offset())


def values_offset(layout: Tensor) -> int:
    """Count the bytes from the start of what ``torch.save`` has written to the first value."""
    return int(layout.untyped_storage()._checkpoint_offset or 0)


class RangeReader(io.RawIOBase):
    """A range of bytes of an open file, as a file; the position of the open file is neither used nor moved.

    Attributes:
        bytes_read: Bytes read so far.
    """

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._length = length
        self._position = 0
        self.bytes_read = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        room = max(0, self._length - self._position)
        count = os.preadv(self._descriptor, [memoryview(buffer)[:room]], self._offset + self._position)
        self._position += count
        self.bytes_read += count
        return count
