"""Preparation of a corpus as a directory that training reads: ``moefoundry prepare``.

Layout of the result::

    OUT/tokenizer/    Hugging Face tokenizer
    OUT/train/        MDS shards, column ``tokens``: ids of uint16 (uint32 if needed), max_seq_len of them in a sample
    OUT/val/          the same, of held-out files; absent with a ``val_fraction`` of 0
    OUT/corpus.json   counts, unigram entropies, options and the digest of the input (see ``summary``)

A sample of the layout ``documents`` is one document of any length, end-of-text token included, and beside the shards
``lengths.npy`` (int32 [documents]) has the lengths of all samples in order.

OUT appears when it is complete (:mod:`moefoundry.data.staging`). The result is a function of the documents and the
options alone, so a second run has nothing to do, and a run that would give something else refuses instead of replacing
data that may be in use.

The corpus is read several times (digest, tokenizer, each split) rather than held in memory; reading is far cheaper
than tokenizing.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefoundry.config.errors import UserError
from moefoundry.data.corpus import Corpus, CorpusScan, Document, add_to_digest, open_corpus
from moefoundry.data.identity import corpus_digest, stream_digest
from moefoundry.data.left_out import describe_left_out
from moefoundry.data.options import PrepareOptions, check_numbers, expanded
from moefoundry.data.packing import ended, pack
from moefoundry.data.progress import Progress
from moefoundry.data.splits import Division, Split, by_position, moved, unit_hash
from moefoundry.data.staging import clear_abandoned, occupied, staged
from moefoundry.data.summary import (
    CORPUS_FILE,
    FORMAT_VERSIONS,
    LENGTHS_FILE,
    CorpusSummary,
    Layout,
    SplitSummary,
    read_corpus_summary,
)
from moefoundry.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from moefoundry.version import __version__

OUTPUTS = {"tokenizer", "train", "val", CORPUS_FILE}
HASHES = ["sha1", "xxh64"]  # of every shard, in its index; sorted, as MDSWriter demands
SHARD_BYTES = 1 << 24  # 16 MiB: a few seconds of download, and enough shards to shuffle across
TOKENIZER_SAMPLE_BYTES = 1 << 27  # 128 MiB of text; merges hardly change beyond, memory and time do
ENCODE_BATCH_BYTES = 1 << 22  # text handed to the tokenizer's threads at once
RETRY_MARGINS = (1.2, 2.0, 4.0)  # text for a sample, over that of an average one, where a split got none


@dataclass(frozen=True)
class PreparedSummary:
    """Result of :func:`prepare`.

    Attributes:
        out: The directory.
        corpus: Summary of its content.
        up_to_date: True if it was there already, and nothing was written.
        ignored: Number of files of each suffix in the source that are of other kinds than the corpus.
    """

    out: Path
    corpus: CorpusSummary
    up_to_date: bool
    ignored: tuple[tuple[str, int], ...] = ()


def prepare(options: PrepareOptions) -> PreparedSummary:
    """Make a prepared corpus, or find that it is there.

    Raises:
        UserError: Bad options or input, ``out`` holds something else, or it cannot be written. ``out`` is untouched.
    """
    options = expanded(options)
    try:
        return _prepare(options)
    except OSError as error:
        raise UserError(f"{error.filename or options.out}: {error.strerror or error}") from error


def _prepare(options: PrepareOptions) -> PreparedSummary:
    check_numbers(options)
    out = Path(os.path.realpath(options.out))
    clear_abandoned(out)
    _check_out(out, options)
    corpus = open_corpus(options.source, options.format, options.globs, options.text_key, options.bad_bytes, leave=out)
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    _check_vocab(given, options)
    scan = _scan(corpus, options)
    inputs = _inputs(options, corpus, scan, given)
    existing = _existing(out, inputs, options)
    if existing is not None:
        return PreparedSummary(options.out, existing, up_to_date=True, ignored=corpus.ignored)

    with staged(out, replace=options.overwrite) as directory:
        directory.mkdir()
        written = _write(corpus, scan, given, options, directory)
        digests = {name: split.sha256 for name, split in written.splits.items()}
        summary = CorpusSummary(
            format_version=FORMAT_VERSIONS[options.layout],
            moefoundry_version=__version__,
            source=options.source,
            max_seq_len=options.sample_tokens if options.layout is Layout.packed else None,
            vocab_size=written.tokenizer.vocab_size,
            eos_token=written.tokenizer.eos_token,
            eos_id=written.tokenizer.eos_id,
            tokenizer_sha256=written.tokenizer.sha256,
            skipped=scan.left_out.count,
            inputs=inputs,
            splits=written.splits,
            sha256=corpus_digest(written.tokenizer.sha256, written.tokenizer.eos_id, digests),
            left_out=scan.left_out.reasons,
            left_out_share=scan.left_out.share(scan.bytes),
            division=asdict(written.division),
            layout=options.layout,
        )
        summary.write(directory)
    return PreparedSummary(options.out, summary, up_to_date=False, ignored=corpus.ignored)


def _scan(corpus: Corpus, options: PrepareOptions) -> CorpusScan:
    """Read the corpus once; refuse one without text, or of which too much cannot be read."""
    with Progress("reading") as progress:
        scan = corpus.scan(options.max_docs, options.max_bytes, progress.update)
    scan.left_out.check(options.source, scan.bytes, options.max_loss, corpus.hint(scan.left_out))
    if not scan.documents:
        caps = {"max_docs": options.max_docs, "max_bytes": options.max_bytes}
        limits = " and ".join(f"{name}={cap}" for name, cap in caps.items() if cap)
        left_out = f" (left out: {describe_left_out(scan.left_out.reasons)})" if scan.left_out.count else ""
        raise UserError(
            f"{options.source}: empty corpus: no document with text in {len(corpus.paths)} file(s)"
            + f"{limits and ' within '}{limits}"
            + left_out
        )
    return scan


def _check_vocab(given: TextTokenizer | None, options: PrepareOptions) -> None:
    """Refuse a vocabulary above the limit before any work; a trained one has at most ``vocab_size`` tokens."""
    name, size = f"vocab_size={options.vocab_size}", options.vocab_size
    if given is not None:
        name, size = (f"{options.tokenizer}: the tokenizer's vocabulary of {given.vocab_size}", given.vocab_size)
    if options.max_vocab is not None and size > options.max_vocab:
        raise UserError(f"{name} exceeds max_vocab={options.max_vocab}")


def _inputs(
    options: PrepareOptions, corpus: Corpus, scan: CorpusScan, given: TextTokenizer | None
) -> dict[str, str | int | float | None]:
    """Collect all that decides the result. Paths do not: the same files elsewhere give the same corpus."""
    packed = options.layout is Layout.packed
    return {
        "format_version": FORMAT_VERSIONS[options.layout],
        "format": corpus.format.value,
        "documents": scan.documents,
        "bytes": scan.bytes,
        "documents_sha256": scan.sha256,
        "max_seq_len": options.sample_tokens if packed else None,
        "vocab_size": None if given else options.vocab_size,
        "tokenizer_sha256": given.sha256 if given else None,
        "eos_token": given.eos_token if given else None,
        "val_fraction": options.val_fraction,
        "seed": options.seed,
    }


def _check_out(out: Path, options: PrepareOptions) -> None:
    """Refuse, before anything is read, to write over anything but a corpus."""
    if not occupied(out):
        return
    if not (out / CORPUS_FILE).is_file():
        raise UserError(f"{options.out}: exists and is not a prepared corpus (no {CORPUS_FILE}); choose another OUT")
    foreign = sorted({entry.name for entry in out.iterdir()} - OUTPUTS)
    if options.overwrite and foreign:
        raise UserError(f"{options.out}: not overwritten, as it also holds {', '.join(foreign)}")


def _existing(out: Path, inputs: dict[str, Any], options: PrepareOptions) -> CorpusSummary | None:
    """Return the corpus in ``out`` if it is the one asked for; None if one has to be written.

    Raises:
        UserError: ``out`` holds another corpus, and is not to be overwritten.
    """
    if options.overwrite or not (out / CORPUS_FILE).is_file():
        return None
    summary = read_corpus_summary(out)
    names = sorted(inputs.keys() | summary.inputs.keys())
    differing = [
        f"{name} ({summary.inputs.get(name)} there, {inputs.get(name)} now)"
        for name in names
        if summary.inputs.get(name) != inputs.get(name)
    ]
    needed = ["tokenizer/tokenizer.json", *(f"{name}/index.json" for name in summary.splits)]
    if summary.layout is Layout.documents:
        needed += [f"{name}/{LENGTHS_FILE}" for name in summary.splits]
    differing += [f"{name} (missing there)" for name in needed if not (out / name).is_file()]
    if differing:
        raise UserError(f"{options.out}: holds another corpus; differs in {', '.join(differing)}; or overwrite=True")
    return summary


@dataclass(frozen=True)
class _Written:
    tokenizer: TextTokenizer
    splits: dict[str, SplitSummary]
    division: Division


def _write(
    corpus: Corpus, scan: CorpusScan, given: TextTokenizer | None, options: PrepareOptions, directory: Path
) -> _Written:
    """Write the tokenizer and the splits. Where a split gets no sample, divide anew and write again."""
    with Progress("loading libraries"):
        importlib.import_module("streaming")  # and torch: seconds
    division = Division(options.val_fraction)
    asked = [Split.train, Split.val] if options.val_fraction else [Split.train]
    for margin in (*RETRY_MARGINS, None):
        tokenizer = given or _train(corpus, scan, division, options)
        splits = {}
        with Progress("tokenizing", scan.bytes * len(asked)) as progress:
            for split in asked:
                documents = _documents(corpus, scan, division, split, options, progress)
                splits[split.value] = _write_split(_Counted(tokenizer, documents), options, directory / split.value)
        if all(split.samples for split in splits.values()):
            tokenizer.save(directory / "tokenizer")
            return _Written(tokenizer, splits, division)
        tokens = sum(split.tokens for split in splits.values())
        if margin is None or tokens < len(asked) * options.sample_tokens:
            raise UserError(_too_little(scan, splits, tokens, options))
        for split in asked:
            shutil.rmtree(directory / split.value)
        needed_bytes = margin * options.sample_tokens * scan.bytes / tokens
        everything = islice(corpus.documents(), scan.documents)
        division = moved(everything, options.val_fraction, options.seed, needed_bytes) or by_position(
            scan.bytes, options.val_fraction, needed_bytes
        )
    raise AssertionError("the last attempt returns or raises")


def _too_little(scan: CorpusScan, splits: dict[str, SplitSummary], tokens: int, options: PrepareOptions) -> str:
    empty = " and ".join(name for name, split in splits.items() if not split.samples)
    lower = f" max_seq_len={options.sample_tokens}; add text, or lower that"
    return (
        f"{options.source}: no sample for {empty}: {scan.documents} document(s) have {tokens} tokens in all, and each "
        f"of {' and '.join(splits)} needs"
        + (lower if options.layout is Layout.packed else " a document; add text")
        + (", or hold nothing out: val_fraction=0" if len(splits) > 1 else "")
    )


def _documents(
    corpus: Corpus, scan: CorpusScan, division: Division, split: Split, options: PrepareOptions, progress: Progress
) -> Iterator[Document]:
    """Yield the admitted documents of one split.

    Raises:
        UserError: The corpus has changed since it was scanned.
    """
    digest = hashlib.sha256()

    def unchanged() -> Iterator[Document]:
        for document in islice(corpus.documents(), scan.documents):
            data = document.text.encode()
            add_to_digest(digest, document, data)
            yield document
            progress.update(len(data))
        if digest.hexdigest() != scan.sha256:
            raise UserError(f"{options.source}: changed while it was read; prepare it when nothing writes to it")

    return division.divide(unchanged(), split, options.seed)


def _train(corpus: Corpus, scan: CorpusScan, division: Division, options: PrepareOptions) -> TextTokenizer:
    """Train the tokenizer on the training split, or on an even sample of it where it is large."""
    share = min(1.0, TOKENIZER_SAMPLE_BYTES / scan.bytes)
    with Progress("learning the tokenizer", scan.bytes) as progress:
        texts = (
            document.text
            for document in _documents(corpus, scan, division, Split.train, options, progress)
            if unit_hash(f"tokenizer\0{document.doc_id}", options.seed) < share
        )
        return train_tokenizer(texts, options.vocab_size)


class _Counted:
    """Token documents of one split, counted as they pass."""

    def __init__(self, tokenizer: TextTokenizer, documents: Iterable[Document]) -> None:
        self.tokenizer = tokenizer
        self._source = documents
        self.documents = self.bytes = self.tokens = 0

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for texts in _batches(document.text for document in self._source):
            for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
                self.documents += 1
                self.bytes += len(text.encode())
                self.tokens += len(ids) + 1  # and the end-of-text token
                yield ids


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts into lists of about :data:`ENCODE_BATCH_BYTES` characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= ENCODE_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_split(documents: _Counted, options: PrepareOptions, directory: Path) -> SplitSummary:
    """Write the documents into MDS shards, packed or one a sample."""
    from streaming import MDSWriter

    tokenizer = documents.tokenizer
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    packed = options.layout is Layout.packed
    column = f"ndarray:{np.dtype(dtype).name}" + (f":{options.sample_tokens}" if packed else "")
    if packed:
        samples = pack(documents, eos_id=tokenizer.eos_id, seq_len=options.sample_tokens, dtype=dtype)
    else:
        samples = ended(documents, eos_id=tokenizer.eos_id, dtype=dtype)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    lengths = []
    with MDSWriter(columns={"tokens": column}, out=str(directory), hashes=HASHES, size_limit=SHARD_BYTES) as writer:
        for sample in samples:
            writer.write({"tokens": sample})
            counts += np.bincount(sample, minlength=tokenizer.vocab_size)
            lengths.append(len(sample))
    return SplitSummary(
        documents=documents.documents,
        bytes=documents.bytes,
        tokens=documents.tokens,
        samples=len(lengths),
        dropped_tokens=documents.tokens - sum(lengths),
        unigram_entropy_nats=unigram_entropy(counts),
        sha256=stream_digest(directory),
        unknown_tokens=0 if (unknown := tokenizer.unknown_id) is None else int(counts[unknown]),
        lengths_sha256=None if packed else _write_lengths(directory / LENGTHS_FILE, lengths),
    )


def _write_lengths(file: Path, lengths: list[int]) -> str:
    """Write the lengths of the samples; return the SHA-256, in hex, of the file."""
    np.save(file, np.array(lengths, np.int32))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Compute the entropy in nats of the distribution proportional to ``counts``; 0.0 if all are zero."""
    seen = counts[counts > 0].astype(np.float64)
    if not seen.size:
        return 0.0
    probabilities = seen / seen.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
