"""Samples of a shard, read in parts: of a long document, a row needs no more than it holds.

mosaicml-streaming opens the file and decodes all of a sample each time; a document of many rows would be read as often
as it has rows. Here files stay open, and an array is read as it is sliced. The format is MDS, version 2: at byte 4 the
places of the samples, uint32, and in each sample the size of every column that has not one size, uint32, then the
columns. An array of any length begins with a byte, ``ndim << 2 | k``, and its shape in integers of ``2**k`` bytes.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.format.mds.reader import MDSReader

from moefoundry.config.errors import DataError

OPEN_FILES = 64
ARRAY = "ndarray"


@dataclass(frozen=True)
class StoredArray:
    """A one-dimensional array in a file.

    Attributes:
        file: Descriptor of the file, which is open.
        place: Its path, for errors.
        offset: Byte at which the values begin.
        dtype: Their type.
        length: Their number.
    """

    file: int
    place: Path
    offset: int
    dtype: np.dtype[Any]
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> NDArray[Any]:
        """Read a part.

        Raises:
            DataError: The file has become shorter.
        """
        start, stop, _ = part.indices(self.length)
        size = (stop - start) * self.dtype.itemsize
        content = os.pread(self.file, size, self.offset + start * self.dtype.itemsize)
        if len(content) != size:
            raise DataError(f"{self.place}: truncated while it was read")
        return np.frombuffer(content, self.dtype)


@dataclass(frozen=True)
class _Shard:
    """A shard whose file is open: its samples' places [samples + 1], and its columns with their encodings and sizes."""

    file: int
    path: Path
    places: NDArray[np.uint32]
    columns: tuple[tuple[str, list[str], int | None], ...]


class StoredSamples:
    """Reader of samples; the files read last stay open. Each process opens its own."""

    def __init__(self) -> None:
        self._shards: OrderedDict[int, _Shard] = OrderedDict()

    def __reduce__(self) -> tuple[type[StoredSamples], tuple[()]]:
        return type(self), ()

    def __del__(self) -> None:
        for shard in self._shards.values():
            os.close(shard.file)

    def sample(self, number: int, reader: MDSReader, index: int) -> Mapping[str, StoredArray]:
        """Find the arrays of a sample.

        Args:
            number: Number of the shard.
            reader: The library's reader of it; the file is there, and has been checked.
            index: Number of the sample within the shard.

        Raises:
            DataError: The file has been removed, or cut.
        """
        shard = self._shards.get(number) or self._open(number, reader)
        self._shards.move_to_end(number)
        begin = int(shard.places[index])
        head = os.pread(shard.file, 4 * len(shard.columns), begin)
        sizes, at = iter(np.frombuffer(head[: len(head) // 4 * 4], np.uint32).tolist()), begin
        of_columns = [next(sizes, 0) if size is None else size for _, _, size in shard.columns]
        at += 4 * sum(size is None for _, _, size in shard.columns)
        found = {}
        for (name, encoding, _), size in zip(shard.columns, of_columns, strict=True):
            if encoding[0] == ARRAY and len(encoding) > 1:
                header = 0 if len(encoding) > 2 else self._header(shard, at)
                dtype = np.dtype(encoding[1])
                found[name] = StoredArray(shard.file, shard.path, at + header, dtype, (size - header) // dtype.itemsize)
            at += size
        return found

    def _open(self, number: int, reader: MDSReader) -> _Shard:
        path = Path(reader.dirname, reader.split, reader.raw_data.basename)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; it was there when it was checked") from error
        places = np.frombuffer(os.pread(file, 4 * (reader.samples + 1), 4), np.uint32)
        columns = zip(reader.column_names, reader.column_encodings, reader.column_sizes, strict=True)
        shard = _Shard(file, path, places, tuple((name, code.split(":"), size) for name, code, size in columns))
        if len(places) != reader.samples + 1:
            raise DataError(f"{path}: truncated while it was read")
        self._shards[number] = shard
        if len(self._shards) > OPEN_FILES:
            os.close(self._shards.popitem(last=False)[1].file)
        return shard

    def _header(self, shard: _Shard, at: int) -> int:
        """Count the bytes before the values of an array of any length."""
        code = os.pread(shard.file, 1, at)
        if not code:
            raise DataError(f"{shard.path}: truncated while it was read")
        return 1 + (code[0] >> 2) * 2 ** (code[0] & 3)
