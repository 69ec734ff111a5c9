"""Shards in mosaicml-streaming's format MDS, of samples that are rows of numbers.

The bytes are those of the library's ``MDSWriter``. To import that takes seconds, as torch and transformers come with
it, and preparation needs nothing else of them.

A shard is ``count`` (uint32), ``count + 1`` offsets of samples from its beginning (uint32), a description of the
columns as JSON, and the samples. A sample is the sizes of its columns (uint32), but for columns of one size, and then
their values. Before the values of a row of any length stand a byte (its rank, and the width of its length) and the
length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from moefoundry.data.identity import INDEX_FILE

HASHES = ["sha1", "xxh64"]  # of every shard, in its index; sorted, as the library has them
RANK_ONE = 1 << 2


class ShardWriter:
    """Writer of the shards of a stream, and of their index.

    Args:
        directory: Directory to make.
        columns: dtype of each column, by name; the names ascend.
        shard_bytes: Size of a shard.
        length: Numbers of each column in every sample; None is any number, but 0.
    """

    def __init__(
        self, directory: Path, columns: Mapping[str, str], shard_bytes: int, length: int | None = None
    ) -> None:
        directory.mkdir()
        self._directory = directory
        self._shard_bytes = shard_bytes
        self._length = length
        shape = "" if length is None else f":{length}"
        sizes = [None if length is None else length * np.dtype(dtype).itemsize for dtype in columns.values()]
        self._config = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": HASHES,
            "size_limit": shard_bytes,
            "column_names": list(columns),
            "column_encodings": [f"ndarray:{dtype}{shape}" for dtype in columns.values()],
            "column_sizes": sizes,
        }
        self._described = json.dumps(self._config, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        self._begin()

    def write(self, *rows: NDArray[Any]) -> None:
        """Write a sample: a row for each column, of its dtype."""
        values = [row.tobytes() for row in rows]
        if self._length is None:
            values = [_length_of(row) + value for row, value in zip(rows, values, strict=True)]
            values.insert(0, np.array([len(value) for value in values], np.uint32).tobytes())
        sample = b"".join(values)
        if self._size + len(sample) + 4 > self._shard_bytes:
            self._end()
        self._samples.append(sample)
        self._size += len(sample) + 4

    def finish(self) -> None:
        """Write the last shard, and the index."""
        if self._samples:
            self._end()
        index = {"version": 2, "shards": self._shards}
        (self._directory / INDEX_FILE).write_text(json.dumps(index, sort_keys=True))

    def _begin(self) -> None:
        self._samples: list[bytes] = []
        self._size = 8 + len(self._described)

    def _end(self) -> None:
        """Write a shard; the library writes an empty one before a sample that is larger than a shard."""
        count = len(self._samples)
        offsets = np.array([0, *map(len, self._samples)]).cumsum() + 4 * (count + 2) + len(self._described)
        head = np.array([count, *offsets], np.uint32).tobytes()
        data = b"".join([head, self._described, *self._samples])
        name = f"shard.{len(self._shards):05d}.mds"
        (self._directory / name).write_bytes(data)
        hashes = {"sha1": hashlib.sha1(data).hexdigest(), "xxh64": xxhash.xxh64(data).hexdigest()}
        info = {"basename": name, "bytes": len(data), "hashes": hashes}
        self._shards.append({"samples": count, "raw_data": info, "zip_data": None, **self._config})
        self._begin()


def _length_of(row: NDArray[Any]) -> bytes:
    width = 0 if len(row) < 1 << 8 else 1 if len(row) < 1 << 16 else 2
    return bytes([RANK_ONE | width]) + len(row).to_bytes(1 << width, "little")
