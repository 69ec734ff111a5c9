"""One corpus by several processes on any machines: each prepares a part of the blocks, and a last one merges them.

Whoever starts them, an array of a batch scheduler or Ray, need only give each its number: which blocks are a part's
follows from the list of files, and parts do not speak to each other. They write to the hidden directory beside OUT that
a single process uses, so it must be one that all of them see. The merged corpus is that of a single process, bit for
bit. A part leaves these files there, beside its blocks::

    blocks/part-00001-of-00010.json    what it read and what decides the content, put there last
    blocks/tokenizer/                  the tokenizer, the same of every part
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.data import prepare
from moefoundry.data.assembly import Facts, join, tokens_of
from moefoundry.data.encoding import SETTINGS
from moefoundry.data.left_out import Left, LeftOut
from moefoundry.data.opening import check_out, inputs_of, open_all
from moefoundry.data.options import Part, PrepareOptions, expanded
from moefoundry.data.places import LocalPlace
from moefoundry.data.prepare import PreparedSummary, left_out_of, make_writer, place_of, working, write_blocks
from moefoundry.data.splits import Division
from moefoundry.data.summary import CORPUS_FILE, Layout
from moefoundry.data.survey import digest_of_digests, survey_in_parallel, unusable_of
from moefoundry.data.tokenizer import TextTokenizer, load_tokenizer
from moefoundry.data.writing import BLOCKS, BlockRecord, read_record

PART = re.compile(rf"{BLOCKS}/part-(\d+)-of-(\d+)\.json")
TOKENIZER = f"{BLOCKS}/tokenizer"
OF_THE_WHOLE = ("documents", "bytes", "documents_sha256")
"""Inputs that no part knows."""


@dataclass(frozen=True)
class PartSummary:
    """Result of :func:`prepare_part`.

    Attributes:
        part: Number of the part and of all parts.
        blocks: Number of its blocks.
        documents: Number of their documents.
        tokens: Their tokens.
    """

    part: str
    blocks: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class _PartRecord:
    """Record of a part, as it is stored.

    Attributes:
        number: Number of the part, from 1.
        source: The source as the user gave it.
        inputs: All that decides the content; of the documents, those of the part.
        plan: Digest of the cut into blocks.
        max_loss: Share of the bytes that may be left out.
        blocks: Number, documents, bytes, digest and key of each block.
        left_out: Losses by reason.
        kept_bytes: UTF-8 bytes of the documents that are not among these.
    """

    number: int
    source: str
    inputs: dict[str, Any]
    plan: str
    max_loss: float
    blocks: list[tuple[int, int, int, str, str]]
    left_out: dict[str, Left]
    kept_bytes: int


def prepare_part(options: PrepareOptions, part: Part) -> PartSummary:
    """Prepare a part of a corpus; finished blocks of an earlier attempt are kept.

    Raises:
        UserError: Bad options or input; ``out`` exists; or nothing of the part can be read.
    """
    options = expanded(options)
    check_part(options, part)
    opened = open_all(options, prepare.BLOCK_BYTES)
    assert opened.given is not None
    if (opened.out / CORPUS_FILE).exists() and not options.overwrite:
        raise UserError(f"{options.out}: is there already; choose another OUT, or overwrite=True")
    place = place_of(opened.out)
    _check_count(place, part, options.out)
    corpus = opened.corpus
    left_out = unusable_of(corpus) if part.number == 1 else LeftOut()
    survey = survey_in_parallel(corpus, part.of(opened.blocks), left_out, opened.workers)
    if not survey.documents:
        survey.left_out.check(options.source, 0, options.max_loss, corpus.hint(survey.left_out))
    with working(opened.out), place.locked(shared=True):
        writer = make_writer(opened, place, opened.given, Division(options.val_fraction))
        records = write_blocks(writer, survey, opened.workers)
        left_out, kept_bytes = left_out_of(corpus, survey, records)
        record = _PartRecord(
            number=part.number,
            source=options.source,
            inputs=inputs_of(opened, survey),
            plan=hashlib.sha256(repr(opened.blocks).encode()).hexdigest(),
            max_loss=options.max_loss,
            blocks=[
                (record.number, block.documents, block.bytes, block.sha256, record.key)
                for record, block in zip(records, survey.blocks, strict=True)
            ],
            left_out=left_out.reasons,
            kept_bytes=kept_bytes,
        )
        _check_count(place, part, options.out)  # of one that was finished meanwhile
        _put(place, record, part, opened.given)
    tokens = sum(tokens_of(records, split.value) for split in writer.splits)
    return PartSummary(str(part), len(records), survey.documents, tokens)


def check_part(options: PrepareOptions, part: Part) -> None:
    """Refuse options that parts cannot have.

    Raises:
        UserError: Names the first.
    """
    if isinstance(options.out, str):
        raise UserError(f"part={part}: OUT is a directory that the machines of all parts see, not a URL")
    if options.stored_as is not Layout.documents:
        raise UserError(f"part={part}: parts are documents, which are packed when they are read: layout=documents")
    if options.tokenizer is None:
        raise UserError(f"part={part}: needs tokenizer=..., one for all parts; a run with max_bytes=... makes one")
    if options.max_docs is not None or options.max_bytes is not None:
        raise UserError(f"part={part}: neither with max_docs=... nor with max_bytes=..., which count from the start")


def _check_count(place: LocalPlace, part: Part, out: Path | str) -> None:
    """Refuse a part of another number of parts than those that are finished.

    Raises:
        UserError: Says which there are.
    """
    others = [(int(match[1]), int(match[2])) for name in place.names() if (match := PART.fullmatch(name))]
    for number, count in others:
        if count != part.count:
            raise UserError(
                f"part={part}: {out} has part {number}/{count} already; give part=I/{count}, "
                f"or remove {place.directory} to begin again with {part.count} parts"
            )


def _put(place: LocalPlace, record: _PartRecord, part: Part, tokenizer: TextTokenizer) -> None:
    with place.scratch() as scratch:
        for name, content in tokenizer.files.items():
            (scratch / name).write_bytes(content)
            place.put(scratch / name, f"{TOKENIZER}/{name}")
        (scratch / "record").write_text(json.dumps(asdict(record)))
        place.put(scratch / "record", f"{BLOCKS}/part-{part.number:05d}-of-{part.count:05d}.json")


def merge_parts(out: Path, overwrite: bool = False) -> PreparedSummary:
    """Merge the parts of a corpus.

    Args:
        out: The directory that the parts were given.
        overwrite: Replace the corpus there.

    Raises:
        UserError: Parts are missing, or were prepared differently, from other files or with another tokenizer; too much
            was left out; a split is empty; or ``out`` holds something else.
    """
    real = Path(os.path.realpath(os.path.expanduser(out)))
    options = PrepareOptions("", out, layout=Layout.documents, overwrite=overwrite)
    check_out(real, options)
    place = place_of(real)
    if not place.directory.is_dir():
        raise UserError(f"{out}: no parts of it were prepared (prepare SOURCE {out} part=1/N ...)")
    with working(real), place.locked():
        parts = _parts(place, out)
        tokenizer = load_tokenizer(place.directory / TOKENIZER)
        blocks = [block for part in parts for block in part.blocks]
        records = _records(place, blocks, out)
        left_out = LeftOut()
        for part in parts:
            left_out.add_all(LeftOut(part.left_out))
        nbytes, kept_bytes = sum(block[2] for block in blocks), sum(part.kept_bytes for part in parts)
        left_out.check(parts[0].source, kept_bytes, min(part.max_loss for part in parts), "")
        _check_splits(records, out, left_out)
        sha256 = digest_of_digests((block[1], block[3]) for block in blocks)
        whole = (sum(block[1] for block in blocks), nbytes, sha256)
        inputs = parts[0].inputs | dict(zip(OF_THE_WHOLE, whole, strict=True))
        options = replace(options, source=parts[0].source)
        division = Division(parts[0].inputs["val_fraction"])
        facts = Facts(options, inputs, left_out, kept_bytes, tokenizer, division, prepare.SHARD_BYTES)
        summary = join(place, records, facts, real)
    return PreparedSummary(out, summary, up_to_date=False)


def _parts(place: LocalPlace, out: Path) -> list[_PartRecord]:
    """Read the records of all parts, in order.

    Raises:
        UserError: Parts are missing or damaged, or they are not parts of one corpus.
    """
    found = [(int(match[1]), int(match[2]), name) for name in place.names() if (match := PART.fullmatch(name))]
    counts = sorted({count for _, count, _ in found})
    if len(counts) != 1:
        there = f"parts of {' and of '.join(map(str, counts))} parts" if counts else "no finished part"
        raise UserError(f"{out}: {there} in {place.directory}; prepare all of 1/N to N/N with one N, and no others")
    missing = sorted(set(range(1, counts[0] + 1)) - {number for number, _, _ in found})
    if missing:
        named = ", ".join(f"{number}/{counts[0]}" for number in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"{out}: {len(missing)} of {counts[0]} parts are not finished: {named}")
    parts = [_read_part(place.directory / name) for _, _, name in sorted(found)]
    for part in parts[1:]:
        differing = _differences(parts[0], part)
        if differing:
            raise UserError(f"{out}: parts 1 and {part.number} are not of one corpus; {'; '.join(differing)}")
    return parts


def _read_part(file: Path) -> _PartRecord:
    try:
        return _PartRecord(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {error}; delete it and prepare that part again") from error


def _differences(one: _PartRecord, other: _PartRecord) -> list[str]:
    pairs: list[tuple[str, Any, Any]] = [("files of the source", one.plan, other.plan)]
    theirs = {SETTINGS: one.inputs.get(SETTINGS)} | other.inputs  # which a part of an earlier version lacks
    pairs += [(key, value, theirs.get(key)) for key, value in one.inputs.items() if key not in OF_THE_WHOLE]
    return [f"{name}: {mine} and {their}" for name, mine, their in pairs if mine != their]


def _records(place: LocalPlace, blocks: Sequence[tuple[int, int, int, str, str]], out: Path) -> list[BlockRecord]:
    """Read the records of the blocks, in order.

    Raises:
        UserError: A block is not there, or it is another one than its part has written.
    """
    records = []
    for number, _, _, _, key in blocks:
        record = read_record(place, number)
        if record is None or record.key != key:
            raise UserError(f"{out}: block {number} is gone or was written anew; prepare its part again")
        records.append(record)
    assert [record.number for record in records] == [*range(len(records))]
    return records


def _check_splits(records: Sequence[BlockRecord], out: Path, left_out: LeftOut) -> None:
    """Refuse a corpus without a document in one of its splits."""
    if not records:
        raise UserError(f"{out}: no part has any text{left_out.behind()}")
    empty = [name for name in records[0].splits if not tokens_of(records, name)]
    if empty:
        remedy = "prepare the parts with another --val-fraction"
        raise UserError(f"{out}: no document for {' and '.join(empty)}{left_out.behind()}; {remedy}")
