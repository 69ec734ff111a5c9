"""Rows of tokens of one or several streams, as a dataset of mosaicml-streaming's.

The library permutes the samples of an epoch and deals them out, see :mod:`moefoundry.data.loader`. Here its samples are
rows: of data that were packed when they were prepared, the samples themselves; of documents, what a packing plan says
(:mod:`moefoundry.data.sources`). A stream is drawn from as the library's ``proportion``, ``repeat`` and ``choose`` say,
counted in rows, and every row is of one stream. All epochs have as many rows. With fill-in-the-middle, documents fill
a row more in one epoch, and a row less in another: then one is left out, or read twice.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format.mds.reader import MDSReader
from streaming.base.world import World
from torch import Tensor

from moefoundry.config.errors import DataError, UserError
from moefoundry.config.schema_data import PackingMethod, StreamConfig
from moefoundry.config.schema_parts import DatasetConfig
from moefoundry.data.fit import another_length, packed_already, too_few_samples
from moefoundry.data.guard import CheckedStream, GuardedDataset
from moefoundry.data.identity import TARGETS, TOKENS, column_encodings, holds_documents
from moefoundry.data.reference import RECORD, read_reference
from moefoundry.data.sources import (
    DocumentSource,
    FimTools,
    PackedSource,
    Piece,
    Sample,
    Source,
    read_lengths,
    runs_in_shards,
)
from moefoundry.data.stored_arrays import StoredSamples
from moefoundry.ops.cross_entropy import IGNORE_INDEX


class TokenDataset(GuardedDataset):
    """Rows of tokens as tensors. Construction is collective: every rank makes it at the same point.

    A row is ``input_ids``, ``labels`` and, of documents or with an ``eos_id``, ``sequence_id``, int64 [S] each; with
    several streams ``source``, an int64 scalar; and of pairs that a reference has scored ``reference``, float32 [2].
    Room left at the end of a row has ``sequence_id`` -1 and the label ``IGNORE_INDEX``.

    Args:
        config: Data to read.
        batch_size: Rows of one rank's batch.
        drop_last: Cut the epoch to whole global batches.
        vocab_size: Token ids must lie below it.
        eos_id: The token that ends a document; None does not tell the documents of a row apart.
        fim: Fill-in-the-middle, which ``config`` may ask for.

    Attributes:
        sources: The streams, in the order of their names.

    Raises:
        UserError: The samples have another length, or were packed otherwise; there are fewer than one global batch and
            ``drop_last`` is set; and as :class:`GuardedDataset`.
        DataError: From ``[]``: a sample does not have the length that it should have, or has a token outside the
            vocabulary.
    """

    def __init__(
        self,
        config: DatasetConfig,
        *,
        batch_size: int,
        drop_last: bool,
        vocab_size: int,
        eos_id: int | None = None,
        fim: FimTools | None = None,
    ) -> None:
        streams = [
            CheckedStream(
                local=each.local, remote=each.remote, split=each.split or config.split, algorithm=config.validate_hash
            )
            for each in config.sources.values()
        ]
        super().__init__(
            streams,
            batch_size=batch_size,
            shuffle=config.shuffle,
            shuffle_algo="py1e",
            shuffle_seed=config.shuffle_seed,
            num_canonical_nodes=1,
            sampling_granularity=1024,  # the library picks in a Python loop; one pick per sample takes minutes at scale
        )
        self.place = ", ".join(stream.place for stream in streams)
        self.max_seq_len = config.max_seq_len
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.several = config.streams is not None
        self.sources: list[Source] = [
            self._source(name, stream, samples, config, fim)
            for name, stream, samples in zip(config.sources, streams, self.samples_per_stream.tolist(), strict=True)
        ]
        self.references = [self._reference(*each, config) for each in zip(self.sources, streams, strict=True)]
        self._stored = StoredSamples()
        self._ends_of_shards: list[int] = (self.sample_offset_per_shard + self.samples_per_shard).tolist()
        self.drop_last = drop_last
        self._repeats: NDArray[np.bool_] | None = None
        self._epoch = 0
        self._weights = list(config.sources.values())
        self._shuffles = config.shuffle
        self._rows_planned = self._rows()
        self._choose()

    def _source(
        self, name: str, stream: CheckedStream, samples: int, config: DatasetConfig, fim: FimTools | None
    ) -> Source:
        encodings = column_encodings(stream.directory)
        if holds_documents(stream.directory):
            lengths, with_targets = read_lengths(stream.directory), TARGETS in encodings
            tools = None if with_targets else fim
            return DocumentSource(name, stream.place, lengths, self.max_seq_len, config.packing.method, tools)
        if message := another_length(stream.place, encodings[TOKENS], self.max_seq_len):
            raise UserError(message)
        if message := packed_already(stream.place, config):
            raise UserError(message)
        return PackedSource(name, stream.place, samples, self.max_seq_len)

    def _reference(self, source: Source, stream: CheckedStream, config: DatasetConfig) -> NDArray[np.float32] | None:
        """Read the log-probabilities of pairs, [rows, 2], if they have been computed."""
        if config.packing.method != PackingMethod.pairs or not (stream.directory / RECORD).is_file():
            return None
        return read_reference(stream.directory, source.rows)[0]

    def _rows(self) -> NDArray[np.int64]:
        return np.array([source.rows for source in self.sources])

    @property
    def size(self) -> int:
        """Number of rows of this epoch's plans, of which an epoch reads some, or some twice."""
        return sum(source.rows for source in self.sources)

    def _choices(self) -> NDArray[np.int64]:
        """Count the rows that an epoch reads of each stream, as the seed decides; a saved state may have another."""
        if not self._shuffles:
            for source in self.sources:
                source.begin_epoch(0, self.shuffle_seed)
            self._rows_planned = self._rows()
        return rows_of_an_epoch(self._weights, self._rows_planned, self.shuffle_seed)

    def _choose(self) -> None:
        """Read so many rows of each stream in an epoch; with ``drop_last`` cut to whole global batches."""
        choices, ranks = self._choices(), World.detect().num_ranks
        if self.drop_last:
            if message := too_few_samples(self.place, int(choices.sum()), self.batch_size * ranks):
                raise UserError(message)
            choices = cut(choices, int(choices.sum()) % (self.batch_size * ranks))
        for stream, choice in zip(self.streams, choices.tolist(), strict=True):
            stream.choose = choice
        self.epoch_size = int(choices.sum())
        self.length = -(-self.epoch_size // ranks)

    def _resume(self, world: World, epoch: int) -> tuple[int, int]:
        """Give the epoch and the place in it; those of a saved state come with its seed."""
        seed = self.shuffle_seed
        begun: tuple[int, int] = super()._resume(world, epoch)
        if self.shuffle_seed != seed:
            self._choose()
        return begun

    def _begin_epoch(self, epoch: int) -> None:
        """Plan an epoch. Without a shuffle every epoch is the same."""
        self._epoch = epoch
        for source in self.sources:
            source.begin_epoch(epoch if self.shuffle else 0, self.shuffle_seed)

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """List the rows of an epoch as before the shuffle, and the sizes of the runs of them that lie in one shard."""
        if len(self.sources) == 1 and isinstance(self.sources[0], PackedSource):
            return super().resample_streams(epoch, stream_id)
        rng = np.random.default_rng([self.shuffle_seed, epoch if self.shuffle else 0])
        first_shards = np.append(self.sample_offset_per_shard, self.num_samples)
        begin, units, rows = 0, [], []
        for number, source in enumerate(self.sources):
            times, some = divmod(self.streams[number].choose, source.rows)
            parts = [np.arange(source.rows)] * times
            parts += [np.sort(rng.choice(source.rows, some, replace=False))] if some else []
            for part in parts:
                first = source.first_samples(part) + self.sample_offset_per_stream[number]
                units.append(runs_in_shards(first, first_shards))
                rows.append(part + begin)
            begin += source.rows
        if not self.shuffle:  # streams side by side, so that the first rows are of all of them
            places = np.concatenate(
                [(np.arange(stream.choose) + 0.5) / max(stream.choose, 1) for stream in self.streams]
            )
            rows = [np.concatenate(rows)[np.argsort(places, kind="stable")]]
        return np.concatenate(units).astype(np.int64), np.concatenate(rows).astype(np.int64)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the rows of this process in this epoch; see :class:`GuardedDataset`."""
        for position, sample in enumerate(super().__iter__()):
            if self._repeats is not None and self._repeats[position]:
                sample = sample | {"labels": torch.full_like(sample["labels"], IGNORE_INDEX)}
            yield sample

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        self._begin_epoch(epoch)
        sample_ids = super()._get_work(epoch, sample_in_epoch)
        if self._repeats is not None:
            world = self._parallel_worker_world
            own = self._repeats[world.node, world.rank_of_node, world.worker_of_rank].flatten()
            self._repeats = own[sample_ids != -1]
        return sample_ids

    def _share_work(self, sample_ids: NDArray[np.int64]) -> Any:
        """Share the rows of all, ``[node, rank, worker, batch, row]``; called in one process of a node."""
        self._repeats = self._repeated(sample_ids)
        return super()._share_work(sample_ids)

    def _attach_work(self) -> Any:
        """Receive the rows of all, and more behind them; called in the other processes of a node."""
        work = super()._attach_work()
        self._repeats = self._repeated(work[0])
        return work

    def _repeated(self, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Mark rows that come more often than the epoch has them, so that each rank has as many batches."""
        if self.drop_last:
            return None
        _, rows = self.resample_streams(self._epoch)
        return _beyond(sample_ids, np.bincount(rows, minlength=self.size))

    def _locate(self, row: int) -> tuple[int, Source, int]:
        """Find the number of a row's stream, the stream, and the row's number within it."""
        number, row = 0, int(row)
        while row >= self.sources[number].rows:
            row -= self.sources[number].rows
            number += 1
        return number, self.sources[number], row

    def _samples_of(self, number: int, source: Source, row: int) -> NDArray[np.int64]:
        """List the samples of a row, as :meth:`_locate` gives it, in the numbering of all streams."""
        return source.samples_of(row) + self.sample_offset_per_stream[number]

    def shards_of(self, sample_id: int) -> Sequence[int]:
        """List the shards in which the documents of a row lie."""
        samples = self._samples_of(*self._locate(sample_id)).tolist()
        return sorted({bisect_right(self._ends_of_shards, sample) for sample in samples})

    def _sample(self, sample_id: int, retry: int) -> Sample:
        """Give one sample, of a shard that has been checked."""
        shard = bisect_right(self._ends_of_shards, sample_id)
        if not isinstance(reader := self.shards[shard], MDSReader):
            return super().get_item(sample_id, retry)
        index = sample_id - int(self.sample_offset_per_shard[shard])
        found = self._stored.sample(shard, reader, index)
        return found if TOKENS in found else super().get_item(sample_id, retry)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Tensor]:
        """Return one row."""
        self._event.raise_if_set()
        number, source, row = self._locate(sample_id)
        samples = self._samples_of(number, source, row).tolist()
        self.check_shards({bisect_right(self._ends_of_shards, sample) for sample in samples})
        pieces = [source.piece(row, index, self._sample(sample, retry)) for index, sample in enumerate(samples)]
        made = self._row(pieces, source)
        if (reference := self.references[number]) is not None:
            made |= {"reference": torch.from_numpy(reference[row])}
        return made | {"source": torch.tensor(number)} if self.several else made

    def _row(self, pieces: list[Piece], source: Source) -> dict[str, Tensor]:
        sizes = [len(piece[TOKENS]) for piece in pieces]
        used = sum(sizes)
        input_ids = np.zeros(self.max_seq_len, np.int64)
        np.concatenate([piece[TOKENS] for piece in pieces], out=input_ids[:used])
        if (largest := input_ids.max()) >= self.vocab_size:
            raise DataError(f"{source.place}: token {largest}, and the model's vocab_size is {self.vocab_size}")
        labels = input_ids.copy()
        labels[used:] = IGNORE_INDEX
        if TARGETS in pieces[0]:
            targets = np.concatenate([piece[TARGETS] for piece in pieces])
            labels[:used][targets == 0] = IGNORE_INDEX
        row = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if isinstance(source, PackedSource):
            return (
                row if self.eos_id is None else row | {"sequence_id": number_documents(row["input_ids"], self.eos_id)}
            )
        sequence_id = np.full(self.max_seq_len, -1)
        for number, end in enumerate(accumulate(sizes)):
            sequence_id[end - sizes[number] : end] = 0 if self.eos_id is None else number
        return row | {"sequence_id": torch.from_numpy(sequence_id)}

    def describe_packing(self) -> list[str]:
        """Say how the documents of each stream are packed, a line each."""
        return [source.describe() for source in self.sources if isinstance(source, DocumentSource)]


def rows_of_an_epoch(streams: Sequence[StreamConfig], rows: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Count the rows that an epoch reads of each stream, as mosaicml-streaming does.

    Args:
        streams: The streams.
        rows: Rows that each has, int64.
        seed: Decides which streams get what rounding leaves.
    """
    weights = [
        Stream(local=each.local, proportion=each.proportion, repeat=each.repeat, choose=each.choose) for each in streams
    ]
    Stream.apply_weights(weights, rows, None, seed)
    return np.array([int(each.choose) for each in weights])


def cut(choices: NDArray[np.int64], excess: int) -> NDArray[np.int64]:
    """Take ``excess`` rows away, always from the stream that has most."""
    choices = choices.copy()
    while excess:
        largest = int(choices.argmax())
        second = int(np.sort(choices)[-2]) if len(choices) > 1 else 0
        taken = min(excess, int(choices[largest]) - second + 1)
        choices[largest] -= taken
        excess -= taken
    return choices


def _beyond(sample_ids: NDArray[np.int64], times: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark, in the same shape, where a sample has come as often as ``times`` says already."""
    flat = sample_ids.ravel()
    order = np.argsort(flat, kind="stable")
    earlier = np.empty(flat.size, np.int64)
    earlier[order] = np.arange(flat.size) - np.searchsorted(flat[order], flat[order])
    return (earlier >= times[flat]).reshape(sample_ids.shape)


def number_documents(tokens_S: Tensor, eos_id: int) -> Tensor:
    """Give each token of a sample the number of its document, from 0, int64 [S]; ``eos_id`` ends one."""
    ends_S = tokens_S == eos_id
    return ends_S.cumsum(0) - ends_S.long()
