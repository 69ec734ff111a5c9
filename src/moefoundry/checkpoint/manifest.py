"""The manifest of a checkpoint: ``manifest.json`` lists its bytes, ``COMMITTED`` says that they are all there.

The manifest lists every file as hash ranges: at most :data:`RANGE_BYTES` bytes with a hash each. So a reader checks the
bytes that it reads and no others, on any mesh and with bounded memory. The first byte of a shard is the first byte of a
hash range. ``COMMITTED`` is written last and holds the hash of the manifest: without it, or with another hash in it, a
directory is no checkpoint.

    {"format": 1, "batch": 100, "saved_at": "2031-01-31T12:00:00+00:00",
     "mesh": {"replicate": 1, "shard": 4, "expert": 2}, "world_size": 4, "recipe": "9c0f6ce44e2f6e5c",
     "metrics": {}, "versions": {"moefoundry": "0.1.0", "torch": "2.14.1"},
     "files": {"__0_0.distcp": [[0, 16777216, "0f4bd8ee11a6a2ef"], [16777216, 808, "8b2d4b7ad2ca0b2c"]], ...}}

Hashes are XXH3's (64 bits, https://xxhash.com): they find what disks, networks and interrupted copies do to a file, at
the speed of memory. They are no signature: who can write the files can write the manifest. ``format.py`` sees to
it that nothing in a file is ever run.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from moefoundry.config import UserError
from moefoundry.config.versions import upgraded
from moefoundry.version import __version__

MANIFEST_FILE = "manifest.json"
COMMIT_FILE = "COMMITTED"
STATE_FILE = "state.json"
DATA_SUFFIX = ".distcp"
FORMAT = 1
RANGE_BYTES = 16 * 2**20
_STEP_BYTES = 2**20  # read at a time, to be hashed

STATE_KEYS = ("timestamp", "data", "world_size", "recipe")
WEIGHTS_ONLY = "weights_only"
"""Marks the state of a checkpoint without optimizer and position: besides it, only ``recipe`` is there, with
the keys of ``model``. A run that starts from it trains from its first batch on."""

BASE = "base"
"""Key of ``state.json`` in a checkpoint that lacks the weights that do not train: where those are (``base.py``)."""


class HashRange(NamedTuple):
    """Bytes of a file with a hash of their own: ``length`` bytes from ``offset`` on; XXH3's 64 bits in hex."""

    offset: int
    length: int
    digest: str

    @property
    def end(self) -> int:
        return self.offset + self.length

    @property
    def damage(self) -> str:
        """Text that says of bytes with another hash what is wrong."""
        return f"damaged: the {self.length} bytes from {self.offset} on differ from what was saved"


def _versions() -> dict[str, str]:
    import torch  # readers of a manifest need none

    return {"moefoundry": __version__, "torch": torch.__version__}


@dataclass(frozen=True)
class Origin:
    """Origin of a checkpoint.

    Attributes:
        batch: Batches trained before it was saved; 0 where nothing was trained, as in an imported one.
        mesh: Degrees of the mesh axes by name; empty outside training.
        world_size: Ranks that wrote it.
        recipe: :func:`recipe_digest` of the recipe.
        metrics: Metrics of this batch that decide which checkpoints are kept, by name.
        saved_at: Time of the save, UTC, in ISO 8601.
        versions: Versions of the packages that wrote it.
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
        directory: Directory of the checkpoint.
        origin: Origin of the checkpoint.
        files: Name -> hash ranges, ascending and without gaps, from the first byte of the file to its last.
    """

    directory: Path
    origin: Origin
    files: Mapping[str, Sequence[HashRange]]

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of a committed checkpoint; its files are not looked at.

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
        return _parsed(directory, content)

    def size(self, file: str) -> int:
        """Give the size that a file must have, in bytes.

        Raises:
            UserError: The checkpoint has no such file.
        """
        if file not in self.files:
            raise UserError(f"{self.directory / file}: not a file of this checkpoint, says its {MANIFEST_FILE}")
        return self.files[file][-1].end if self.files[file] else 0

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.size(file) for file in self.files)

    def covering(self, file: str, offset: int, length: int) -> Sequence[HashRange]:
        """List the hash ranges that have to be read to verify ``length`` bytes from ``offset`` on.

        Raises:
            UserError: The file does not hold these bytes.
        """
        if offset < 0 or length < 0 or offset + length > self.size(file):
            raise UserError(f"{self.directory / file}: has {self.size(file)} bytes, not {length} from {offset} on")
        if not length:
            return []
        ranges = self.files[file]
        first = bisect_right(ranges, offset, key=attrgetter("offset")) - 1
        return ranges[first : bisect_left(ranges, offset + length, key=attrgetter("offset"))]

    def verify(self, file: str, offset: int, data: memoryview | bytes, tensor: str | None = None) -> None:
        """Check bytes that were read: one hash range, or several that follow each other.

        Args:
            file: Name of the file.
            offset: Offset of the first byte.
            data: The bytes.
            tensor: Name of their tensor, for the message.

        Raises:
            UserError: They are not what was written, or are not whole hash ranges; names file, offset and tensor.
        """
        view = memoryview(data).cast("B")
        place = self._place(file, offset, tensor)
        ranges = self.covering(file, offset, len(view))
        if ranges and (ranges[0].offset, ranges[-1].end) != (offset, offset + len(view)):
            raise UserError(f"{place}: {len(view)} bytes are no whole hash ranges")
        for hashed in ranges:
            if digest(view[hashed.offset - offset :][: hashed.length]) != hashed.digest:
                raise UserError(f"{place}: {hashed.damage}")

    def check(self, file: str, offset: int, length: int, tensor: str | None = None) -> None:
        """Read the hash ranges of these bytes, a few at a time, and compare their hashes; memory is bounded.

        Raises:
            UserError: As :meth:`covering` and :meth:`verify`.
            OSError: The file cannot be read.
        """
        ranges = self.covering(file, offset, length)
        with (self.directory / file).open("rb", buffering=0) as stream:
            for hashed in ranges:
                stream.seek(hashed.offset)
                hash_of_read, left = xxhash.xxh3_64(), hashed.length
                while left and (data := stream.read(min(left, _STEP_BYTES))):
                    hash_of_read.update(data)
                    left -= len(data)
                if left:
                    raise UserError(f"{self.directory / file}: damaged: ends at {hashed.end - left}")
                if hash_of_read.hexdigest() != hashed.digest:
                    raise UserError(f"{self._place(file, hashed.offset, tensor)}: {hashed.damage}")

    def _place(self, file: str, offset: int, tensor: str | None) -> str:
        return f"{self.directory / file}: offset {offset}" + (f", tensor {tensor}" if tensor else "")

    def problems(self, file: str, sizes_only: bool = False) -> list[str]:
        """Check one file, by its size alone or by reading it from end to end.

        Returns:
            At most one line, which says why the file is not as it was written.
        """
        path = self.directory / file
        try:
            if (size := path.stat().st_size) != self.size(file):
                return [f"{path}: damaged: has {size} bytes, not {self.size(file)}"]
            if not sizes_only:
                self.check(file, 0, size)
        except OSError as error:
            return [f"{path}: unreadable: {error.strerror}"]
        except UserError as error:
            return [str(error)]
        return []


def read_state(directory: Path) -> dict[str, Any]:
    """Read the JSON document of a checkpoint, its recipe as this release writes it.

    Raises:
        UserError: It is missing, damaged, or not what was saved; or lacks one of :data:`STATE_KEYS` (with
            :data:`WEIGHTS_ONLY`: the recipe).
    """
    path = directory / STATE_FILE
    try:
        content = path.read_bytes()
        state = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable checkpoint state: {error}") from error
    if not isinstance(state, dict):
        state = {}
    missing = [key for key in (("recipe",) if state.get(WEIGHTS_ONLY) else STATE_KEYS) if key not in state]
    if missing:
        raise UserError(f"{path}: incomplete checkpoint state: it lacks {', '.join(missing)}")
    Manifest.read(directory).verify(STATE_FILE, 0, content)
    try:
        return state | {"recipe": upgraded(state["recipe"])} if isinstance(state["recipe"], dict) else state
    except ValueError as error:
        raise UserError(f"{path}: checkpoint of a later release: recipe of {error}") from error


def commit(directory: Path, origin: Origin, files: Mapping[str, Sequence[HashRange]]) -> None:
    """Make a directory with complete, synced files a checkpoint: manifest, then marker, each on disk before the next.

    Raises:
        OSError: The disk is full, or fails.
        UserError: The manifest that was written is none that a reader would take; there is no marker then.
    """
    document = {"format": FORMAT, **asdict(origin), "files": files}
    content = json.dumps(document, separators=(",", ":")).encode()
    write_synced(directory / MANIFEST_FILE, content)
    _parsed(directory, (directory / MANIFEST_FILE).read_bytes())
    sync_directory(directory)
    write_synced(directory / COMMIT_FILE, digest(content).encode() + b"\n")
    sync_directory(directory)


def is_committed(directory: Path) -> bool:
    """Check that the marker is there and belongs to the manifest."""
    try:
        committed = (directory / COMMIT_FILE).read_bytes().strip()
        return committed == digest((directory / MANIFEST_FILE).read_bytes()).encode()
    except OSError:
        return False


def damage(directory: Path, rank: int = 0, ranks: int = 1, sizes_only: bool = False) -> list[str]:
    """Check a rank's share of the files of a checkpoint.

    Args:
        directory: Directory of the checkpoint.
        rank: Number of the share.
        ranks: Number of shares.
        sizes_only: True to look only at the sizes of files of tensors, which are nearly all; False to read them.

    Returns:
        A line for each file that is not as it was written, or one if the checkpoint is not committed.
    """
    try:
        manifest = Manifest.read(directory)
    except UserError as error:
        return [str(error)]

    def problems(file: str) -> list[str]:
        return manifest.problems(file, sizes_only and file.endswith(DATA_SUFFIX))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # reads overlap
        return [line for lines in pool.map(problems, list(manifest.files)[rank::ranks]) for line in lines]


def digest(data: memoryview | bytes) -> str:
    """Hash ``data``: XXH3's 64 bits in hex."""
    return xxhash.xxh3_64_hexdigest(data)


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """Hash a flat recipe."""
    return digest(json.dumps(recipe, sort_keys=True, default=str).encode())


def write_synced(path: Path, content: bytes) -> list[HashRange]:
    """Write a file through to the disk. Returns its hash ranges."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    parts = ((start, memoryview(content)[start:][:RANGE_BYTES]) for start in range(0, len(content), RANGE_BYTES))
    return [HashRange(start, len(part), digest(part)) for start, part in parts]


def sync_directory(directory: Path) -> None:
    """Write the names in a directory through to the disk, as most file systems do not by themselves."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parsed(directory: Path, content: bytes) -> Manifest:
    """Make the manifest of a directory from the bytes of its file.

    Raises:
        UserError: They are none.
    """
    try:
        return _parse(directory, json.loads(content))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{directory / MANIFEST_FILE}: unreadable checkpoint manifest: {error}") from error


def _parse(directory: Path, document: Any) -> Manifest:
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']!r}; this release reads {FORMAT}")
    files: dict[str, Sequence[HashRange]] = {}
    for name, listed in document["files"].items():
        if name in (".", "..", "") or Path(name).name != name:
            raise ValueError(f"{name!r} is no name of a file here")
        ranges = [HashRange(*each) for each in listed]
        position = 0
        # Earlier versions hashed index and state whole, whatever their size; readers allocate nothing by that.
        longest = math.inf if len(ranges) == 1 and not name.endswith(DATA_SUFFIX) else RANGE_BYTES
        for hashed in ranges:
            if type(hashed.offset) is not int or type(hashed.length) is not int or not isinstance(hashed.digest, str):
                raise ValueError(f"{name}: {list(hashed)!r} is no hash range")
            if hashed.offset != position or not 0 < hashed.length <= longest:
                raise ValueError(
                    f"{name}: a hash range of {hashed.length} bytes at {hashed.offset}, where {position} is next"
                )
            position = hashed.end
        files[name] = ranges
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
