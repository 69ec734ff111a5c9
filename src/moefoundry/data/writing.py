"""Second reading of a corpus: the tokens of one block, in shards of its own.

A block leaves these files at its place (BLOCK is its number, SPLIT ``train`` or ``val``)::

    SPLIT/shard.BLOCK.SHARD.mds    its documents; or, where they are to be packed:
    blocks/BLOCK.SPLIT.tokens      the same tokens in a row, without anything between them
    blocks/BLOCK.SPLIT.npz         arrays: ``lengths`` of the documents, ``counts`` of the tokens by id
    blocks/BLOCK.json              the record of the block, put there last

The record has a key, a digest of all that decides the content, and the hash of every file. A block that has its files
and its key is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefoundry.data.corpus import Corpus, Document
from moefoundry.data.encoding import RecordEncoder, Refused, Stored, encode_texts
from moefoundry.data.identity import TARGETS, TOKENS, read_shards
from moefoundry.data.left_out import Left, LeftOut
from moefoundry.data.mds import ShardWriter
from moefoundry.data.places import LocalPlace
from moefoundry.data.splits import Division, Split
from moefoundry.data.summary import Layout
from moefoundry.data.survey import Surveyed, documents_of
from moefoundry.data.tokenizer import TextTokenizer
from moefoundry.data.workers import Advance

BLOCKS = "blocks"
BLOCK_VERSION = 1  # of the files of a block


@dataclass(frozen=True)
class BlockJob:
    """Job to write one block.

    Attributes:
        surveyed: The block.
        position: Bytes of UTF-8 before it.
    """

    surveyed: Surveyed
    position: int

    @property
    def number(self) -> int:
        """Place of the block in the corpus, from 0."""
        return self.surveyed.block.number


@dataclass(frozen=True)
class BlockSplit:
    """Documents of one split in a block.

    Attributes:
        documents: Number of documents.
        bytes: UTF-8 bytes of their text.
        tokens: Their tokens, end-of-text tokens included.
        shards: Their shards, as in the index of a stream; none where they are to be packed.
        files: Size and SHA-1 of the other files, by name.
        truncated: Records that were cut, and the tokens cut off.
    """

    documents: int
    bytes: int
    tokens: int
    shards: list[dict[str, Any]]
    files: dict[str, tuple[int, str]]
    truncated: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class BlockRecord:
    """A block that was written.

    Attributes:
        number: Place of the block in the corpus, from 0.
        key: Digest of all that decides its content.
        splits: Documents of each split.
        left_out: Records that gave no document, by reason; their names count from the start of the block.
    """

    number: int
    key: str
    splits: dict[str, BlockSplit]
    left_out: dict[str, Left] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockWriter:
    """Writer of the blocks of one corpus.

    Attributes:
        corpus: The corpus.
        tokenizer: Its tokenizer.
        division: Division of the documents into ``splits``.
        splits: The splits.
        seed: Decides the split of a document.
        layout: What is made of the documents.
        shard_bytes: Size of a shard.
        batch_bytes: Characters that are handed to the tokenizer at once.
        place: Where the files go.
        records: Encoder of records; None encodes text.
    """

    corpus: Corpus
    tokenizer: TextTokenizer
    division: Division
    splits: tuple[Split, ...]
    seed: int
    layout: Layout
    shard_bytes: int
    batch_bytes: int
    place: LocalPlace
    records: RecordEncoder | None = None

    def key(self, job: BlockJob) -> str:
        """Compute the digest of all that decides the content of a block."""
        inputs = {
            "version": BLOCK_VERSION,
            "documents": [job.surveyed.documents, job.surveyed.sha256],
            "position": job.position if self.division.train_bytes is not None else None,
            "division": asdict(self.division),
            "splits": self.splits,
            "seed": self.seed,
            "tokenizer": [self.tokenizer.sha256, self.tokenizer.eos_id],
            "layout": self.layout,
            "shard_bytes": self.shard_bytes,
            **({} if self.records is None else self.records.inputs()),
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def finished(self, job: BlockJob) -> BlockRecord | None:
        """Return the record of a block that is there already, with every file whole; None if it is not."""
        record = read_record(self.place, job.number)
        if record is None or record.key != self.key(job):
            return None
        files = {name: info for split in record.splits.values() for name, info in split.files.items()}
        for name, split in record.splits.items():
            infos = (shard["raw_data"] for shard in split.shards)
            files |= {f"{name}/{info['basename']}": (info["bytes"], info["hashes"]["sha1"]) for info in infos}
        return record if all(self.place.is_whole(name, *info) for name, info in files.items()) else None

    def write(self, job: BlockJob, advance: Advance) -> BlockRecord:
        """Write a block.

        Raises:
            UserError: Its documents have changed since they were surveyed.
        """
        with self.place.scratch() as scratch:
            sinks = {split: self._sink(scratch / split.value) for split in self.splits}
            left_out = LeftOut()
            for batch in _batches(self._documents(job, advance), self.batch_bytes):
                for (split, document), found in zip(batch, self._encode(batch), strict=True):
                    size = len(document.text.encode())
                    if isinstance(found, Refused):
                        left_out.add(f"{document.doc_id} ({found.message})", found.reason, size)
                    else:
                        sinks[split].write(size, found)
            splits = {split.value: sink.finish(split, job.number, self.place) for split, sink in sinks.items()}
            record = BlockRecord(job.number, self.key(job), splits, left_out.reasons)
            file = scratch / "record"
            file.write_text(json.dumps(asdict(record)))
            self.place.put(file, _record_name(job.number))
        return record

    def _documents(self, job: BlockJob, advance: Advance) -> Iterator[tuple[Split, Document]]:
        return self.division.divide(documents_of(self.corpus, job.surveyed, advance), self.seed, job.position)

    def _encode(self, batch: list[tuple[Split, Document]]) -> Sequence[list[Stored] | Refused]:
        if self.records is None:
            return encode_texts(self.tokenizer, [document.text for _, document in batch])
        return [self.records.encode(document.text, document.doc_id) for _, document in batch]

    def _sink(self, directory: Path) -> _Sink:
        kind = _Shards if self.layout is Layout.documents else _Tokens
        return kind(self.tokenizer, directory, self.shard_bytes, with_targets=self.records is not None)


def read_record(place: LocalPlace, number: int) -> BlockRecord | None:
    """Read the record of a block; None if there is none, or it is damaged."""
    file = place.file(_record_name(number))
    try:
        fields = json.loads(file.read_text()) if file else None
        return fields and BlockRecord(
            fields["number"],
            fields["key"],
            {name: BlockSplit(**split) for name, split in fields["splits"].items()},
            {reason: Left(left) for reason, left in fields["left_out"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _record_name(number: int) -> str:
    return f"{BLOCKS}/{number:05d}.json"


def arrays_name(number: int, split: str) -> str:
    """Name the file of a block's arrays."""
    return f"{BLOCKS}/{number:05d}.{split}.npz"


def tokens_name(number: int, split: str) -> str:
    """Name the file of a block's tokens, where they are to be packed."""
    return f"{BLOCKS}/{number:05d}.{split}.tokens"


def token_dtype(tokenizer: TextTokenizer) -> type[np.uint16] | type[np.uint32]:
    """Return the narrowest type of the two that holds every token."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


class _Sink:
    """Documents of one split of a block, on their way to disk."""

    def __init__(self, tokenizer: TextTokenizer, directory: Path, shard_bytes: int, *, with_targets: bool) -> None:
        directory.mkdir()
        self.directory = directory
        self.dtype = token_dtype(tokenizer)
        self._truncated = np.zeros(2, np.int64)
        self._counts = np.zeros(tokenizer.vocab_size, np.int64)
        self._lengths: list[int] = []
        self._bytes = 0
        self._pending: list[NDArray[Any]] = []

    def write(self, size: int, documents: Sequence[Stored]) -> None:
        """Take the documents of one text of so many bytes."""
        self._bytes += size
        for document in documents:
            tokens = document.tokens.astype(self.dtype)
            self._lengths.append(len(tokens))
            self._truncated += (document.cut > 0, document.cut)
            self._pending.append(tokens)
            if len(self._pending) == COUNTED_TOGETHER:
                self._flush()
            self._store(tokens, document.targets)

    def _flush(self) -> None:
        if self._pending:
            self._counts += np.bincount(np.concatenate(self._pending), minlength=len(self._counts))
            self._pending = []

    def finish(self, split: Split, number: int, place: LocalPlace) -> BlockSplit:
        """Put the files at their place."""
        self._flush()
        arrays = self.directory / "arrays.npz"
        np.savez(arrays, lengths=np.array(self._lengths, np.int32), counts=self._counts)
        files = {arrays_name(number, split.value): arrays, **self._files(number, split)}
        described = {name: _described(file) for name, file in files.items()}
        shards = self._shards(number, split, place)
        for name, file in files.items():
            place.put(file, name)
        documents, tokens = self._truncated.tolist()
        counts = len(self._lengths), self._bytes, sum(self._lengths)
        return BlockSplit(*counts, shards, described, (documents, tokens))

    def _store(self, tokens: NDArray[Any], targets: NDArray[np.uint8] | None) -> None:
        raise NotImplementedError

    def _files(self, number: int, split: Split) -> dict[str, Path]:
        return {}

    def _shards(self, number: int, split: Split, place: LocalPlace) -> list[dict[str, Any]]:
        return []


COUNTED_TOGETHER = 1024  # documents


class _Shards(_Sink):
    """A sample each, in MDS shards."""

    def __init__(self, tokenizer: TextTokenizer, directory: Path, shard_bytes: int, *, with_targets: bool) -> None:
        super().__init__(tokenizer, directory, shard_bytes, with_targets=with_targets)
        columns = {TARGETS: "uint8"} if with_targets else {}
        self._writer = ShardWriter(directory / "mds", columns | {TOKENS: np.dtype(self.dtype).name}, shard_bytes)

    def _store(self, tokens: NDArray[Any], targets: NDArray[np.uint8] | None) -> None:
        self._writer.write(*([tokens] if targets is None else [targets, tokens]))

    def _shards(self, number: int, split: Split, place: LocalPlace) -> list[dict[str, Any]]:
        self._writer.finish()
        shards = read_shards(self.directory / "mds")
        for shard in shards:
            info = shard["raw_data"]
            made = self.directory / "mds" / info["basename"]
            info["basename"] = info["basename"].replace("shard.", f"shard.{number:05d}.")
            place.put(made, f"{split.value}/{info['basename']}")
        return shards


class _Tokens(_Sink):
    """Tokens in a row, for packing."""

    def __init__(self, tokenizer: TextTokenizer, directory: Path, shard_bytes: int, *, with_targets: bool) -> None:
        super().__init__(tokenizer, directory, shard_bytes, with_targets=with_targets)
        self._stream = (directory / "tokens").open("wb", buffering=1 << 20)

    def _store(self, tokens: NDArray[Any], targets: NDArray[np.uint8] | None) -> None:
        self._stream.write(tokens.data)

    def _files(self, number: int, split: Split) -> dict[str, Path]:
        self._stream.close()
        return {tokens_name(number, split.value): self.directory / "tokens"}


def _described(file: Path) -> tuple[int, str]:
    with open(file, "rb") as stream:
        return file.stat().st_size, hashlib.file_digest(stream, "sha1").hexdigest()


def _batches(documents: Iterable[tuple[Split, Document]], batch_bytes: int) -> Iterator[list[tuple[Split, Document]]]:
    """Group documents into lists of about ``batch_bytes`` characters."""
    batch: list[tuple[Split, Document]] = []
    size = 0
    for item in documents:
        batch.append(item)
        size += len(item[1].text)
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
