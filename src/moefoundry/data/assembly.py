"""A corpus out of its blocks: shards with one index a split, or packed samples."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefoundry.data.identity import INDEX_FILE, TOKENS, corpus_digest, stream_digest
from moefoundry.data.left_out import LeftOut
from moefoundry.data.mds import ShardWriter
from moefoundry.data.options import PrepareOptions
from moefoundry.data.packing import pack
from moefoundry.data.places import LocalPlace
from moefoundry.data.splits import Division
from moefoundry.data.staging import staged
from moefoundry.data.summary import CORPUS_FILE, FORMAT_VERSIONS, LENGTHS_FILE, CorpusSummary, Layout, SplitSummary
from moefoundry.data.tokenizer import TextTokenizer
from moefoundry.data.writing import BlockRecord, BlockSplit, arrays_name, token_dtype, tokens_name
from moefoundry.version import __version__

OUTPUTS = {"tokenizer", "train", "val", CORPUS_FILE}
TOKENIZER = "tokenizer"
RUN_TOKENS = 1 << 20


@dataclass(frozen=True)
class Facts:
    """Facts of a corpus beside its splits.

    Attributes:
        options: Options that it is prepared with.
        inputs: All that decides the content.
        left_out: Losses.
        bytes: UTF-8 bytes of the documents.
        tokenizer: Its tokenizer.
        division: Division of the documents into splits.
        shard_bytes: Size of a shard.
    """

    options: PrepareOptions
    inputs: dict[str, Any]
    left_out: LeftOut
    bytes: int
    tokenizer: TextTokenizer
    division: Division
    shard_bytes: int

    def summary(self, splits: dict[str, SplitSummary]) -> CorpusSummary:
        """Sum up the corpus."""
        digests = {name: split.sha256 for name, split in splits.items()}
        return CorpusSummary(
            format_version=FORMAT_VERSIONS[self.options.stored_as],
            moefoundry_version=__version__,
            source=self.options.source,
            max_seq_len=self.options.sample_tokens if self.options.stored_as is Layout.packed else None,
            vocab_size=self.tokenizer.vocab_size,
            eos_token=self.tokenizer.eos_token,
            eos_id=self.tokenizer.eos_id,
            tokenizer_sha256=self.tokenizer.sha256,
            skipped=self.left_out.count,
            inputs=self.inputs,
            splits=splits,
            sha256=corpus_digest(self.tokenizer.sha256, self.tokenizer.eos_id, digests),
            left_out=self.left_out.reasons,
            left_out_share=self.left_out.share(self.bytes),
            division=asdict(self.division),
            layout=self.options.stored_as,
        )


def tokens_of(records: Sequence[BlockRecord], split: str) -> int:
    """Count the tokens of a split."""
    return sum(record.splits[split].tokens for record in records)


def join(place: LocalPlace, records: Sequence[BlockRecord], facts: Facts, out: Path) -> CorpusSummary:
    """Make the directory of the blocks the corpus ``out``.

    Raises:
        UserError: ``out`` has appeared meanwhile, or cannot be written.
    """
    directory = place.directory
    splits = {name: _join_split(place, records, name, facts.tokenizer) for name in records[0].splits}
    shutil.rmtree(directory / TOKENIZER, ignore_errors=True)  # of an attempt that was ended
    facts.tokenizer.save(directory / TOKENIZER)
    summary = facts.summary(splits)
    summary.write(directory)
    with staged(out, replace=facts.options.overwrite) as partial:
        place.remove_others(
            {CORPUS_FILE, *_stream_files(records), *(f"{TOKENIZER}/{n}" for n in facts.tokenizer.files)}
        )
        directory.rename(partial)
    return summary


def _join_split(
    place: LocalPlace, records: Sequence[BlockRecord], split: str, tokenizer: TextTokenizer
) -> SplitSummary:
    """Write the index and the lengths of a split."""
    directory = place.directory / split
    directory.mkdir(exist_ok=True)
    blocks = [record.splits[split] for record in records]
    index = {"version": 2, "shards": [shard for block in blocks for shard in block.shards]}
    (directory / INDEX_FILE).write_text(json.dumps(index, sort_keys=True))
    shape = (sum(block.documents for block in blocks),)
    lengths = np.lib.format.open_memmap(directory / LENGTHS_FILE, mode="w+", dtype=np.int32, shape=shape)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    at = 0
    for record in records:
        with np.load(place.directory / arrays_name(record.number, split)) as arrays:
            own = arrays["lengths"]
            counts += arrays["counts"]
        lengths[at : at + len(own)] = own
        at += len(own)
    lengths.flush()
    with open(directory / LENGTHS_FILE, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return _summary(blocks, counts, at, tokenizer, directory, sha256)


def _stream_files(records: Sequence[BlockRecord]) -> Iterator[str]:
    for record in records:
        for name, split in record.splits.items():
            yield from (f"{name}/{shard['raw_data']['basename']}" for shard in split.shards)
            yield from (f"{name}/{file}" for file in (INDEX_FILE, LENGTHS_FILE))


def pack_samples(place: LocalPlace, records: Sequence[BlockRecord], facts: Facts, out: Path) -> CorpusSummary:
    """Pack the tokens of the blocks into the corpus ``out``.

    Raises:
        UserError: ``out`` has appeared meanwhile, or cannot be written.
    """
    with staged(out, replace=facts.options.overwrite) as directory:
        directory.mkdir()
        names = records[0].splits
        splits = {name: _pack_split(place, records, name, directory / name, facts) for name in names}
        facts.tokenizer.save(directory / TOKENIZER)
        summary = facts.summary(splits)
        summary.write(directory)
    return summary


def _pack_split(
    place: LocalPlace, records: Sequence[BlockRecord], split: str, directory: Path, facts: Facts
) -> SplitSummary:
    seq_len, vocab_size = facts.options.sample_tokens, facts.tokenizer.vocab_size
    dtype = token_dtype(facts.tokenizer)
    counts = np.zeros(vocab_size, np.int64)
    samples = 0
    writer = ShardWriter(directory, {TOKENS: np.dtype(dtype).name}, facts.shard_bytes, seq_len)
    for many in pack(_stream(place, records, split, dtype), seq_len):
        counts += np.bincount(many.reshape(-1), minlength=vocab_size)
        samples += len(many)
        for sample in many:
            writer.write(sample)
    writer.finish()
    blocks = [record.splits[split] for record in records]
    return _summary(blocks, counts, samples, facts.tokenizer, directory, None)


def _stream(
    place: LocalPlace, records: Sequence[BlockRecord], split: str, dtype: type[np.uint16] | type[np.uint32]
) -> Iterator[NDArray[Any]]:
    for record in records:
        with open(place.directory / tokens_name(record.number, split), "rb") as stream:
            while len(tokens := np.fromfile(stream, dtype, RUN_TOKENS)):
                yield tokens


def _summary(
    blocks: Sequence[BlockSplit],
    counts: NDArray[np.int64],
    samples: int,
    tokenizer: TextTokenizer,
    directory: Path,
    lengths_sha256: str | None,
) -> SplitSummary:
    tokens = sum(block.tokens for block in blocks)
    unknown = tokenizer.unknown_id
    return SplitSummary(
        documents=sum(block.documents for block in blocks),
        bytes=sum(block.bytes for block in blocks),
        tokens=tokens,
        samples=samples,
        dropped_tokens=tokens - int(counts.sum()),
        unigram_entropy_nats=unigram_entropy(counts),
        sha256=stream_digest(directory),
        unknown_tokens=0 if unknown is None else int(counts[unknown]),
        lengths_sha256=lengths_sha256,
        truncated_documents=sum(block.truncated[0] for block in blocks),
        truncated_tokens=sum(block.truncated[1] for block in blocks),
    )


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Compute the entropy in nats of the distribution proportional to ``counts``; 0.0 if all are zero."""
    seen = counts[counts > 0].astype(np.float64)
    if not seen.size:
        return 0.0
    probabilities = seen / seen.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
