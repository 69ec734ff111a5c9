"""Prepared samples as text, to be looked at: borders of documents, ignored targets, parts of fill-in-the-middle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moefoundry.config.errors import UserError
from moefoundry.data.fim import Sentinels
from moefoundry.data.identity import read_shards
from moefoundry.data.summary import LENGTHS_FILE, CorpusSummary, Layout, read_corpus_summary
from moefoundry.data.tokenizer import open_backend

COUNTED_SAMPLES = 1000
"""Packed samples whose documents are counted; the whole split may be large."""

BAR = 40  # columns


class Part(StrEnum):
    """Part of a document that a token belongs to, or the border behind it."""

    text = "text"
    border = "border"
    sentinel = "sentinel"
    prefix = "prefix"
    suffix = "suffix"
    middle = "middle"


class Span(NamedTuple):
    """Tokens in a row that are shown alike.

    Attributes:
        text: Their text.
        part: Part that they belong to.
        ignored: True if they are not to be predicted.
    """

    text: str
    part: Part
    ignored: bool


class Bin(NamedTuple):
    """Documents of the lengths from ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    documents: int


class Sample(NamedTuple):
    """A sample on disk; without ``targets`` every token is to be predicted."""

    tokens: NDArray[Any]
    targets: NDArray[np.uint8] | None


@dataclass(frozen=True)
class SplitView:
    """A split that is looked at.

    Attributes:
        summary: Summary of the corpus.
        directory: Directory of the split.
        backend: The tokenizer.
    """

    summary: CorpusSummary
    directory: Path
    backend: Tokenizer

    @classmethod
    def open(cls, place: Path, split: str) -> SplitView:
        """Open a split of a prepared corpus.

        Raises:
            UserError: There is none.
        """
        summary = read_corpus_summary(place)
        if split not in summary.splits:
            raise UserError(f"{place}: no split {split!r}; it has {', '.join(summary.splits)}")
        return cls(summary, place / split, open_backend(place / "tokenizer"))

    def samples(self) -> Iterator[Sample]:
        """Read the samples, in order.

        Raises:
            UserError: A shard is missing or damaged.
        """
        from streaming.base.format import reader_from_json  # and torch: seconds

        for shard in read_shards(self.directory):
            reader = reader_from_json(str(self.directory), "", shard)
            try:
                for number in range(len(reader)):
                    sample = reader[number]
                    yield Sample(sample["tokens"], sample.get("targets"))
            except (OSError, ValueError, IndexError) as error:
                file = self.directory / shard["raw_data"]["basename"]
                raise UserError(f"{file}: cannot be read: {error}") from error

    def spans(self, sample: Sample) -> list[Span]:
        """Cut a sample into spans."""
        parts = self._parts(sample.tokens.tolist())
        ignored = [False] * len(parts) if sample.targets is None else [not target for target in sample.targets]
        kinds = list(zip(parts, ignored, strict=True))
        spans, at = [], 0
        for (part, is_ignored), run in groupby(kinds):
            size = len(list(run))
            text = self.backend.decode(sample.tokens[at : at + size].tolist(), skip_special_tokens=False)
            spans.append(Span(visible(text), part, is_ignored))
            at += size
        return spans

    def _parts(self, tokens: Iterable[int]) -> list[Part]:
        after: dict[int, Part] = {}
        with suppress(UserError):  # a tokenizer without sentinels
            found = Sentinels.of(self.backend, self.directory)
            after = {found.prefix: Part.prefix, found.suffix: Part.suffix, found.middle: Part.middle}
        current, parts = Part.text, []
        for token in tokens:
            if token == self.summary.eos_id:
                parts.append(Part.border)
                current = Part.text
            elif token in after:
                parts.append(Part.sentinel)
                current = after[token]
            else:
                parts.append(current)
        return parts

    def lengths(self) -> NDArray[Any]:
        """Return the lengths of the documents; of packed ones, those of the pieces in the first samples."""
        if self.summary.layout is Layout.documents:
            lengths: NDArray[Any] = np.load(self.directory / LENGTHS_FILE, mmap_mode="r")
            return lengths
        pieces = []
        for sample in islice(self.samples(), COUNTED_SAMPLES):
            ends = np.flatnonzero(sample.tokens == self.summary.eos_id) + 1
            pieces.append(np.diff(np.concatenate([[0], ends, [len(sample.tokens)]])))
        lengths = np.concatenate(pieces)
        return lengths[lengths > 0]


def visible(text: str) -> str:
    """Spell out characters that would control a terminal; line breaks and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def histogram(lengths: NDArray[Any]) -> list[Bin]:
    """Count lengths between powers of two."""
    exponents = np.frexp(lengths.astype(np.float64))[1] - 1
    counts = np.bincount(exponents)
    first = int(np.flatnonzero(counts)[0])
    return [Bin(1 << at, (2 << at) - 1, int(count)) for at, count in enumerate(counts.tolist()) if at >= first]


def bars(bins: list[Bin]) -> list[str]:
    """Draw a histogram."""
    most = max(each.documents for each in bins)
    width = len(f"{bins[-1].high:,}")
    return [
        f"{each.low:>{width},} - {each.high:>{width},} {each.documents:>12,} {'#' * -(-BAR * each.documents // most)}"
        for each in bins
    ]
