"""Plans of packing: which pieces of which documents make up each row of ``seq_len`` tokens.

A plan is a function of the lengths of the documents and of ``seq_len``, and of nothing else. So every process computes
the same one, and there is no state to save. No token is lost and none comes twice: a document that does not fit is cut.

- :func:`concatenated` joins the documents in the order in which they are stored and cuts every ``seq_len`` tokens. Only
  the last row has room left.
- :func:`best_fit` cuts only documents longer than a row: into full rows, and a rest that is packed like any other
  document. Those go, the longest first, into the row with the least room that holds them (best-fit decreasing). It
  works within windows of the stored order, of :data:`WINDOW_TOKENS` each, so that the documents of a row lie in few
  shards, and time grows linearly. Documents of one length are placed together: steps are counted in different lengths.
- :func:`alone` gives each document a row, or as many as it fills. :func:`in_pairs` gives one to each two.

Where rows of another length follow in the middle of an epoch, :func:`left_over` says what has not been read, and
:func:`repacked` packs it.

A plan takes 12 bytes for each piece, and 8 for each row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefoundry.config.errors import UserError

WINDOW_TOKENS = 1 << 26
"""Tokens of a window of :func:`best_fit`, 8192 rows of 8192: about eight shards of the size that `prepare` writes."""


@dataclass(frozen=True)
class PackingPlan:
    """Rows, each a list of pieces of documents, P in all.

    Rows are in the order of their first documents, and the pieces of a row in the order of theirs.

    Attributes:
        seq_len: Tokens of a row, at most.
        documents: Integers [P], the document of each piece.
        starts: int32 [P], its first token within the document.
        stops: int32 [P], the token behind its last.
        splits: int64 [rows + 1]; row r has the pieces from ``splits[r]`` to ``splits[r + 1]``.
    """

    seq_len: int
    documents: NDArray[Any]
    starts: NDArray[np.int32]
    stops: NDArray[np.int32]
    splits: NDArray[np.int64]

    @property
    def rows(self) -> int:
        return len(self.splits) - 1

    @property
    def tokens(self) -> int:
        return int(self.stops.sum(dtype=np.int64) - self.starts.sum(dtype=np.int64))

    @property
    def waste(self) -> float:
        """Share of the rows' tokens that is room left."""
        return 1 - self.tokens / (self.rows * self.seq_len) if self.rows else 0.0

    @property
    def cut(self) -> int:
        """Count the documents that are cut at the end of a row, however often."""
        return int(np.unique(self.documents[self.starts > 0]).size)

    @property
    def first_documents(self) -> NDArray[Any]:
        """Find the first document of each row, ascending, [rows]."""
        return self.documents[self.splits[:-1]]

    def documents_of(self, row: int) -> NDArray[Any]:
        """List the documents of a row's pieces."""
        return self.documents[self.splits[row] : self.splits[row + 1]]

    def piece(self, row: int, number: int) -> tuple[int, int, int]:
        """Give document, start and stop of piece ``number`` of a row."""
        at = self.splits[row] + number
        return int(self.documents[at]), int(self.starts[at]), int(self.stops[at])


def concatenated(lengths: NDArray[np.integer[Any]], seq_len: int) -> PackingPlan:
    """Join documents and cut the stream.

    Args:
        lengths: Tokens of each document, at least 1.
        seq_len: Tokens of a row.
    """
    ends = lengths.cumsum(dtype=np.int64)
    begins = ends - lengths
    documents, numbers = _pieces((ends - 1) // seq_len - begins // seq_len + 1)
    begin_of_row = (begins // seq_len)[documents] + numbers
    first = np.maximum(begins[documents], begin_of_row * seq_len)
    last = np.minimum(ends[documents], (begin_of_row + 1) * seq_len)
    starts, stops = (first - begins[documents]).astype(np.int32), (last - begins[documents]).astype(np.int32)
    return PackingPlan(seq_len, documents, starts, stops, _splits(begin_of_row))


def best_fit(lengths: NDArray[np.integer[Any]], seq_len: int, window_tokens: int = WINDOW_TOKENS) -> PackingPlan:
    """Pack documents into the rows that they fill best.

    Args:
        lengths: Tokens of each document, at least 1.
        seq_len: Tokens of a row.
        window_tokens: Tokens of the documents that are packed together.
    """
    documents, numbers = _pieces(-(-lengths // seq_len))
    starts = numbers * seq_len
    stops = np.minimum(lengths[documents], starts + seq_len)
    sizes = stops - starts
    rows = np.arange(len(documents))  # a full piece is a row of its own; the number of another is replaced
    windows = (lengths.cumsum(dtype=np.int64) - lengths) // window_tokens
    loose = np.flatnonzero(sizes < seq_len)
    borders = np.flatnonzero(np.diff(windows[documents[loose]], prepend=-1))
    for within in np.split(loose, borders[1:]) if len(loose) else []:
        rows[within] = within[_best_fit(sizes[within], seq_len)]
    order = np.argsort(rows, kind="stable")
    starts, stops = starts[order].astype(np.int32), stops[order].astype(np.int32)
    return PackingPlan(seq_len, documents[order], starts, stops, _splits(rows[order]))


def alone(lengths: NDArray[np.integer[Any]], seq_len: int) -> PackingPlan:
    """Make rows of one document each; a longer one is cut.

    Args:
        lengths: Tokens of each document, at least 1.
        seq_len: Tokens of a row.
    """
    documents, numbers = _pieces(-(-lengths // seq_len))
    starts = numbers * seq_len
    stops = np.minimum(lengths[documents], starts + seq_len)
    splits = np.arange(len(documents) + 1)
    return PackingPlan(seq_len, documents, starts.astype(np.int32), stops.astype(np.int32), splits)


def in_pairs(lengths: NDArray[np.integer[Any]], seq_len: int) -> PackingPlan:
    """Make rows of two whole documents each: 0 and 1, 2 and 3, ...

    Args:
        lengths: Tokens of each document, at least 1.
        seq_len: Tokens of a row.

    Raises:
        UserError: The number of documents is odd, or a pair is longer than a row.
    """
    if len(lengths) % 2:
        raise UserError(f"{len(lengths)} documents are no pairs; prepare the data with --preferences")
    longest = int(lengths.reshape(-1, 2).sum(axis=1).max())
    if longest > seq_len:
        raise UserError(
            f"a pair has {longest} tokens, and a row max_seq_len={seq_len}; raise that, or prepare the data with "
            f"--max-tokens {seq_len // 2}"
        )
    documents = np.arange(len(lengths))
    splits = np.arange(0, len(lengths) + 1, 2)
    starts, stops = np.zeros(len(lengths), np.int32), np.asarray(lengths).astype(np.int32)
    return PackingPlan(seq_len, documents, starts, stops, splits)


@dataclass(frozen=True)
class Fragments:
    """Parts of documents, in the order in which they are stored; F of them.

    Attributes:
        documents: Integers [F], the document of each, ascending.
        starts: int32 [F], its first token within the document.
        stops: int32 [F], the token behind its last.
    """

    documents: NDArray[Any]
    starts: NDArray[np.int32]
    stops: NDArray[np.int32]


def left_over(plan: PackingPlan, unread: NDArray[np.bool_]) -> Fragments:
    """List what the rows of a plan hold that have not been read, in as few fragments as it is.

    Args:
        plan: The plan.
        unread: bool [rows].
    """
    pieces = np.flatnonzero(np.repeat(unread, np.diff(plan.splits)))
    pieces = pieces[np.lexsort((plan.starts[pieces], plan.documents[pieces]))]
    documents, starts, stops = plan.documents[pieces], plan.starts[pieces], plan.stops[pieces]
    begins = np.ones(len(pieces), np.bool_)
    begins[1:] = (documents[1:] != documents[:-1]) | (starts[1:] != stops[:-1])
    ends = np.append(begins[1:], True)[: len(pieces)]
    return Fragments(documents[begins], starts[begins], stops[ends])


def repacked(
    packer: Callable[[NDArray[np.integer[Any]], int], PackingPlan], fragments: Fragments, seq_len: int
) -> PackingPlan:
    """Pack fragments as if each were a document.

    Args:
        packer: One of the functions above.
        fragments: The fragments, at least one.
        seq_len: Tokens of a row.
    """
    plan = packer(fragments.stops - fragments.starts, seq_len)
    begins = fragments.starts[plan.documents]
    starts, stops = plan.starts + begins, plan.stops + begins
    return replace(plan, documents=fragments.documents[plan.documents], starts=starts, stops=stops)


def _pieces(counts: NDArray[np.integer[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Give the document of each piece, and the piece's number within it, from the pieces of each document."""
    small = len(counts) < np.iinfo(np.int32).max
    documents = np.repeat(np.arange(len(counts), dtype=np.int32 if small else np.int64), counts)
    return documents, np.arange(len(documents)) - (counts.cumsum(dtype=np.int64) - counts)[documents]


def _splits(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the borders between the rows, from the ascending row of each piece."""
    return np.append(np.flatnonzero(np.diff(rows, prepend=-1)), len(rows)).astype(np.int64)


def _best_fit(sizes: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """Place N items into bins, the largest first, each into the bin with the least room that holds it.

    Items of one size that go into bins with the same room are placed at once: as many into each bin as it holds, which
    is where placing them one by one would put them.

    Args:
        sizes: Size of each item, from 1 to ``room``.
        room: Room of an empty bin.

    Returns:
        int64 [N], the first item of the bin that each item is in.
    """
    order = np.argsort(-sizes, kind="stable")
    bins, bin_of_item = _Bins(room), np.empty(len(sizes), np.int64)
    descending = sizes[order]
    borders = np.append(np.flatnonzero(np.diff(descending, prepend=0)), len(sizes)).tolist()
    for begin, end in pairwise(borders):
        size = int(descending[begin])
        while begin < end:
            left, some = bins.take(size, end - begin)
            each = left // size
            placed = min(end - begin, len(some) * each)
            bin_of_item[order[begin : begin + placed]] = np.repeat(some, each)[:placed]
            full = placed // each
            bins.put(left - each * size, some[:full])
            bins.put(left - placed % each * size, some[full:])
            begin += placed
    first = np.full(bins.made, len(sizes))
    np.minimum.at(first, bin_of_item, np.arange(len(sizes)))
    return first[bin_of_item]


class _Bins:
    """Bins by the room that is left in them.

    Attributes:
        made: Number of bins.
    """

    def __init__(self, room: int) -> None:
        self.made = 0
        self._room = room
        self._rooms: list[int] = []  # ascending
        self._bins: dict[int, list[NDArray[np.int64]]] = {}

    def take(self, size: int, items: int) -> tuple[int, NDArray[np.int64]]:
        """Take bins with the least room that holds ``size``, for ``items`` of that size at most; empty ones if none do.

        Returns:
            The room of each, and the bins.
        """
        at = bisect_left(self._rooms, size)
        if at == len(self._rooms):
            new = -(-items // (self._room // size))
            self.made += new
            return self._room, np.arange(self.made - new, self.made)
        left = self._rooms[at]
        found = self._bins[left].pop()
        if not self._bins[left]:
            del self._bins[left], self._rooms[at]
        needed = -(-items // (left // size))
        self.put(left, found[needed:])
        return left, found[:needed]

    def put(self, left: int, bins: NDArray[np.int64]) -> None:
        """Put bins back, with ``left`` as the room of each."""
        if left and len(bins):
            if left not in self._bins:
                insort(self._rooms, left)
                self._bins[left] = []
            self._bins[left].append(bins)
