"""Options of the preparation of a corpus."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from moefoundry.config.errors import UserError
from moefoundry.config.urls import is_url, resolved, url_problem
from moefoundry.data.corpus import url_scheme
from moefoundry.data.formats import CorpusFormat
from moefoundry.data.instructions import TargetResponses, TooLong
from moefoundry.data.left_out import MAX_LOSS
from moefoundry.data.reading import BadBytes
from moefoundry.data.summary import Layout
from moefoundry.data.tokenizer import check_trainable

T = TypeVar("T")
PACKED_LENGTH = 512


class Kind(StrEnum):
    """Kinds of documents."""

    text = "text"
    instructions = "instructions"
    preferences = "preferences"


@dataclass(frozen=True)
class PrepareOptions:
    """Options of :func:`~moefoundry.data.prepare.prepare`.

    Attributes:
        source: File, directory or ``stdlib``.
        out: Directory to make; a string may be a URL.
        max_seq_len: Tokens of a packed sample; :data:`PACKED_LENGTH` if None. Documents have none.
        vocab_size: Vocabulary of the tokenizer that is trained; unused with ``tokenizer``.
        tokenizer: A Hugging Face tokenizer directory to use instead of training one.
        add_fim_tokens: Add special tokens for fill-in-the-middle to ``tokenizer``, if it has none.
        max_vocab: Refuse a larger vocabulary (the model's ``vocab_size``).
        format: Format of the documents; inferred if None.
        globs: Patterns of the files.
        text_key: JSONL and Parquet: key of the text, or a path of keys with dots.
        bad_bytes: Treatment of bytes that are not text.
        max_loss: Share of the bytes that may be left out.
        val_fraction: Expected share of files (documents for JSONL) held out; 0 holds nothing out.
        max_docs: Use only this many documents, the first.
        max_bytes: Use only the first documents, of this many bytes in all.
        seed: Decides which files are held out, and the tokenizer's sample.
        overwrite: Replace a corpus that was prepared from something else, or differently.
        layout: Documents of any length, which are packed when read, or packed samples of ``max_seq_len`` tokens. None
            is packed where ``max_seq_len`` is given, and else documents.
        kind: Texts; or records of instructions or preferences, which are stored as documents, with targets.
        target_responses: Responses of instructions that are to be predicted.
        target_prompts: Prompts that are to be predicted: ``none``, ``all`` or ``length>=N``.
        max_tokens: Tokens of a record's document, at most; None is any number.
        too_long: Treatment of records with more.
        workers: Processes, or 0 for this one alone; the number of cores if None. The result is always the same.
    """

    source: str
    out: Path | str
    max_seq_len: int | None = None
    vocab_size: int = 4096
    tokenizer: Path | None = None
    add_fim_tokens: bool = False
    max_vocab: int | None = None
    format: CorpusFormat | None = None
    globs: tuple[str, ...] = ()
    text_key: str = "text"
    bad_bytes: BadBytes = BadBytes.drop
    max_loss: float = MAX_LOSS
    val_fraction: float = 0.05
    max_docs: int | None = None
    max_bytes: int | None = None
    seed: int = 17
    overwrite: bool = False
    layout: Layout | None = None
    kind: Kind = Kind.text
    target_responses: TargetResponses = TargetResponses.last
    target_prompts: str = "none"
    max_tokens: int | None = None
    too_long: TooLong = TooLong.truncate
    workers: int | None = None

    @property
    def stored_as(self) -> Layout:
        """Layout of the result: the one that is asked for, or follows from the other options."""
        if self.kind is not Kind.text:
            return Layout.documents
        return self.layout or (Layout.documents if self.max_seq_len is None else Layout.packed)

    @property
    def sample_tokens(self) -> int:
        """Tokens that a split needs for one sample."""
        if self.stored_as is Layout.documents:
            return 1
        return PACKED_LENGTH if self.max_seq_len is None else self.max_seq_len


@dataclass(frozen=True)
class Part:
    """Part of the blocks of a corpus.

    Attributes:
        number: Number of the part, from 1.
        count: Number of parts.

    Raises:
        UserError: There is no such part.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise UserError(f"part={self}: the first of N parts is 1/N, and the last N/N")

    @classmethod
    def named(cls, text: str) -> Part:
        """Read ``I/N``.

        Raises:
            UserError: It is something else, or there is no such part.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise UserError(f"part={text}: two numbers, such as 3/10")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items of this part, consecutive ones; each belongs to one part."""
        return items[len(items) * (self.number - 1) // self.count : len(items) * self.number // self.count]


def expanded(options: PrepareOptions) -> PrepareOptions:
    """Resolve ``~`` in every path, and ``file://`` in ``out``.

    Raises:
        UserError: ``out`` is no place.
    """
    out = str(options.out)
    if isinstance(options.out, Path) and (scheme := url_scheme(out)):
        raise UserError(f"{scheme}://...: a URL is given as a string, not as a Path")
    if problem := url_problem(out):
        raise UserError(f"out={options.out}: {problem}")
    return replace(
        options,
        source=os.path.expanduser(options.source),
        out=out if is_url(resolved(out)) else Path(resolved(out)),
        tokenizer=Path(os.path.expanduser(options.tokenizer)) if options.tokenizer else None,
    )


OF_KINDS = {
    "target_responses": (Kind.instructions,),
    "target_prompts": (Kind.instructions,),
    "max_tokens": (Kind.instructions, Kind.preferences),
    "too_long": (Kind.instructions, Kind.preferences),
    "text_key": (Kind.text,),
}
"""Options that say something of some kinds of documents alone."""


def check_applicable(options: PrepareOptions, given: Collection[str]) -> None:
    """Check that every option says something of what is prepared.

    Args:
        options: The options.
        given: Names of those that were given.

    Raises:
        UserError: Names the first that does not.
    """
    for name in (name for name, kinds in OF_KINDS.items() if name in given and options.kind not in kinds):
        kinds = " or ".join(f"{kind}" for kind in OF_KINDS[name])
        raise UserError(f"{name}={getattr(options, name)}: of {kinds}, and these are {options.kind}; leave it out")
    if "vocab_size" in given and options.tokenizer is not None:
        raise UserError(f"vocab_size={options.vocab_size}: not with tokenizer=..., whose vocabulary is what it is")
    if "too_long" in given and options.max_tokens is None:
        raise UserError(f"too_long={options.too_long}: needs max_tokens=...")


def check_numbers(options: PrepareOptions) -> None:
    """Check that every number is in range, and that every option says something.

    Raises:
        UserError: Names the first that is out of range, or has no meaning here.
    """
    changed = {each.name for each in fields(options) if getattr(options, each.name) != each.default}
    check_applicable(options, changed - {"vocab_size"})  # which replaced options may have kept
    if options.max_seq_len is not None and options.stored_as is Layout.documents:
        what = "layout=documents" if options.kind is Kind.text else options.kind
        raise UserError(f"max_seq_len={options.max_seq_len}: not with {what}, which are packed when read")
    if options.layout is Layout.packed and options.kind is not Kind.text:
        raise UserError(f"layout=packed: not of {options.kind}, which are stored as documents")
    if options.max_seq_len is not None and options.max_seq_len < 2:
        raise UserError(f"max_seq_len={options.max_seq_len}: at least 2 (a token and the next one)")
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"val_fraction={options.val_fraction}: at least 0 (no held-out split), and below 1")
    if not 0 <= options.max_loss <= 1:
        raise UserError(f"max_loss={options.max_loss}: a share, from 0 to 1")
    if options.tokenizer is None:
        check_trainable(options.vocab_size)
    for name in ("max_docs", "max_bytes", "max_tokens"):
        cap = getattr(options, name)
        if cap is not None and cap < 1:
            raise UserError(f"{name}={cap}: at least 1")
    if options.workers is not None and options.workers < 0:
        raise UserError(f"workers={options.workers}: at least 0 (this process alone)")
