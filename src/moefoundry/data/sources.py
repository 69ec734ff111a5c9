"""Sources of rows: each stream of a loader as rows of ``seq_len`` tokens, whichever layout its data have."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moefoundry.config.errors import DataError, UserError
from moefoundry.config.schema_data import FimConfig, PackingMethod
from moefoundry.data.fim import Draws, FillInTheMiddle, Sentinels
from moefoundry.data.identity import TARGETS, TOKENS, read_shards
from moefoundry.data.packing_plan import Fragments, PackingPlan, alone, best_fit, concatenated, in_pairs, repacked
from moefoundry.data.stored_arrays import StoredArray
from moefoundry.data.summary import LENGTHS_FILE

Sample = Mapping[str, NDArray[Any] | StoredArray]
"""``tokens`` [n] and, of instruction data, ``targets`` [n], 1 where the token is to be predicted."""

Piece = Mapping[str, NDArray[Any]]
"""Parts of these."""

PACKERS = {
    PackingMethod.concat: concatenated,
    PackingMethod.best_fit: best_fit,
    PackingMethod.none: alone,
    PackingMethod.pairs: in_pairs,
}


@dataclass(frozen=True)
class FimTools:
    """Needs of fill-in-the-middle beside the documents."""

    cfg: FimConfig
    tokenizer: Tokenizer
    sentinels: Sentinels


class PackedSource:
    """A stream of samples that were packed when they were prepared: each is a row, in every epoch.

    Args:
        name: Name of the stream.
        place: Place of its data, for errors.
        samples: Number of its samples.
        seq_len: Tokens of each.
    """

    def __init__(self, name: str, place: str, samples: int, seq_len: int) -> None:
        self.name = name
        self.place = place
        self.rows = samples
        self.seq_len = seq_len

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    def begin_epoch(self, epoch: int, seed: int) -> None:
        """Do nothing: every epoch has the same rows."""

    def samples_of(self, row: int) -> NDArray[np.int64]:
        """List the samples that a row is made of."""
        return np.array([row])

    def first_samples(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find the first sample of each row, [N]."""
        return rows

    def piece(self, row: int, number: int, sample: Sample) -> Piece:
        """Take the row's part of its sample ``number``: all of it.

        Raises:
            DataError: It has another length than the recipe says.
        """
        tokens = sample[TOKENS]
        if len(tokens) != self.seq_len:
            raise DataError(
                f"{self.place}: a sample of {len(tokens)} tokens, and the recipe's max_seq_len is {self.seq_len}"
            )
        return {column: values[:] for column, values in sample.items() if column in (TOKENS, TARGETS)}


class DocumentSource:
    """A stream of documents, packed by a plan that is the same in every epoch, or, with ``fim``, of this epoch.

    Args:
        name: Name of the stream.
        place: Place of its data, for errors.
        lengths: int32 [documents], tokens of each.
        seq_len: Tokens of a row.
        method: Way of packing.
        fim: Fill-in-the-middle; None leaves documents as they are.

    Attributes:
        plan: That of this epoch; before the first, with ``fim``, one of as many rows, but for very few.
    """

    def __init__(
        self,
        name: str,
        place: str,
        lengths: NDArray[np.int32],
        seq_len: int,
        method: PackingMethod,
        fim: FimTools | None,
    ) -> None:
        self.name = name
        self.place = place
        self.seq_len = seq_len
        self.method = method
        self._lengths = lengths
        self._tools = fim
        self._fim: FillInTheMiddle | None = None
        self._planned = lengths
        self._epoch: tuple[int, int] | None = None
        self.plan: PackingPlan
        if fim is None:
            try:
                self.plan = PACKERS[method](lengths, seq_len)
            except UserError as error:
                raise UserError(f"{place}: {error}") from None
        else:
            self.begin_epoch(0, seed=0)  # not the run's, which a checkpoint may replace

    @property
    def rows(self) -> int:
        return self.plan.rows

    @property
    def tokens(self) -> int:
        """Count the tokens of the documents as they are stored."""
        return int(self._lengths.sum(dtype=np.int64))

    @property
    def changes(self) -> bool:
        """Tell whether every epoch has documents of its own."""
        return self._tools is not None

    def begin_epoch(self, epoch: int, seed: int) -> None:
        """Plan an epoch, unless that is done: the same documents, seed and epoch give the same plan anywhere."""
        if self._tools is None or self._epoch == (epoch, seed):
            return
        self._epoch = (epoch, seed)
        self._reorder(self._tools, epoch, seed)
        self.plan = PACKERS[self.method](self._planned, self.seq_len)

    def _reorder(self, tools: FimTools, epoch: int, seed: int) -> None:
        draws = Draws(seed, epoch, self.name)
        self._fim = FillInTheMiddle(tools.cfg, tools.sentinels, draws, self.seq_len, tools.tokenizer)
        self._planned = self._fim.lengths(self._lengths)

    def in_rows_of(self, seq_len: int, epoch: int, seed: int, rest: Fragments | None = None) -> DocumentSource:
        """Give this stream in rows of another length.

        Args:
            seq_len: Tokens of a row.
            epoch: The epoch, whose documents are the same in rows of any length.
            seed: Seed of the run's data.
            rest: What is left of the epoch; None is all of it.
        """
        if rest is None and self._tools is None and seq_len == self.seq_len:
            return self
        other = copy.copy(self)
        if self._tools is not None:
            other._reorder(self._tools, epoch, seed)
        packer = PACKERS[self.method]
        other.plan = packer(other._planned, seq_len) if rest is None else repacked(packer, rest, seq_len)
        return other

    def samples_of(self, row: int) -> NDArray[np.int64]:
        """List the samples that a row is made of."""
        return self.plan.documents_of(row)

    def first_samples(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Find the first sample of each row, [N]."""
        return self.plan.first_documents[rows]

    def piece(self, row: int, number: int, sample: Sample) -> Piece:
        """Take the row's part of its document ``number``.

        Raises:
            DataError: The document has another length than the plan goes by.
        """
        tokens = sample[TOKENS]
        document, start, stop = self.plan.piece(row, number)
        if len(tokens) != self._lengths[document]:
            raise DataError(
                f"{self.place}: document {document} has {len(tokens)} tokens, and {LENGTHS_FILE} says "
                f"{self._lengths[document]}; prepare the data again"
            )
        if self._planned[document] != len(tokens):
            assert self._fim is not None, "documents that are not reordered keep their length"
            return {TOKENS: self._fim.apply(document, tokens[:], int(self._planned[document]))[start:stop]}
        return {column: values[start:stop] for column, values in sample.items() if column in (TOKENS, TARGETS)}

    def describe(self) -> str:
        """Say how the documents are packed, and what is left over."""
        plan = self.plan
        return (
            f"{self.place}: {len(self._lengths)} documents in {plan.rows} rows of {self.seq_len} tokens "
            f"({self.method}): {plan.waste:.2%} of them left empty, {plan.cut} documents cut"
        )


Source = PackedSource | DocumentSource


def runs_in_shards(first_samples: NDArray[np.int64], first_of_shards: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the rows of each run of them whose first samples lie in one shard.

    Args:
        first_samples: The first sample of each row, [N].
        first_of_shards: The first sample of each shard, ascending.
    """
    shards = np.searchsorted(first_of_shards, first_samples, side="right")
    return np.diff(np.flatnonzero(np.diff(shards, prepend=-1, append=-1)))


def read_lengths(directory: Path) -> NDArray[np.int32]:
    """Read the lengths of a stream's documents.

    Raises:
        UserError: They are absent, damaged, or not of as many documents as the index has.
    """
    file = directory / LENGTHS_FILE
    try:
        lengths: NDArray[np.int32] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    if lengths.dtype != np.int32 or lengths.ndim != 1 or not len(lengths) or lengths.min() < 1:
        raise UserError(f"{file}: damaged: not the lengths of documents, int32, from 1 on")
    documents = sum(shard["samples"] for shard in read_shards(directory))
    if len(lengths) != documents:
        raise UserError(f"{file}: {len(lengths)} lengths, and the shards have {documents} documents")
    return lengths
