"""`moefoundry prepare`: a corpus becomes a directory that training can read.

Layout of the result::

    OUT/tokenizer/    Hugging Face tokenizer
    OUT/train/        MDS shards of packed samples, column ``tokens``: max_seq_len ids of uint16 (uint32 if needed)
    OUT/val/          the same, of held-out files
    OUT/corpus.json   counts, unigram entropies, options and the digest of the input (see ``summary``)

Everything is written into a hidden sibling of OUT, which is renamed to OUT at the end: an interrupted run leaves
nothing that looks complete. The result is a function of the documents and the options alone, so a second run has
nothing to do, and a run that would give something else refuses instead of replacing data that may be in use.

The corpus is read several times (digest, tokenizer, each split) rather than held in memory; reading is far cheaper
than tokenizing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from moefoundry import __version__
from moefoundry.config.errors import UserError
from moefoundry.data.corpus import Corpus, CorpusFormat, CorpusScan, Document, Split, open_corpus, split_of, unit_hash
from moefoundry.data.identity import corpus_digest, stream_digest
from moefoundry.data.packing import pack
from moefoundry.data.summary import CORPUS_FILE, FORMAT_VERSION, CorpusSummary, SplitSummary, read_corpus_summary
from moefoundry.data.tokenizer import TextTokenizer, check_trainable, load_tokenizer, train_tokenizer

OUTPUTS = {"tokenizer", "train", "val", CORPUS_FILE}
HASHES = ["sha1", "xxh64"]  # of every shard, in its index; sorted, as MDSWriter demands
SHARD_BYTES = 1 << 24  # 16 MiB: a few seconds of download, and enough shards to shuffle across
TOKENIZER_SAMPLE_BYTES = 1 << 27  # 128 MiB of text; merges hardly change beyond, memory and time do
ENCODE_BATCH_BYTES = 1 << 22  # text handed to the tokenizer's threads at once


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare and how.

    Attributes:
        source: File, directory or ``stdlib``.
        out: Directory to make.
        max_seq_len: Tokens a sample.
        vocab_size: Vocabulary of the tokenizer that is trained; unused with ``tokenizer``.
        tokenizer: A Hugging Face tokenizer directory to use instead of training one.
        max_vocab: Refuse a larger vocabulary (the model's ``vocab_size``).
        format: How documents are stored; inferred if None.
        globs: Patterns of a source tree.
        text_key: JSONL key of the text.
        val_fraction: Expected share of files (documents for JSONL) held out.
        max_docs: Use only the first so many documents.
        max_bytes: Use only the first documents of so many bytes.
        seed: Decides which files are held out, and the tokenizer's sample.
        overwrite: Replace a corpus that was prepared from something else, or differently.
    """

    source: str
    out: Path
    max_seq_len: int = 512
    vocab_size: int = 4096
    tokenizer: Path | None = None
    max_vocab: int | None = None
    format: CorpusFormat | None = None
    globs: tuple[str, ...] = ()
    text_key: str = "text"
    val_fraction: float = 0.05
    max_docs: int | None = None
    max_bytes: int | None = None
    seed: int = 17
    overwrite: bool = False


@dataclass(frozen=True)
class PreparedSummary:
    """What :func:`prepare` did: ``up_to_date`` is True if ``out`` already held just that and nothing was written."""

    out: Path
    corpus: CorpusSummary
    up_to_date: bool


def prepare(options: PrepareOptions) -> PreparedSummary:
    """Make a prepared corpus, or find that it is there.

    Raises:
        UserError: Bad options or input, ``out`` holds something else, or it cannot be written. ``out`` is untouched.
    """
    _check_numbers(options)
    out = options.out.resolve()
    corpus = open_corpus(options.source, options.format, options.globs, options.text_key)
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    _check_vocab(given, options)
    scan = corpus.scan(options.max_docs, options.max_bytes)
    if not scan.documents:
        raise UserError(
            f"{options.source}: empty corpus: no document with text in {len(corpus.paths)} file(s)"
            + (" within --max-docs and --max-bytes" if options.max_docs or options.max_bytes else "")
        )
    inputs = _inputs(options, corpus, scan, given)
    existing = _existing(out, inputs, options)
    if existing is not None:
        return PreparedSummary(options.out, existing, up_to_date=True)

    with _staging(out) as staging:
        tokenizer = given or _train(corpus, scan, options)
        tokenizer.save(staging / "tokenizer")
        splits = _write_splits(corpus, scan, tokenizer, options, staging)
        summary = CorpusSummary(
            format_version=FORMAT_VERSION,
            moefoundry_version=__version__,
            source=options.source,
            max_seq_len=options.max_seq_len,
            vocab_size=tokenizer.vocab_size,
            eos_token=tokenizer.eos_token,
            eos_id=tokenizer.eos_id,
            tokenizer_sha256=tokenizer.sha256,
            skipped=scan.skipped,
            inputs=inputs,
            splits=splits,
            sha256=corpus_digest(
                tokenizer.sha256, tokenizer.eos_id, {name: split.sha256 for name, split in splits.items()}
            ),
        )
        summary.write(staging)
    return PreparedSummary(options.out, summary, up_to_date=False)


def _check_numbers(options: PrepareOptions) -> None:
    """Refuse numbers out of range, by the name of their option."""
    if options.max_seq_len < 2:
        raise UserError(f"--max-seq-len {options.max_seq_len}: at least 2 (a token and the next one)")
    if not 0 < options.val_fraction < 1:
        raise UserError(f"--val-fraction {options.val_fraction}: must lie between 0 and 1")
    if options.tokenizer is None:
        check_trainable(options.vocab_size)
    for name, cap in (("--max-docs", options.max_docs), ("--max-bytes", options.max_bytes)):
        if cap is not None and cap < 1:
            raise UserError(f"{name} {cap}: at least 1")


def _check_vocab(given: TextTokenizer | None, options: PrepareOptions) -> None:
    """Refuse a vocabulary above the limit before any work; a trained one has at most ``vocab_size`` tokens."""
    name, size = (f"--vocab-size {options.vocab_size}", options.vocab_size)
    if given is not None:
        name, size = (f"{options.tokenizer}: the tokenizer's vocabulary of {given.vocab_size}", given.vocab_size)
    if options.max_vocab is not None and size > options.max_vocab:
        raise UserError(f"{name} exceeds --max-vocab {options.max_vocab}")


def _inputs(
    options: PrepareOptions, corpus: Corpus, scan: CorpusScan, given: TextTokenizer | None
) -> dict[str, str | int | float | None]:
    """All that decides the result. Paths are not in it: the same files elsewhere give the same corpus."""
    return {
        "format_version": FORMAT_VERSION,
        "format": corpus.format.value,
        "documents": scan.documents,
        "bytes": scan.bytes,
        "documents_sha256": scan.sha256,
        "max_seq_len": options.max_seq_len,
        "vocab_size": None if given else options.vocab_size,
        "tokenizer_sha256": given.sha256 if given else None,
        "eos_token": given.eos_token if given else None,
        "val_fraction": options.val_fraction,
        "seed": options.seed,
    }


def _existing(out: Path, inputs: dict[str, Any], options: PrepareOptions) -> CorpusSummary | None:
    """What ``out`` holds, if it is what was asked for; None if it is to be written.

    Raises:
        UserError: ``out`` holds something else: another corpus without ``--overwrite``, or no corpus at all.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / CORPUS_FILE).is_file():
        raise UserError(f"{options.out}: exists and is not a prepared corpus (no {CORPUS_FILE}); choose another OUT")
    foreign = sorted({entry.name for entry in out.iterdir()} - OUTPUTS)
    if options.overwrite and foreign:
        raise UserError(f"{options.out}: not overwritten, as it also holds {', '.join(foreign)}")
    if options.overwrite:
        return None
    summary = read_corpus_summary(out)
    names = sorted(inputs.keys() | summary.inputs.keys())
    differing = [
        f"{name} ({summary.inputs.get(name)} there, {inputs.get(name)} now)"
        for name in names
        if summary.inputs.get(name) != inputs.get(name)
    ]
    needed = ("tokenizer/tokenizer.json", "train/index.json", "val/index.json")
    differing += [f"{name} (missing there)" for name in needed if not (out / name).is_file()]
    if differing:
        raise UserError(f"{options.out}: holds another corpus; differs in {', '.join(differing)}; replace: --overwrite")
    return summary


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden sibling of ``out`` that takes its place when the body succeeds, and is gone when it does not."""
    staging = out.parent / f".{out.name}.partial-{os.getpid()}"
    retired = out.parent / f".{out.name}.replaced-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        yield staging
        if out.exists():
            out.rename(retired)
        try:
            staging.rename(out)
        except OSError:
            retired.rename(out)
            raise
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _documents(corpus: Corpus, scan: CorpusScan, split: Split, options: PrepareOptions) -> Iterator[Document]:
    """The admitted documents of one split."""
    for document in islice(corpus.documents(), scan.documents):
        if split_of(document, options.val_fraction, options.seed) is split:
            yield document


def _train(corpus: Corpus, scan: CorpusScan, options: PrepareOptions) -> TextTokenizer:
    """Train the tokenizer on the training split, or on an even sample of it where it is large."""
    share = min(1.0, TOKENIZER_SAMPLE_BYTES / scan.bytes)
    texts = (
        document.text
        for document in _documents(corpus, scan, Split.train, options)
        if unit_hash(f"tokenizer\0{document.doc_id}", options.seed) < share
    )
    return train_tokenizer(texts, options.vocab_size)


def _write_splits(
    corpus: Corpus, scan: CorpusScan, tokenizer: TextTokenizer, options: PrepareOptions, staging: Path
) -> dict[str, SplitSummary]:
    """Write both splits, with a progress bar over the bytes of the text where stderr is a terminal."""
    splits = {}
    with tqdm(total=scan.bytes, desc="tokenizing", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for split in Split:
            counted = _Counted(tokenizer, _documents(corpus, scan, split, options), bar)
            splits[split.value] = _write_split(counted, options.max_seq_len, staging / split.value)
            if not splits[split.value].samples:
                raise UserError(
                    f"{options.source}: the {split.value} split has no sample: {counted.documents} of {scan.documents} "
                    f"document(s), {counted.tokens} tokens, and a sample takes --max-seq-len {options.max_seq_len}; "
                    "more files, a shorter sample, or another --val-fraction is needed"
                )
    return splits


class _Counted:
    """Token documents of one split, counted as they pass."""

    def __init__(self, tokenizer: TextTokenizer, documents: Iterable[Document], bar: Any) -> None:
        self.tokenizer = tokenizer
        self._source = documents
        self._bar = bar
        self.documents = self.bytes = self.tokens = 0

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for texts in _batches(document.text for document in self._source):
            for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
                size = len(text.encode())
                self._bar.update(size)
                self.documents += 1
                self.bytes += size
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


def _write_split(documents: _Counted, seq_len: int, directory: Path) -> SplitSummary:
    """Pack the documents into MDS shards."""
    from streaming import MDSWriter  # imports torch: seconds

    vocab_size = documents.tokenizer.vocab_size
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    column = {"tokens": f"ndarray:{np.dtype(dtype).name}:{seq_len}"}
    counts = np.zeros(vocab_size, np.int64)
    samples = 0
    with MDSWriter(columns=column, out=str(directory), hashes=HASHES, size_limit=SHARD_BYTES) as writer:
        for sample in pack(documents, eos_id=documents.tokenizer.eos_id, seq_len=seq_len, dtype=dtype):
            writer.write({"tokens": sample})
            counts += np.bincount(sample, minlength=vocab_size)
            samples += 1
    return SplitSummary(
        documents=documents.documents,
        bytes=documents.bytes,
        tokens=documents.tokens,
        samples=samples,
        dropped_tokens=documents.tokens - samples * seq_len,
        unigram_entropy_nats=unigram_entropy(counts),
        sha256=stream_digest(directory),
    )


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution proportional to ``counts``; 0.0 if all are zero."""
    seen = counts[counts > 0].astype(np.float64)
    if not seen.size:
        return 0.0
    probabilities = seen / seen.sum()
    return float(-(probabilities * np.log(probabilities)).sum())
