"""Loaders of prepared shards: batches in an order that does not depend on the number of ranks.

B batch of one rank, S ``max_seq_len``, G global batch (B x ranks). A batch is ``{"input_ids": int64 [B, S], "labels":
int64 [B, S]}`` with equal contents: the shift by one is the model's. Where documents are told apart, ``"sequence_id":
int64 [B, S]`` (LLM Foundry's name) counts those of a sample from 0; the end-of-text token belongs to the one it ends.
Rows of documents (:mod:`moefoundry.data.token_dataset`) always have it, with -1 where room is left at the end. With
several streams ``"source": int64 [B]`` is the stream of each row, in the order of their names.

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

A curriculum has an order of its own (:mod:`moefoundry.data.curriculum`), dealt out in the same way.

What happens when shards are damaged, missing or stale is in :mod:`moefoundry.data.guard`.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from streaming import StreamingDataLoader
from streaming.base.world import World
from torch import Tensor

from moefoundry.config.curriculum import Stage, rows_of_a_batch
from moefoundry.config.errors import DataError, UserError
from moefoundry.config.schema_data import FimConfig
from moefoundry.config.schema_parts import DatasetConfig, LoaderConfig
from moefoundry.data.curriculum_dataset import CurriculumDataset
from moefoundry.data.fim import Sentinels
from moefoundry.data.fit import loader_problems
from moefoundry.data.sources import FimTools
from moefoundry.data.summary import read_corpus_summary
from moefoundry.data.token_dataset import TokenDataset
from moefoundry.data.tokenizer import load_tokenizer

REAPING_SECONDS = 1.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # see callbacks/signals.py


class TokenDataLoader(StreamingDataLoader):
    """A ``StreamingDataLoader`` whose errors are one line, also those of its worker processes."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        try:
            with dead_processes_named():
                yield from self._batches()
        except UserError as error:
            _traceback, of_worker, line = str(error).rpartition(f"{type(error).__name__}: ")
            raise (type(error)(line.strip()) if of_worker else error) from None

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        try:
            yield from super().__iter__()
        except (EOFError, OSError):  # as the broken connection to a loader process that has died
            time.sleep(REAPING_SECONDS)  # in which PyTorch hears of it, and raises what says so
            raise


class CurriculumLoader(TokenDataLoader):
    """Loader of a curriculum: its dataset makes the batches. It has no length, as epochs are not all as long."""

    def __len__(self) -> int:
        raise TypeError("epochs of a curriculum are not all as long")


def build_loader(
    config: LoaderConfig,
    *,
    batch_size: int,
    model_vocab_size: int,
    documents_of: Path | None = None,
    tokenizer: Path | None = None,
    stages: Sequence[Stage] = (),
) -> StreamingDataLoader:
    """Build the loader of one rank.

    ``state_dict()`` and ``load_state_dict()`` of the result hold and restore the position within the epoch, which may
    be restored on another number of ranks with the same global batch size. Collective: every rank calls it.

    Args:
        config: The recipe's ``train_loader`` or ``eval_loader``.
        batch_size: Samples of one batch of this rank; with ``stages`` each says so itself.
        model_vocab_size: Rows of the model's embedding.
        documents_of: The tokenizer of the data, where batches are to tell documents apart; a local corpus says by
            itself which token ends its documents, remote data do not.
        tokenizer: The tokenizer of the data, which fill-in-the-middle needs.
        stages: Those of a curriculum; empty if there is none.

    Raises:
        UserError: The data are absent, incomplete, too few, or do not fit the recipe. Sizes and small files of local
            data are checked before anything is allocated; contents, and remote data, as they are first needed.
    """
    length = config.dataset.max_seq_len
    global_batch = rows_of_a_batch(stages, length) if stages else batch_size * World.detect().num_ranks
    for problem in loader_problems(config, "loader", model_vocab_size, global_batch):
        raise UserError(problem.message)
    tools: dict[str, Any] = {
        "vocab_size": model_vocab_size,
        "eos_id": None if documents_of is None else _eos_id(config.dataset, documents_of),
        "fim": fim_tools(config.dataset.fim, tokenizer),
    }
    processes: dict[str, Any] = {
        "num_workers": config.num_workers,
        "pin_memory": torch.cuda.is_available(),
        "persistent_workers": config.num_workers > 0,
        "worker_init_fn": _obey_the_rank_alone if config.num_workers and hasattr(signal, "sigwaitinfo") else None,
    }
    if stages:
        return CurriculumLoader(CurriculumDataset(config.dataset, stages, **tools), batch_size=None, **processes)
    dataset = TokenDataset(config.dataset, batch_size=batch_size, drop_last=config.drop_last, **tools)
    return TokenDataLoader(dataset, batch_size=batch_size, drop_last=config.drop_last, **processes)


@contextmanager
def dead_processes_named() -> Iterator[None]:
    """Say in one line that a loader process has died; PyTorch raises wherever the rank is at that moment.

    Raises:
        DataError: Names the process.
    """
    try:
        yield
    except RuntimeError as error:
        if not (found := re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))):
            raise
        raise DataError(
            f"loader process {found[1]} was killed from outside; if the machine has run out of memory, lower "
            "num_workers, and go on with autoresume=true"
        ) from error


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
    for source in config.sources.values():
        if source.remote is None:
            return read_corpus_summary(source.local).eos_id
    return load_tokenizer(tokenizer_dir).eos_id


def fim_tools(cfg: FimConfig | None, tokenizer_dir: Path | None) -> FimTools | None:
    """Open what fill-in-the-middle needs; None without it.

    Raises:
        UserError: There is no tokenizer, or it lacks the special tokens.
    """
    if cfg is None:
        return None
    if tokenizer_dir is None:
        raise UserError("fill-in-the-middle needs the tokenizer of the data")
    tokenizer = load_tokenizer(tokenizer_dir).backend
    return FimTools(cfg, tokenizer, Sentinels.of(tokenizer, tokenizer_dir, cfg.sentinels))
