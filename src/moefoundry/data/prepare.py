"""Preparation of a corpus as a directory that training reads: ``moefoundry prepare``.

Layout of the result::

    OUT/tokenizer/    Hugging Face tokenizer
    OUT/train/        MDS shards, column ``tokens``: ids of uint16 (uint32 if needed)
    OUT/val/          the same, of held-out files; absent with a ``val_fraction`` of 0
    OUT/corpus.json   counts, unigram entropies, options and the digest of the input (see ``summary``)

A sample is one document of any length, end-of-text token included, and beside the shards ``lengths.npy`` (int32
[documents]) has the lengths of all samples in order. In the layout ``packed`` it has max_seq_len tokens.

OUT appears when it is complete (:mod:`moefoundry.data.staging`). The result is a function of the documents and the
options alone, so a second run has nothing to do, and a run that would give something else refuses instead of replacing
data that may be in use.

The corpus is read several times (digest, tokenizer, tokens) rather than held in memory; reading is far cheaper than
tokenizing. It is cut into blocks (:mod:`moefoundry.data.blocks`), which processes turn into shards independently of
each other (:mod:`moefoundry.data.writing`) in a hidden directory beside OUT. A run that is ended, by whatever it may
be, leaves the finished blocks there, and the same command goes on with the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.data.assembly import Facts, join, pack_samples, tokens_of
from moefoundry.data.blocks import name_in_file, numbered
from moefoundry.data.corpus import Corpus, Document
from moefoundry.data.left_out import LeftOut
from moefoundry.data.opening import Opened, existing_corpus, finished_before, inputs_of, open_all
from moefoundry.data.options import PrepareOptions, expanded
from moefoundry.data.places import LocalPlace
from moefoundry.data.progress import Progress
from moefoundry.data.splits import Division, Split, by_position, moved, unit_hash
from moefoundry.data.summary import (
    CorpusSummary,
    Layout,
)
from moefoundry.data.survey import (
    Survey,
    digest_of,
    documents_of,
    survey_in_order,
    survey_in_parallel,
    unusable_of,
)
from moefoundry.data.tokenizer import TextTokenizer, train_tokenizer
from moefoundry.data.workers import run_jobs
from moefoundry.data.writing import BlockJob, BlockRecord, BlockWriter

SHARD_BYTES = 1 << 24  # 16 MiB: a few seconds of download, and enough shards to shuffle across
BLOCK_BYTES = 1 << 25  # 32 MiB of files at most: seconds of work, and one or two shards
TOKENIZER_SAMPLE_BYTES = 1 << 27  # 128 MiB of text; merges hardly change beyond, memory and time do
ENCODE_BATCH_BYTES = 1 << 20  # text handed to the tokenizer at once, which makes about 50 times as much of it
RETRY_MARGINS = (1.2, 2.0, 4.0)  # text for a sample, over that of an average one, where a split got none


@dataclass(frozen=True)
class PreparedSummary:
    """Result of :func:`prepare`.

    Attributes:
        out: The directory, or its URL.
        corpus: Summary of its content.
        up_to_date: True if it was there already, and nothing was written.
        ignored: Number of files of each suffix in the source that are of other kinds than the corpus.
    """

    out: Path | str
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
        return _prepare(open_all(options, BLOCK_BYTES))
    except OSError as error:
        raise UserError(f"{error.filename or options.out}: {error.strerror or error}") from error


def _prepare(opened: Opened) -> PreparedSummary:
    options, corpus = opened.options, opened.corpus
    survey = _survey(opened)
    inputs = inputs_of(opened, survey)
    existing = existing_corpus(opened, inputs)
    if existing is not None:
        return PreparedSummary(options.out, existing, up_to_date=True, ignored=corpus.ignored)
    summary = finished_before(opened, inputs) or _make(opened, survey, inputs)
    if opened.stored:
        opened.stored.upload(opened.out)
        shutil.rmtree(opened.out.parent, ignore_errors=True)
    return PreparedSummary(options.out, summary, up_to_date=False, ignored=corpus.ignored)


def _make(opened: Opened, survey: Survey, inputs: dict[str, Any]) -> CorpusSummary:
    """Make the directory."""
    options = opened.options
    place = place_of(opened.out)
    with _work(place, opened.out, keep=len(survey.blocks) > 1):
        writer, records = _write(opened, survey, place)
        left_out, kept_bytes = left_out_of(opened.corpus, survey, records)
        left_out.check(options.source, kept_bytes, options.max_loss, "")
        facts = Facts(options, inputs, left_out, kept_bytes, writer.tokenizer, writer.division, SHARD_BYTES)
        assemble = join if options.stored_as is Layout.documents else pack_samples
        return assemble(place, records, facts, opened.out)


def place_of(out: Path) -> LocalPlace:
    """Return the place where the blocks of the corpus ``out`` are put together."""
    return LocalPlace(out.parent / f".{out.name}.blocks")


@contextmanager
def _work(place: LocalPlace, out: Path, keep: bool) -> Iterator[None]:
    """Lock the place of the blocks, and remove it at the end; after an error, only if there is nothing to ``keep``."""
    with working(out), place.locked():
        try:
            yield
        except BaseException:
            if not (keep and any(name.endswith(".json") for name in place.names())):
                shutil.rmtree(place.directory, ignore_errors=True)
            raise
        shutil.rmtree(place.directory, ignore_errors=True)


@contextmanager
def working(out: Path) -> Iterator[None]:
    """Name ``out`` in the errors of files.

    Raises:
        UserError: The body raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else str(out)
        raise UserError(f"{out}: cannot be written: {error.strerror or error} ({name})") from error


def _survey(opened: Opened) -> Survey:
    """Read the corpus once; refuse one without text, or of which too much cannot be read."""
    options, corpus = opened.options, opened.corpus
    caps = options.max_docs, options.max_bytes
    if options.stored_as is Layout.documents and caps == (None, None):
        survey = survey_in_parallel(corpus, opened.blocks, unusable_of(corpus), opened.workers)
    else:
        with Progress("reading") as progress:
            blocks = numbered(corpus, opened.blocks) if options.stored_as is Layout.packed else opened.blocks
            survey = survey_in_order(corpus, blocks, *caps, progress.update)
    if options.stored_as is Layout.documents:
        survey = replace(survey, sha256=digest_of(survey.blocks))
    survey.left_out.check(options.source, survey.bytes, options.max_loss, corpus.hint(survey.left_out))
    if not survey.documents:
        limits = " and ".join(f"{name}={cap}" for name, cap in zip(("max_docs", "max_bytes"), caps, strict=True) if cap)
        raise UserError(
            f"{options.source}: empty corpus: no document with text in {len(corpus.paths)} file(s)"
            + f"{limits and ' within '}{limits}"
            + survey.left_out.behind()
        )
    return survey


def left_out_of(corpus: Corpus, survey: Survey, records: list[BlockRecord]) -> tuple[LeftOut, int]:
    """Add up what was left out when the corpus was read, and when it was written; and count the bytes that were not."""
    left_out = LeftOut()
    left_out.add_all(survey.left_out)
    lost = 0
    for surveyed, record in zip(survey.blocks, records, strict=True):
        left_out.add_all(LeftOut(record.left_out), partial(name_in_file, corpus.root, surveyed.block))
        lost += sum(left["bytes"] for left in record.left_out.values())
    return left_out, survey.bytes - lost


def make_writer(opened: Opened, place: LocalPlace, tokenizer: TextTokenizer, division: Division) -> BlockWriter:
    """Make the writer of the blocks."""
    return BlockWriter(
        corpus=opened.corpus,
        tokenizer=tokenizer,
        division=division,
        splits=(Split.train, Split.val) if opened.options.val_fraction else (Split.train,),
        seed=opened.options.seed,
        layout=opened.options.stored_as,
        shard_bytes=SHARD_BYTES,
        batch_bytes=ENCODE_BATCH_BYTES,
        place=place,
        records=opened.encoder,
    )


def _write(opened: Opened, survey: Survey, place: LocalPlace) -> tuple[BlockWriter, list[BlockRecord]]:
    """Write the blocks. Where a split gets no sample, divide anew and write again."""
    corpus, options = opened.corpus, opened.options
    division = Division(options.val_fraction)
    for margin in (*RETRY_MARGINS, None):
        tokenizer = opened.given or _train(corpus, survey, division, options)
        writer = make_writer(opened, place, tokenizer, division)
        asked = writer.splits
        records = write_blocks(writer, survey, opened.workers)
        tokens = {split.value: tokens_of(records, split.value) for split in asked}
        if all(count >= options.sample_tokens for count in tokens.values()):
            return writer, records
        total = sum(tokens.values())
        left_out, kept_bytes = left_out_of(corpus, survey, records)
        too_little = _too_little(survey, tokens, options) + left_out.behind()
        if margin is None or total < len(asked) * options.sample_tokens:
            left_out.check(options.source, kept_bytes, options.max_loss, "")
            raise UserError(too_little)
        needed_bytes = margin * options.sample_tokens * survey.bytes / total
        everything = _documents(corpus, survey)
        shifted = moved(everything, options.val_fraction, options.seed, needed_bytes)
        if shifted is None and opened.encoder is not None:  # a record cannot be cut in two
            raise UserError(too_little)
        division = shifted or by_position(survey.bytes, options.val_fraction, needed_bytes)
    raise AssertionError("the last attempt returns or raises")


def write_blocks(writer: BlockWriter, survey: Survey, workers: int) -> list[BlockRecord]:
    """Write the blocks that are not there yet; return the records of all, in order."""
    positions = [0, *accumulate(block.bytes for block in survey.blocks)]
    jobs = [BlockJob(block, position) for block, position in zip(survey.blocks, positions, strict=False)]
    records = {job.number: record for job in jobs if (record := writer.finished(job))}
    missing = [job for job in jobs if job.number not in records]
    with Progress("tokenizing", sum(job.surveyed.bytes for job in missing)) as progress:
        done = lambda record: records.update({record.number: record})  # noqa: E731
        run_jobs(writer.write, missing, workers, progress.update, done)
    return [records[job.number] for job in jobs]


def _too_little(survey: Survey, tokens: dict[str, int], options: PrepareOptions) -> str:
    empty = " and ".join(name for name, count in tokens.items() if count < options.sample_tokens)
    lower = f" max_seq_len={options.sample_tokens}; add text, or lower that"
    return (
        f"{options.source}: no sample for {empty}: {survey.documents} document(s) have {sum(tokens.values())} tokens "
        f"in all, and each of {' and '.join(tokens)} needs"
        + (lower if options.stored_as is Layout.packed else " a document; add text")
        + (", or hold nothing out: val_fraction=0" if len(tokens) > 1 else "")
    )


def _documents(corpus: Corpus, survey: Survey, progress: Progress | None = None) -> Iterator[Document]:
    """Yield the admitted documents.

    Raises:
        UserError: The corpus has changed since it was surveyed.
    """
    for block in survey.blocks:
        yield from documents_of(corpus, block, progress.update if progress else lambda documents, size: None)


def _train(corpus: Corpus, survey: Survey, division: Division, options: PrepareOptions) -> TextTokenizer:
    """Train the tokenizer on the training split, or on an even sample of it where it is large."""
    share = min(1.0, TOKENIZER_SAMPLE_BYTES / survey.bytes)
    with Progress("learning the tokenizer", survey.bytes) as progress:
        texts = (
            document.text
            for split, document in division.divide(_documents(corpus, survey, progress), options.seed)
            if split is Split.train and unit_hash(f"tokenizer\0{document.doc_id}", options.seed) < share
        )
        return train_tokenizer(texts, options.vocab_size)
