"""A dataset whose rows, batches and mixture change from stage to stage; see :mod:`moefoundry.data.curriculum`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from streaming.base.world import World
from torch import Tensor
from torch.utils.data import default_collate

from moefoundry.config.curriculum import Stage
from moefoundry.config.errors import UserError
from moefoundry.config.schema_parts import DatasetConfig
from moefoundry.data.curriculum import Lap, Walk
from moefoundry.data.sources import FimTools, PackedSource, Source
from moefoundry.data.token_dataset import TokenDataset


class CurriculumDataset(TokenDataset):
    """Batches of rows, each of the stage that it belongs to. Construction is collective.

    It yields whole batches, as their size changes. An epoch of the library's is a lap, and a sample its place in the
    lap: the library deals places out to ranks and processes, and shuffles nothing.

    Args:
        config: Data to read.
        stages: The stages.
        vocab_size: Token ids must lie below it.
        eos_id: The token that ends a document; None does not tell the documents of a row apart.
        fim: Fill-in-the-middle, which ``config`` may ask for.

    Raises:
        UserError: A stage asks for rows of another length than data have that were packed when they were prepared; a
            batch cannot be divided among the ranks; and as :class:`TokenDataset`.
    """

    def __init__(
        self,
        config: DatasetConfig,
        stages: Sequence[Stage],
        *,
        vocab_size: int,
        eos_id: int | None = None,
        fim: FimTools | None = None,
    ) -> None:
        ranks = World.detect().num_ranks
        for stage in stages:
            if stage.batch_size % ranks:
                raise UserError(f"stage {stage.name}: batches of {stage.batch_size} rows, and {ranks} ranks")
        self.stages = stages
        self.ranks = ranks
        self._made = False
        self._walk: Walk | None = None
        self._lap: tuple[int, Lap] | None = None
        first = stages[0].batch_size // ranks
        super().__init__(config, batch_size=first, drop_last=False, vocab_size=vocab_size, eos_id=eos_id, fim=fim)
        for stage in stages:
            self._check_length(stage)
        self._made = True
        self.shuffle = False
        self.drop_last = True  # a lap has whole batches alone
        self._begin_epoch(0)

    def _check_length(self, stage: Stage) -> None:
        for source in self.sources:
            if isinstance(source, PackedSource) and source.seq_len != stage.seq_len:
                raise UserError(
                    f"{source.place}: packed to {source.seq_len} tokens when prepared, and stage {stage.name} has rows "
                    f"of {stage.seq_len}; prepare the data with --layout documents"
                )

    def _begin_epoch(self, epoch: int) -> None:
        """Find the rows of a lap, and the sizes that the library goes by."""
        if self._walk is None or self._walk.seed != self.shuffle_seed:
            self._walk, self._lap = self._new_walk(), None
        if self._lap is None or self._lap[0] != epoch:
            self._lap = (epoch, self._walk.lap(epoch))
        stage = self._lap[1].stage
        self._epoch = epoch
        self.max_seq_len = stage.seq_len
        self.batch_size = stage.batch_size // self.ranks
        self.epoch_size = self.size
        self.length = self.size // self.ranks

    def _choose(self) -> None:
        if not self._made:  # laps choose later
            super()._choose()

    def _new_walk(self) -> Walk:
        choices = self._choices()
        ends = np.append(self.shard_offset_per_stream, self.num_shards)[1:]
        first_of_shards = [
            self.sample_offset_per_shard[begin:end] - self.sample_offset_per_stream[number]
            for number, (begin, end) in enumerate(zip(self.shard_offset_per_stream, ends, strict=True))
        ]
        proportions = choices / choices.sum()
        return Walk(self.stages, self.sources, first_of_shards, proportions, self.shuffle_seed, self._shuffles)

    @property
    def size(self) -> int:
        """Number of rows of the lap."""
        return super().size if self._lap is None else len(self._lap[1].streams)

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """List the places of the lap."""
        return np.array([self.size]), np.arange(self.size)

    def _locate(self, row: int) -> tuple[int, Source, int]:
        assert self._lap is not None, "made with the first lap"
        lap = self._lap[1]
        leg = lap.legs[lap.leg_of_row[row]]
        return int(lap.streams[row]), leg.source, int(lap.row_in_leg[row])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of this process in this lap."""
        rows: list[dict[str, Tensor]] = []
        for row in super().__iter__():
            rows.append(row)
            if len(rows) == self.batch_size:
                yield default_collate(rows)
                rows = []

    def describe_packing(self) -> list[str]:
        """Say what the stages are, and how the documents are packed in rows of the longest, a line each."""
        return [*(stage.describe() for stage in self.stages), *super().describe_packing()]
