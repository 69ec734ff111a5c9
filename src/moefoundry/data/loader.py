"""Loaders of prepared shards: batches in an order that does not depend on the number of ranks.

B batch of one rank, S ``max_seq_len``, G global batch (B x ranks). A batch is ``{"input_ids": int64 [B, S], "labels":
int64 [B, S]}`` with equal contents: the shift by one is the model's. Where documents are told apart, ``"sequence_id":
int64 [B, S]`` (LLM Foundry's name) counts those of a sample from 0; the end-of-text token belongs to the one it ends.

Order (mosaicml-streaming's elastic determinism). Samples are permuted by the seed and the epoch alone, then dealt out:
global batch ``i`` is the samples ``i*G .. (i+1)*G`` of the permutation, whatever the number of ranks, nodes and
workers. That needs three choices:

- one canonical node. More would tie the order to divisors of that number and repeat samples to fill it up. The price
  is that with remote data every physical node downloads every shard.
- the epoch is cut to whole global batches where ``drop_last`` is set. Otherwise the stock library repeats samples until
  the ranks divide the epoch, and its length comes to depend on their number. What is left out changes every epoch.
- shuffle ``py1e``: it spreads the samples of every shard over a wide range, so that neighbours from one document part.
  (``py1s`` keeps the samples of a shard together, which is a poor shuffle of a corpus of few shards.)

Without ``drop_last`` (evaluation) every sample is read. If the ranks do not divide the split, up to ``ranks - 1`` of
them are read twice, so that every rank has as many batches; the labels of a repeat are ``IGNORE_INDEX``, so that each
sample counts once on any number of ranks.

What happens when shards are damaged, missing or stale is in :mod:`moefoundry.data.guard`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from streaming import StreamingDataLoader
from streaming.base.world import World
from torch import Tensor

from moefoundry.config.errors import DataError, UserError
from moefoundry.config.schema_parts import DatasetConfig, LoaderConfig
from moefoundry.data.fit import another_length, loader_problems, too_few_samples
from moefoundry.data.guard import CheckedStream, GuardedDataset
from moefoundry.data.summary import read_corpus_summary
from moefoundry.data.tokenizer import load_tokenizer
from moefoundry.ops.cross_entropy import IGNORE_INDEX

TOKENS = "tokens"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # see callbacks/signals.py


class TokenDataset(GuardedDataset):
    """Packed samples as tensors. Construction is collective: every rank makes it at the same point.

    Args:
        config: Data to read.
        batch_size: Samples of one rank's batch.
        drop_last: Cut the epoch to whole global batches.
        vocab_size: Token ids must lie below it.
        eos_id: The token that ends a document; None does not tell documents apart.

    Raises:
        UserError: The samples have another length; the split is smaller than one global batch and ``drop_last`` is
            set; and as :class:`GuardedDataset`.
        DataError: From ``[]``: a sample does not have the recipe's length or has a token outside the vocabulary.
    """

    def __init__(
        self, config: DatasetConfig, *, batch_size: int, drop_last: bool, vocab_size: int, eos_id: int | None = None
    ) -> None:
        stream = CheckedStream(
            local=config.local, remote=config.remote, split=config.split, algorithm=config.validate_hash
        )
        super().__init__(
            stream,
            batch_size=batch_size,
            shuffle=config.shuffle,
            shuffle_algo="py1e",
            shuffle_seed=config.shuffle_seed,
            num_canonical_nodes=1,
            sampling_granularity=1024,  # the library picks in a Python loop; one pick per sample takes minutes at scale
        )
        self.place = f"{config.remote or config.local}/{config.split}"
        self.max_seq_len = config.max_seq_len
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        encodings = {dict(zip(s.column_names, s.column_encodings, strict=True)).get(TOKENS, "") for s in self.shards}
        if message := another_length(self.place, encodings, self.max_seq_len):
            raise UserError(message)
        self.drop_last = drop_last
        self._repeats: NDArray[np.bool_] | None = None
        if drop_last:
            self._cut_to_global_batches(batch_size)

    def _cut_to_global_batches(self, batch_size: int) -> None:
        """Draw a whole number of global batches an epoch, an even subset of the samples."""
        ranks = World.detect().num_ranks
        global_batch_size = batch_size * ranks
        self.epoch_size = self.size - self.size % global_batch_size
        if message := too_few_samples(self.place, self.size, global_batch_size):
            raise UserError(message)
        self.streams[0].choose = self.epoch_size
        self.length = self.epoch_size // ranks

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the samples of this process in this epoch; see :class:`GuardedDataset`."""
        for position, sample in enumerate(super().__iter__()):
            if self._repeats is not None and self._repeats[position]:
                sample = sample | {"labels": torch.full_like(sample["labels"], IGNORE_INDEX)}
            yield sample

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        sample_ids = super()._get_work(epoch, sample_in_epoch)
        if self._repeats is not None:
            world = self._parallel_worker_world
            own = self._repeats[world.node, world.rank_of_node, world.worker_of_rank].flatten()
            self._repeats = own[sample_ids != -1]
        return sample_ids

    def _share_work(self, sample_ids: NDArray[np.int64]) -> Any:
        """Share the samples of all, ``[node, rank, worker, batch, sample]``; called in one process of a node."""
        self._repeats = None if self.drop_last else _repeated(sample_ids)
        return super()._share_work(sample_ids)

    def _attach_work(self) -> Any:
        """Receive the samples of all, and more behind them; called in the other processes of a node."""
        work = super()._attach_work()
        self._repeats = None if self.drop_last else _repeated(work[0])
        return work

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Tensor]:
        """Return one sample: ``input_ids``, ``labels`` and, with an ``eos_id``, ``sequence_id``, int64 [S] each."""
        tokens = super().get_item(sample_id, retry)[TOKENS]
        if tokens.shape != (self.max_seq_len,):
            raise DataError(
                f"{self.place}: a sample of {len(tokens)} tokens, and the recipe's max_seq_len is {self.max_seq_len}"
            )
        if tokens.max() >= self.vocab_size:
            raise DataError(f"{self.place}: token {tokens.max()}, and the model's vocab_size is {self.vocab_size}")
        input_ids = torch.from_numpy(tokens.astype(np.int64))
        sample = {"input_ids": input_ids, "labels": input_ids.clone()}
        return sample if self.eos_id is None else sample | {"sequence_id": number_documents(input_ids, self.eos_id)}


def _repeated(sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mark, in the same shape, the samples that occur earlier already."""
    repeated = np.ones(sample_ids.size, bool)
    repeated[np.unique(sample_ids, return_index=True)[1]] = False
    return repeated.reshape(sample_ids.shape)


class TokenDataLoader(StreamingDataLoader):
    """A ``StreamingDataLoader`` whose errors are one line, also those of its worker processes."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        try:
            yield from super().__iter__()
        except UserError as error:
            _traceback, of_worker, line = str(error).rpartition(f"{type(error).__name__}: ")
            raise (type(error)(line.strip()) if of_worker else error) from None


def number_documents(tokens_S: Tensor, eos_id: int) -> Tensor:
    """Give each token of a sample the number of its document, from 0, int64 [S]; ``eos_id`` ends one."""
    ends_S = tokens_S == eos_id
    return ends_S.cumsum(0) - ends_S.long()


def build_loader(
    config: LoaderConfig, *, batch_size: int, model_vocab_size: int, documents_of: Path | None = None
) -> StreamingDataLoader:
    """Build the loader of one rank.

    ``state_dict()`` and ``load_state_dict()`` of the result hold and restore the position within the epoch, which may
    be restored on another number of ranks with the same global batch size. Collective: every rank calls it.

    Args:
        config: The recipe's ``train_loader`` or ``eval_loader``.
        batch_size: Samples of one batch of this rank.
        model_vocab_size: Rows of the model's embedding.
        documents_of: The tokenizer of the data, where batches are to have a ``sequence_id``; a local corpus says by
            itself which token ends its documents, remote data do not.

    Raises:
        UserError: The data are absent, incomplete, too few, or do not fit the recipe. Sizes and small files of local
            data are checked before anything is allocated; contents, and remote data, as they are first needed.
    """
    if config.dataset.remote is None:
        global_batch = batch_size * World.detect().num_ranks
        for problem in loader_problems(config, "loader", model_vocab_size, global_batch):
            raise UserError(problem.message)
    dataset = TokenDataset(
        config.dataset,
        batch_size=batch_size,
        drop_last=config.drop_last,
        vocab_size=model_vocab_size,
        eos_id=None if documents_of is None else _eos_id(config.dataset, documents_of),
    )
    return TokenDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=config.num_workers,
        drop_last=config.drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.num_workers > 0,
        worker_init_fn=_obey_the_rank_alone if config.num_workers and hasattr(signal, "sigwaitinfo") else None,
    )


def _obey_the_rank_alone(worker: int) -> None:
    """Leave the signals that ask a run to stop to its rank; called in each loader process.

    Slurm signals loader processes, too, and so does whoever signals a process group. But the rank still needs them, to
    the end of its batch. They end when the rank says so, or has gone.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with_the_rank, args=(os.getppid(),), daemon=True).start()


def _end_with_the_rank(rank_process: int) -> None:
    while True:
        received = signal.sigwaitinfo(STOP_SIGNALS)
        if (received.si_signo, received.si_pid) == (signal.SIGTERM, rank_process):
            os._exit(0)


def _eos_id(config: DatasetConfig, tokenizer_dir: Path) -> int:
    if config.remote is None:
        return read_corpus_summary(config.local).eos_id
    return load_tokenizer(tokenizer_dir).eos_id
