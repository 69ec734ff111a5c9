"""The rows of a curriculum, in the order in which they are read: a function of recipe, data and seed alone.

Each stream is an endless sequence of rows: epoch after epoch of its own, each shuffled, and none begun before the one
before it is at its end. A stage draws from these sequences by its proportions, and the next stage goes on where it has
ended. So no row comes twice before all others of its stream have come, whatever the stages are. Where the length of
rows changes, what is left of a stream's epoch is packed anew: no token is lost, and none comes twice.

The streams of a stage alternate as evenly as their proportions allow: row k of a stream with the share p has its place
at (k + 1/2) / p, and rows are read in the order of their places. Of the first N rows of a stage, that stream has N * p,
within half a row for each stream and half a row more.

A **lap** is what the trainer counts as an epoch: as many batches as the tokens of a stage's streams fill, or what is
left of the stage. A loader, its processes and its memory deal with one lap at a time, and a border between stages is
always one between laps.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from streaming.base.shuffle import get_shuffle

from moefoundry.config.curriculum import Stage
from moefoundry.data.packing_plan import Fragments, left_over
from moefoundry.data.sources import DocumentSource, PackedSource, Source, runs_in_shards


def rows_between(shares: NDArray[np.float64], first: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the streams of consecutive rows of a stage.

    Args:
        shares: Share of each stream, [S]; they add up to 1.
        first: The first of the rows, from 0.
        stop: The row behind the last.

    Returns:
        int64 [stop - first], the stream of each row; and int64 [S], the rows of each stream before the first.
    """
    margin = 2 * len(shares)  # the number of rows placed before x differs from x by less than the number of streams
    begins = np.floor(shares * max(0, first - margin) + 0.5).astype(np.int64)
    ends = np.floor(shares * (stop + margin) + 0.5).astype(np.int64)
    numbers = [np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
    places = [(each + 0.5) / share for each, share in zip(numbers, shares, strict=True) if len(each)]
    order = np.argsort(np.concatenate(places), kind="stable")
    streams = np.repeat(np.arange(len(shares)), ends - begins)[order]
    skipped = first - int(begins.sum())
    before = begins + np.bincount(streams[:skipped], minlength=len(shares))
    return streams[skipped : skipped + stop - first], before


class Leg:
    """The rows of one packing plan, in the order in which they are read.

    Args:
        source: The stream, with the plan.
        seq_len: Tokens of its rows.
        first_of_shards: The first sample of each of the stream's shards.
        seed: Seed of the order; None reads the rows as they are stored.

    Attributes:
        taken: Rows that have been read.
    """

    def __init__(
        self, source: Source, seq_len: int, first_of_shards: NDArray[np.int64], seed: Sequence[int] | None
    ) -> None:
        self.source = source
        self.seq_len = seq_len
        self.taken = 0
        self._first_of_shards = first_of_shards
        self._seed = seed

    @cached_property
    def order(self) -> NDArray[np.int64]:
        """int64 [rows], the row that is read at each place."""
        rows = np.arange(self.source.rows)
        if self._seed is None:
            return rows
        units = runs_in_shards(self.source.first_samples(rows), self._first_of_shards)
        seed = int(np.random.SeedSequence(self._seed).generate_state(1)[0])
        return get_shuffle("py1e", units, 1, seed, epoch=1)

    def rest(self) -> Fragments:
        """List what has not been read."""
        assert isinstance(self.source, DocumentSource), "rows packed at preparation have one length"
        unread = np.zeros(self.source.rows, np.bool_)
        unread[self.order[self.taken :]] = True
        return left_over(self.source.plan, unread)


class StreamRows:
    """The rows of one stream, epoch after epoch.

    Args:
        source: The stream.
        first_of_shards: The first sample of each of its shards.
        seed: Seed of the run's data.
        shuffle: False reads rows as they are stored.
    """

    def __init__(self, source: Source, first_of_shards: NDArray[np.int64], seed: int, shuffle: bool) -> None:
        self._source = source
        self._first_of_shards = first_of_shards
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._part = 0  # of the epoch, whose rest is packed anew where the length of rows changes
        self._leg: Leg | None = None
        self._whole: tuple[int, Source] | None = None  # a whole epoch in rows of this length

    def advance(self, rows: int, seq_len: int) -> list[tuple[Leg, int, int]]:
        """Move on by some rows of ``seq_len`` tokens; give their legs, each with its first row and the one behind."""
        passed = []
        while rows:
            leg = self._next(seq_len)
            some = min(rows, leg.source.rows - leg.taken)
            passed.append((leg, leg.taken, leg.taken + some))
            leg.taken += some
            rows -= some
        return passed

    def _next(self, seq_len: int) -> Leg:
        """Give a leg that has a row of this length left."""
        leg = self._leg
        if leg is not None and leg.taken < leg.source.rows:
            if leg.seq_len == seq_len:
                return leg
            self._part += 1
            rest = leg.rest()
        else:
            self._epoch += 1
            self._part, rest = 0, None
        key = (self._seed, zlib.crc32(self._source.name.encode()), self._epoch, self._part)
        source = self._source if isinstance(self._source, PackedSource) else self._packed(seq_len, rest)
        self._leg = Leg(source, seq_len, self._first_of_shards, key if self._shuffle else None)
        return self._leg

    def _packed(self, seq_len: int, rest: Fragments | None) -> Source:
        assert isinstance(self._source, DocumentSource)
        epoch = self._epoch if self._shuffle else 0
        if rest is not None or self._source.changes:
            return self._source.in_rows_of(seq_len, epoch, self._seed, rest)
        if self._whole is None or self._whole[0] != seq_len:
            self._whole = (seq_len, self._source.in_rows_of(seq_len, epoch, self._seed))
        return self._whole[1]


@dataclass(frozen=True)
class Lap:
    """Consecutive rows of a stage, N of them.

    Attributes:
        stage: The stage.
        streams: int64 [N], the stream of each row.
        legs: The legs that the rows are of.
        leg_of_row: int64 [N], indices in ``legs``.
        row_in_leg: int64 [N], the number of each row within its leg's plan.
    """

    stage: Stage
    streams: NDArray[np.int64]
    legs: list[Leg]
    leg_of_row: NDArray[np.int64]
    row_in_leg: NDArray[np.int64]


class Walk:
    """The laps of a curriculum; those behind the last one that was asked for are found from there.

    Args:
        stages: The stages.
        sources: The streams.
        first_of_shards: The first sample of each shard of each stream, within the stream.
        proportions: Share of each stream in stages that do not say, [S].
        seed: Seed of the run's data.
        shuffle: False reads rows as they are stored.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        sources: Sequence[Source],
        first_of_shards: Sequence[NDArray[np.int64]],
        proportions: NDArray[np.float64],
        seed: int,
        shuffle: bool,
    ) -> None:
        self.seed = seed
        self._stages = stages
        names = [source.name for source in sources]
        given = [
            proportions if each.proportions is None else [dict(each.proportions).get(name, 0.0) for name in names]
            for each in stages
        ]
        self._shares = [np.asarray(each, np.float64) / np.sum(each) for each in given]
        self._tokens = np.array([source.tokens for source in sources])
        self._sources = list(zip(sources, first_of_shards, strict=True))
        self._shuffle = shuffle
        self._begin()

    def _begin(self) -> None:
        self._rows = [StreamRows(source, shards, self.seed, self._shuffle) for source, shards in self._sources]
        self._at = (0, 0)  # number of the stage, and rows of it that have been passed

    def rows_of_a_lap(self, number: int) -> int:
        """Count the rows of a whole lap of a stage."""
        stage, tokens = self._stages[number], int(self._tokens[self._shares[number] > 0].sum())
        return max(1, tokens // stage.tokens_per_batch) * stage.batch_size

    def place(self, lap: int) -> tuple[int, int, int]:
        """Find the stage of a lap, its first row within the stage, and its number of rows."""
        for number, stage in enumerate(self._stages):
            whole = self.rows_of_a_lap(number)
            if stage.end is None:
                return number, lap * whole, whole
            rows = (stage.end - stage.first) * stage.batch_size
            if lap * whole < rows:
                return number, lap * whole, min(whole, rows - lap * whole)
            lap -= -(-rows // whole)
        raise AssertionError("the last stage does not end")

    def lap(self, lap: int) -> Lap:
        """Find the rows of a lap."""
        number, first, rows = self.place(lap)
        if (number, first) < self._at:
            self._begin()
        while self._at[0] < number:
            stage = self._stages[self._at[0]]
            assert stage.end is not None, "another follows"
            self._pass((stage.end - stage.first) * stage.batch_size)
            self._at = (self._at[0] + 1, 0)
        self._pass(first)
        stage = self._stages[number]
        streams, _ = rows_between(self._shares[number], first, first + rows)
        legs: list[Leg] = []
        leg_of_row, row_in_leg = np.empty(rows, np.int64), np.empty(rows, np.int64)
        for stream, own in enumerate(self._rows):
            places = np.flatnonzero(streams == stream)
            for leg, begin, end in own.advance(len(places), stage.seq_len):
                leg_of_row[places[: end - begin]] = len(legs)
                row_in_leg[places[: end - begin]] = leg.order[begin:end]
                places = places[end - begin :]
                legs.append(leg)
        self._at = (number, first + rows)
        return Lap(stage, streams, legs, leg_of_row, row_in_leg)

    def _pass(self, stop: int) -> None:
        """Move on within a stage, to its row ``stop``."""
        number, at = self._at
        _, before = rows_between(self._shares[number], at, at)
        _, behind = rows_between(self._shares[number], stop, stop)
        for own, rows in zip(self._rows, (behind - before).tolist(), strict=True):
            own.advance(rows, self._stages[number].seq_len)
        self._at = (number, stop)
