"""The beginning of a preparation: options are checked, what they name is opened, what is there already is found."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefoundry.config.errors import UserError
from moefoundry.data.assembly import OUTPUTS
from moefoundry.data.blocks import Block, block_size, plan_blocks
from moefoundry.data.corpus import Corpus, open_corpus
from moefoundry.data.encoding import SETTINGS, RecordEncoder
from moefoundry.data.fim import with_sentinels
from moefoundry.data.formats import RECORD_FORMATS
from moefoundry.data.options import PrepareOptions, check_numbers
from moefoundry.data.staging import clear_abandoned, occupied
from moefoundry.data.stored import StoredCorpus
from moefoundry.data.summary import (
    CORPUS_FILE,
    FORMAT_VERSIONS,
    LENGTHS_FILE,
    CorpusSummary,
    Layout,
    read_corpus_summary,
)
from moefoundry.data.survey import Survey
from moefoundry.data.tokenizer import TextTokenizer, load_tokenizer, settings_digest, settings_files
from moefoundry.data.workers import available_cores


@dataclass(frozen=True)
class Opened:
    """Options and what they name, before any text is read.

    Attributes:
        options: The options, with every path expanded.
        out: Real path of the directory to make; of one for a store, where it is made before it is uploaded.
        corpus: The corpus.
        blocks: Its blocks.
        given: The tokenizer to use; None if one is to be trained.
        stored: The place in a store; None if ``out`` is to stay.
        encoder: Encoder of records; None for texts.
    """

    options: PrepareOptions
    out: Path
    corpus: Corpus
    blocks: list[Block]
    given: TextTokenizer | None
    stored: StoredCorpus | None
    encoder: RecordEncoder | None

    @property
    def workers(self) -> int:
        """Processes to use."""
        return available_cores() if self.options.workers is None else self.options.workers


def open_all(options: PrepareOptions, block_bytes: int) -> Opened:
    """Check the options and open what they name.

    Args:
        options: The options, with every path expanded.
        block_bytes: Bytes of files in a block, at most.

    Raises:
        UserError: Bad options or input, or ``out`` holds something else.
    """
    check_numbers(options)
    stored = StoredCorpus(options.out) if isinstance(options.out, str) else None
    out = Path(os.path.realpath(stored.local if stored else options.out))
    clear_abandoned(out)
    check_out(out, options)
    _check_layout(out, stored, options)
    encoder = RecordEncoder.of(options)
    text_key = options.text_key if encoder is None else None
    corpus = open_corpus(options.source, options.format, options.globs, text_key, options.bad_bytes, leave=out)
    if encoder is not None and corpus.format not in RECORD_FORMATS:
        raise UserError(
            f"{options.source}: {corpus.format} has no records; {encoder.kind} are JSON Lines, Parquet or Arrow"
        )
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    if given is not None and options.add_fim_tokens:
        given = with_sentinels(given)
    _check_vocab(given, options)
    return Opened(options, out, corpus, plan_blocks(corpus, block_size(corpus, block_bytes)), given, stored, encoder)


def _check_vocab(given: TextTokenizer | None, options: PrepareOptions) -> None:
    """Refuse a vocabulary above the limit before any work; a trained one has at most ``vocab_size`` tokens."""
    name, size = f"vocab_size={options.vocab_size}", options.vocab_size
    if given is not None:
        name, size = (f"{options.tokenizer}: the tokenizer's vocabulary of {given.vocab_size}", given.vocab_size)
    if options.max_vocab is not None and size > options.max_vocab:
        raise UserError(f"{name} exceeds max_vocab={options.max_vocab}")


def inputs_of(opened: Opened, survey: Survey) -> dict[str, Any]:
    """Collect all that decides the result. Paths do not: the same files elsewhere give the same corpus."""
    options, given = opened.options, opened.given
    packed = options.stored_as is Layout.packed
    return {
        "format_version": FORMAT_VERSIONS[options.stored_as],
        "format": opened.corpus.format.value,
        "documents": survey.documents,
        "bytes": survey.bytes,
        "documents_sha256": survey.sha256,
        "max_seq_len": options.sample_tokens if packed else None,
        "vocab_size": None if given else options.vocab_size,
        "tokenizer_sha256": given.sha256 if given else None,
        "eos_token": given.eos_token if given else None,
        "val_fraction": options.val_fraction,
        "seed": options.seed,
        **(opened.encoder.inputs() if opened.encoder else {}),
    }


def check_out(out: Path, options: PrepareOptions) -> None:
    """Refuse, before anything is read, to write over anything but a corpus."""
    if not occupied(out):
        return
    if not (out / CORPUS_FILE).is_file():
        raise UserError(f"{options.out}: exists and is not a prepared corpus (no {CORPUS_FILE}); choose another OUT")
    foreign = sorted({entry.name for entry in out.iterdir()} - OUTPUTS)
    if options.overwrite and foreign:
        raise UserError(f"{options.out}: not overwritten, as it also holds {', '.join(foreign)}")


def _check_layout(out: Path, stored: StoredCorpus | None, options: PrepareOptions) -> None:
    """Refuse, before anything is read, to find or make samples of one layout where there are those of the other."""
    there = _summary_there(out, stored, options)
    if there is None or there.layout is options.stored_as:
        return
    if there.layout is Layout.packed:
        wanted = f"samples packed to {there.max_seq_len} tokens, and documents are asked for, which are the default"
        keep = f"max_seq_len={there.max_seq_len} keeps them"
    else:
        wanted = "documents, which are packed when they are read, and packed samples are asked for"
        keep = "without max_seq_len=... and layout=packed they are kept"
    raise UserError(f"{options.out}: holds {wanted}; {keep}, overwrite=True replaces them, or choose another OUT")


def _summary_there(out: Path, stored: StoredCorpus | None, options: PrepareOptions) -> CorpusSummary | None:
    """Read what the corpus that is there says; None if there is none, or it is to be overwritten."""
    if options.overwrite:
        return None
    if stored:
        return stored.summary()
    return read_corpus_summary(out) if (out / CORPUS_FILE).is_file() else None


def existing_corpus(opened: Opened, inputs: dict[str, Any]) -> CorpusSummary | None:
    """Return the corpus that is there if it is the one asked for; None if one has to be written.

    Raises:
        UserError: It is another corpus, and is not to be overwritten.
    """
    out, stored = opened.out, opened.stored
    summary = _summary_there(out, stored, opened.options)
    if summary is None:
        return None
    there = summary.inputs
    if SETTINGS in inputs and SETTINGS not in there and (stored or _same_settings(opened)):
        there = there | {SETTINGS: inputs[SETTINGS]}
    differing = [
        f"{name} ({there.get(name)} there, {inputs.get(name)} now)"
        for name in sorted(inputs.keys() | there.keys())
        if there.get(name) != inputs.get(name)
    ]
    needed = ["tokenizer/tokenizer.json", *(f"{name}/index.json" for name in summary.splits)]
    if summary.layout is Layout.documents:
        needed += [f"{name}/{LENGTHS_FILE}" for name in summary.splits]
    missing = (name for name in needed if not (name in stored.names if stored else (out / name).is_file()))
    differing += [f"{name} (missing there)" for name in missing]
    if differing:
        named = f"{opened.options.out}: holds another corpus; differs in {', '.join(differing)}"
        raise UserError(f"{named}; or overwrite=True")
    return summary


def _same_settings(opened: Opened) -> bool:
    """Tell if a corpus that says nothing of its tokenizer's settings, of an earlier version, has those of now."""
    assert opened.given is not None, "records need one"
    return settings_digest(settings_files(opened.out / "tokenizer")) == opened.given.settings_sha256


def finished_before(opened: Opened, inputs: dict[str, Any]) -> CorpusSummary | None:
    """Return the local corpus that an earlier attempt has made, and not uploaded; remove any other one."""
    if opened.stored and (opened.out / CORPUS_FILE).is_file():
        summary = read_corpus_summary(opened.out)
        if summary.inputs == inputs:
            return summary
        shutil.rmtree(opened.out)
    return None
