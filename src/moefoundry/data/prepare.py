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

The corpus is read several times (digest, tokenizer, tokens) rather than held in memory; reading is far cheaper than
tokenizing. It is cut into blocks (:mod:`moefoundry.data.blocks`), which processes turn into shards independently of
each other (:mod:`moefoundry.data.writing`) in a hidden directory beside OUT. A run that is ended, by whatever it may
be, leaves the finished blocks there, and the same command goes on with the others.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.data.assembly import OUTPUTS, Facts, join, pack_samples, tokens_of
from moefoundry.data.blocks import Block, name_in_file, numbered, plan_blocks
from moefoundry.data.corpus import Corpus, Document, open_corpus
from moefoundry.data.encoding import RecordEncoder
from moefoundry.data.formats import RECORD_FORMATS
from moefoundry.data.left_out import LeftOut, describe_left_out
from moefoundry.data.options import PrepareOptions, check_numbers, expanded
from moefoundry.data.places import LocalPlace
from moefoundry.data.progress import Progress
from moefoundry.data.splits import Division, Split, by_position, moved, unit_hash
from moefoundry.data.staging import clear_abandoned, occupied
from moefoundry.data.summary import (
    CORPUS_FILE,
    FORMAT_VERSIONS,
    LENGTHS_FILE,
    CorpusSummary,
    Layout,
    read_corpus_summary,
)
from moefoundry.data.survey import (
    Survey,
    Surveyed,
    digest_of,
    documents_of,
    joined,
    survey_block,
    survey_in_order,
    unusable_of,
)
from moefoundry.data.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from moefoundry.data.workers import available_cores, run_jobs
from moefoundry.data.writing import BlockJob, BlockRecord, BlockWriter

SHARD_BYTES = 1 << 24  # 16 MiB: a few seconds of download, and enough shards to shuffle across
BLOCK_BYTES = 1 << 25  # 32 MiB of files: a few seconds of work, and one or two shards
TOKENIZER_SAMPLE_BYTES = 1 << 27  # 128 MiB of text; merges hardly change beyond, memory and time do
ENCODE_BATCH_BYTES = 1 << 20  # text handed to the tokenizer at once, which makes about 50 times as much of it
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
    encoder = RecordEncoder.of(options)
    text_key = options.text_key if encoder is None else None
    corpus = open_corpus(options.source, options.format, options.globs, text_key, options.bad_bytes, leave=out)
    if encoder is not None and corpus.format not in RECORD_FORMATS:
        raise UserError(f"{options.source}: {corpus.format} has no records; {encoder.kind} are JSON Lines or Parquet")
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    _check_vocab(given, options)
    survey = _survey(corpus, plan_blocks(corpus, BLOCK_BYTES), options)
    inputs = _inputs(options, corpus, survey, given) | ({} if encoder is None else encoder.inputs())
    existing = _existing(out, inputs, options)
    if existing is not None:
        return PreparedSummary(options.out, existing, up_to_date=True, ignored=corpus.ignored)

    place = LocalPlace(out.parent / f".{out.name}.blocks")
    with _work(place, out, keep=len(survey.blocks) > 1):
        writer, records = _write(corpus, survey, given, options, place, encoder)
        left_out, kept_bytes = _left_out(corpus, survey, records)
        left_out.check(options.source, kept_bytes, options.max_loss, "")
        facts = Facts(options, inputs, left_out, kept_bytes, writer.tokenizer, writer.division, SHARD_BYTES)
        assemble = join if options.layout is Layout.documents else pack_samples
        summary = assemble(place, records, facts, out)
    return PreparedSummary(options.out, summary, up_to_date=False, ignored=corpus.ignored)


@contextmanager
def _work(place: LocalPlace, out: Path, keep: bool) -> Iterator[None]:
    """Lock the place of the blocks, and remove it at the end; after an error, only if there is nothing to ``keep``."""
    try:
        with place.locked():
            try:
                yield
            except BaseException:
                if not (keep and any(name.endswith(".json") for name in place.names())):
                    shutil.rmtree(place.directory, ignore_errors=True)
                raise
            shutil.rmtree(place.directory, ignore_errors=True)
    except OSError as error:
        name = error.filename if isinstance(error.filename, str) else str(out)
        raise UserError(f"{out}: cannot be written: {error.strerror or error} ({name})") from error


def _survey(corpus: Corpus, blocks: list[Block], options: PrepareOptions) -> Survey:
    """Read the corpus once; refuse one without text, or of which too much cannot be read."""
    with Progress("reading") as progress:
        if options.layout is Layout.packed:
            survey = survey_in_order(
                corpus, numbered(corpus, blocks), options.max_docs, options.max_bytes, progress.update
            )
        elif options.max_docs is not None or options.max_bytes is not None:
            survey = survey_in_order(corpus, blocks, options.max_docs, options.max_bytes, progress.update)
            survey = replace(survey, sha256=digest_of(survey.blocks))
        else:
            found: list[tuple[Surveyed, LeftOut]] = []
            run_jobs(partial(survey_block, corpus), blocks, _workers(options), progress.update, found.append)
            survey = joined(corpus, sorted(found, key=lambda item: item[0].block.number), unusable_of(corpus))
    survey.left_out.check(options.source, survey.bytes, options.max_loss, corpus.hint(survey.left_out))
    if not survey.documents:
        caps = {"max_docs": options.max_docs, "max_bytes": options.max_bytes}
        limits = " and ".join(f"{name}={cap}" for name, cap in caps.items() if cap)
        left_out = f" (left out: {describe_left_out(survey.left_out.reasons)})" if survey.left_out.count else ""
        raise UserError(
            f"{options.source}: empty corpus: no document with text in {len(corpus.paths)} file(s)"
            + f"{limits and ' within '}{limits}"
            + left_out
        )
    return survey


def _left_out(corpus: Corpus, survey: Survey, records: list[BlockRecord]) -> tuple[LeftOut, int]:
    """Add up what was left out when the corpus was read, and when it was written; and count the bytes that were not."""
    left_out = LeftOut()
    left_out.add_all(survey.left_out)
    lost = 0
    for surveyed, record in zip(survey.blocks, records, strict=True):
        left_out.add_all(LeftOut(record.left_out), partial(name_in_file, corpus.root, surveyed.block))
        lost += sum(left["bytes"] for left in record.left_out.values())
    return left_out, survey.bytes - lost


def _workers(options: PrepareOptions) -> int:
    return available_cores() if options.workers is None else options.workers


def _check_vocab(given: TextTokenizer | None, options: PrepareOptions) -> None:
    """Refuse a vocabulary above the limit before any work; a trained one has at most ``vocab_size`` tokens."""
    name, size = f"vocab_size={options.vocab_size}", options.vocab_size
    if given is not None:
        name, size = (f"{options.tokenizer}: the tokenizer's vocabulary of {given.vocab_size}", given.vocab_size)
    if options.max_vocab is not None and size > options.max_vocab:
        raise UserError(f"{name} exceeds max_vocab={options.max_vocab}")


def _inputs(
    options: PrepareOptions, corpus: Corpus, survey: Survey, given: TextTokenizer | None
) -> dict[str, str | int | float | None]:
    """Collect all that decides the result. Paths do not: the same files elsewhere give the same corpus."""
    packed = options.layout is Layout.packed
    return {
        "format_version": FORMAT_VERSIONS[options.layout],
        "format": corpus.format.value,
        "documents": survey.documents,
        "bytes": survey.bytes,
        "documents_sha256": survey.sha256,
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


def _write(
    corpus: Corpus,
    survey: Survey,
    given: TextTokenizer | None,
    options: PrepareOptions,
    place: LocalPlace,
    encoder: RecordEncoder | None,
) -> tuple[BlockWriter, list[BlockRecord]]:
    """Write the blocks. Where a split gets no sample, divide anew and write again."""
    with Progress("loading libraries"):
        importlib.import_module("streaming")  # and torch: seconds
    division = Division(options.val_fraction)
    asked = (Split.train, Split.val) if options.val_fraction else (Split.train,)
    for margin in (*RETRY_MARGINS, None):
        writer = BlockWriter(
            corpus=corpus,
            tokenizer=given or _train(corpus, survey, division, options),
            division=division,
            splits=asked,
            seed=options.seed,
            layout=options.layout,
            shard_bytes=SHARD_BYTES,
            batch_bytes=ENCODE_BATCH_BYTES,
            place=place,
            records=encoder,
        )
        records = write_blocks(writer, survey, _workers(options))
        tokens = {split.value: tokens_of(records, split.value) for split in asked}
        if all(count >= options.sample_tokens for count in tokens.values()):
            return writer, records
        total = sum(tokens.values())
        if margin is None or total < len(asked) * options.sample_tokens:
            raise UserError(_too_little(survey, tokens, options))
        needed_bytes = margin * options.sample_tokens * survey.bytes / total
        everything = _documents(corpus, survey)
        shifted = moved(everything, options.val_fraction, options.seed, needed_bytes)
        if shifted is None and encoder is not None:  # a record cannot be cut in two
            raise UserError(_too_little(survey, tokens, options))
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
        + (lower if options.layout is Layout.packed else " a document; add text")
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
