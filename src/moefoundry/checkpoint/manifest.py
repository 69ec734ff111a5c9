"""What makes a directory a checkpoint: ``manifest.json`` lists its bytes, ``COMMITTED`` says that they are all there.

The manifest lists every file as blocks of at most :data:`BLOCK_BYTES` with a hash each, so that a reader checks just
the bytes it reads, on any mesh and with bounded memory. A tensor's first byte is a block's first byte. ``COMMITTED`` is
written last and holds the hash of the manifest: without it, or with another hash in it, a directory is no checkpoint.

    {"format": 1, "batch": 100, "saved_at": "2031-01-31T12:00:00+00:00",
     "mesh": {"replicate": 1, "shard": 4, "expert": 2}, "world_size": 4, "recipe": "9c0f6ce44e2f6e5c",
     "metrics": {}, "versions": {"moefoundry": "0.1.0", "torch": "2.14.1"},
     "files": {"__0_0.distcp": [[0, 16777216, "0f4bd8ee11a6a2ef"], [16777216, 808, "8b2d4b7ad2ca0b2c"]], ...}}

Hashes are XXH3's (64 bits, https://xxhash.com): they find what disks, networks and interrupted copies do to a file, at
the speed of memory. They are no signature: who can write the files can write the manifest. What a reader does for
nobody, such as running what a file contains, is up to ``format.py``.
"""

from __future__ import annotations

import datetime
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from moefoundry.config import UserError
from moefoundry.version import __version__

MANIFEST_FILE = "manifest.json"
COMMIT_FILE = "COMMITTED"
DATA_SUFFIX = ".distcp"
FORMAT = 1
BLOCK_BYTES = 16 * 2**20


class HashedBlock(NamedTuple):
    """Bytes of a file that are checked together.

    Attributes:
        offset: Of the first byte.
        length: In bytes.
        digest: XXH3's 64 bits in hex.
    """

    offset: int
    length: int
    digest: str

    @property
    def end(self) -> int:
        return self.offset + self.length


def _versions() -> dict[str, str]:
    import torch  # readers of a manifest need none

    return {"moefoundry": __version__, "torch": torch.__version__}


@dataclass(frozen=True)
class Origin:
    """Where a checkpoint comes from.

    Attributes:
        batch: Batches trained before it was saved; 0 where nothing was trained, as in an imported one.
        mesh: Degrees of the mesh axes by name; empty outside training.
        world_size: Ranks that wrote it.
        recipe: :func:`recipe_digest` of the recipe.
        metrics: What was measured in this batch, by name; only those that decide what is kept.
        saved_at: UTC, in ISO 8601.
        versions: Of the packages that wrote it.
    """

    batch: int = 0
    mesh: Mapping[str, int] = field(default_factory=dict)
    world_size: int = 1
    recipe: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    saved_at: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    versions: Mapping[str, str] = field(default_factory=_versions)


@dataclass(frozen=True)
class Manifest:
    """The manifest of the checkpoint in ``directory``.

    Attributes:
        directory: The checkpoint.
        origin: Where it comes from.
        files: Name -> blocks, ascending and without gaps, from the first byte of the file to its last.
    """

    directory: Path
    origin: Origin
    files: Mapping[str, Sequence[HashedBlock]]

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """The manifest of a committed checkpoint; its files are not looked at.

        Raises:
            UserError: ``manifest.json`` or ``COMMITTED`` is missing, damaged, or does not belong to the other.
        """
        path, marker = directory / MANIFEST_FILE, directory / COMMIT_FILE
        try:
            committed = marker.read_text()
        except OSError as error:
            raise UserError(f"{marker}: not a committed checkpoint: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{marker}: not a committed checkpoint: {error}") from error
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: unreadable checkpoint manifest: {error.strerror}") from error
        if committed.strip() != digest(content):
            raise UserError(f"{path}: its hash is not the one in {COMMIT_FILE}; one of the two is damaged or replaced")
        try:
            return _parse(directory, json.loads(content))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: unreadable checkpoint manifest: {error}") from error

    def size(self, file: str) -> int:
        """Bytes that a file must have.

        Raises:
            UserError: The checkpoint has no such file.
        """
        blocks = self._blocks(file)
        return blocks[-1].end if blocks else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.size(file) for file in self.files)

    def covering(self, file: str, offset: int, length: int) -> tuple[int, int]:
        """Offset and length of the whole blocks to read so that ``length`` bytes from ``offset`` on can be verified.

        Raises:
            UserError: The file does not hold these bytes.
        """
        blocks = self._blocks(file)
        if offset < 0 or length < 0 or offset + length > self.size(file):
            raise UserError(f"{self.directory / file}: has {self.size(file)} bytes, not {length} from {offset} on")
        if not length:
            return offset, 0
        first, last = self._block_at(file, offset), self._block_at(file, offset + length - 1)
        return blocks[first].offset, blocks[last].end - blocks[first].offset

    def verify(self, file: str, offset: int, data: memoryview | bytes, tensor: str | None = None) -> None:
        """Check bytes that were read: one block or several that follow each other.

        Args:
            file: Name of the file.
            offset: Where the first byte was read.
            data: The bytes.
            tensor: What they belong to, for the message.

        Raises:
            UserError: They are not what was written, or are not whole blocks; names file, offset and tensor.
        """
        view = memoryview(data).cast("B")
        place = f"{self.directory / file}: offset {offset}" + (f", tensor {tensor}" if tensor else "")
        if self.covering(file, offset, len(view)) != (offset, len(view)):
            raise UserError(f"{place}: {len(view)} bytes are no whole blocks")
        for block in self._blocks(file)[self._block_at(file, offset) :] if len(view) else ():
            if block.offset >= offset + len(view):
                break
            if digest(view[block.offset - offset : block.end - offset]) != block.digest:
                raise UserError(
                    f"{place}: damaged: the {block.length} bytes from {block.offset} on differ from what was saved"
                )

    def check(self, file: str, offset: int, length: int, tensor: str | None = None) -> None:
        """Read the blocks of these bytes, one at a time, and :meth:`verify` them.

        Raises:
            UserError: As :meth:`covering` and :meth:`verify`.
            OSError: The file cannot be read.
        """
        first, covered = self.covering(file, offset, length)
        with (self.directory / file).open("rb", buffering=0) as stream:
            stream.seek(first)
            for block in self._blocks(file)[self._block_at(file, first) :]:
                if block.offset >= first + covered:
                    break
                data = stream.read(block.length)
                if len(data) < block.length:
                    raise UserError(f"{self.directory / file}: damaged: ends at {block.offset + len(data)}")
                self.verify(file, block.offset, data, tensor)

    def problems(self, file: str) -> list[str]:
        """Read one file from end to end; why it is not what was written, in at most one line."""
        if problems := self.visible_problems(file):
            return problems
        try:
            self.check(file, 0, self.size(file))
        except OSError as error:
            return [f"{self.directory / file}: unreadable: {error.strerror}"]
        except UserError as error:
            return [str(error)]
        return []

    def visible_problems(self, file: str) -> list[str]:
        """The same, without reading it: that it is there, with its size."""
        path = self.directory / file
        try:
            size = path.stat().st_size
        except OSError as error:
            return [f"{path}: unreadable: {error.strerror}"]
        return [] if size == self.size(file) else [f"{path}: damaged: has {size} bytes, not {self.size(file)}"]

    @cached_property
    def _starts(self) -> dict[str, list[int]]:
        return {file: [block.offset for block in blocks] for file, blocks in self.files.items()}

    def _block_at(self, file: str, position: int) -> int:
        """Number of the block that holds a byte."""
        return bisect_right(self._starts[file], position) - 1

    def _blocks(self, file: str) -> Sequence[HashedBlock]:
        if file not in self.files:
            raise UserError(f"{self.directory / file}: not a file of this checkpoint, says its {MANIFEST_FILE}")
        return self.files[file]


def commit(directory: Path, origin: Origin, files: Mapping[str, Sequence[HashedBlock]]) -> None:
    """Make a directory with complete, synced files a checkpoint: manifest, then marker, each on disk before the next.

    Raises:
        OSError: The disk is full, or fails.
    """
    document = {
        "format": FORMAT,
        "batch": origin.batch,
        "saved_at": origin.saved_at,
        "mesh": dict(origin.mesh),
        "world_size": origin.world_size,
        "recipe": origin.recipe,
        "metrics": dict(origin.metrics),
        "versions": dict(origin.versions),
        "files": files,
    }
    content = json.dumps(document, separators=(",", ":")).encode()
    write_synced(directory / MANIFEST_FILE, content)
    sync_directory(directory)
    write_synced(directory / COMMIT_FILE, digest(content).encode() + b"\n")
    sync_directory(directory)


def is_committed(directory: Path) -> bool:
    """Whether the marker is there and belongs to the manifest."""
    try:
        return (directory / COMMIT_FILE).read_bytes().strip() == digest(
            (directory / MANIFEST_FILE).read_bytes()
        ).encode()
    except OSError:
        return False


def verify_directory(directory: Path) -> Manifest:
    """Read a whole checkpoint and compare it with its manifest.

    Raises:
        UserError: It is not committed, or files are missing or differ; all are named.
    """
    if problems := damage(directory):
        raise UserError("\n".join(problems))
    return Manifest.read(directory)


def damage(directory: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """Read a rank's share of the files of a checkpoint; a line for each that is not what was written, or one if the
    checkpoint is not committed."""
    try:
        manifest = Manifest.read(directory)
    except UserError as error:
        return [str(error)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # reads overlap
        return [line for lines in pool.map(manifest.problems, list(manifest.files)[rank::ranks]) for line in lines]


def visible_damage(directory: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """As :func:`damage`, but of files of tensors, which are nearly all, only the sizes are looked at."""
    try:
        manifest = Manifest.read(directory)
    except UserError as error:
        return [str(error)]
    mine = list(manifest.files)[rank::ranks]
    checks = {file: manifest.visible_problems if file.endswith(DATA_SUFFIX) else manifest.problems for file in mine}
    return [line for file, check in checks.items() for line in check(file)]


def digest(data: memoryview | bytes) -> str:
    """XXH3's 64 bits of ``data`` in hex."""
    return xxhash.xxh3_64_hexdigest(data)


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """The same for the same flat recipe."""
    return digest(json.dumps(recipe, sort_keys=True, default=str).encode())


def write_synced(path: Path, content: bytes) -> HashedBlock:
    """Write a small file through to the disk; the one block that it is."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return HashedBlock(0, len(content), digest(content))


def sync_directory(directory: Path) -> None:
    """Names of a directory reach the disk only with this, on most file systems."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(directory: Path, document: Any) -> Manifest:
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']!r}; this release reads {FORMAT}")
    files: dict[str, Sequence[HashedBlock]] = {}
    for name, listed in document["files"].items():
        if name in (".", "..", "") or Path(name).name != name:
            raise ValueError(f"{name!r} is no name of a file here")
        blocks = [HashedBlock(*block) for block in listed]
        position = 0
        for block in blocks:
            if type(block.offset) is not int or type(block.length) is not int or not isinstance(block.digest, str):
                raise ValueError(f"{name}: {list(block)!r} is no block")
            if block.offset != position or not 0 < block.length <= BLOCK_BYTES:
                raise ValueError(f"{name}: a block of {block.length} bytes at {block.offset}, where {position} is next")
            position = block.end
        files[name] = blocks
    origin = Origin(
        batch=int(document["batch"]),
        mesh={str(axis): int(degree) for axis, degree in document["mesh"].items()},
        world_size=int(document["world_size"]),
        recipe=str(document["recipe"]),
        metrics={str(name): float(value) for name, value in document["metrics"].items()},
        saved_at=str(document["saved_at"]),
        versions={str(name): str(version) for name, version in document["versions"].items()},
    )
    return Manifest(directory, origin, files)
