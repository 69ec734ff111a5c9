"""Loaders: prepared shards become batches, in an order that does not depend on how many ranks read them.

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

Without ``drop_last`` (evaluation) every sample is read at least once; if the ranks do not divide the split, up to
``ranks - 1`` samples are read twice.

Shared memory. The library keeps its state in /dev/shm, under the first free prefix, and removes it at exit. What a
killed run leaves is skipped by the next one. ``clean_stale_shared_memory`` of the library is *not* called: it unlinks
the segments of every other run of the user on the machine, alive or not, and is a collective. The one failure that
stale segments do cause (a download directory believed to be in use) is reported by the library, with this remedy.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.world import World
from torch import Tensor

from moefoundry.config.errors import UserError
from moefoundry.config.schema import DatasetConfig, LoaderConfig
from moefoundry.data.summary import read_corpus_summary
from moefoundry.data.tokenizer import load_tokenizer

VALIDATE_HASH = "xxh64"  # of downloaded shards; fast enough to be free beside the network
TOKENS = "tokens"


class TokenDataset(StreamingDataset):
    """Packed samples as tensors. Construction is collective: every rank makes it at the same point.

    Args:
        config: What is read.
        batch_size: Samples of one rank's batch.
        drop_last: Cut the epoch to whole global batches.
        vocab_size: Token ids must lie below it.
        eos_id: The token that ends a document; None does not tell documents apart.

    Raises:
        UserError: The split is smaller than one global batch and ``drop_last`` is set; from ``[]``: a sample does not
            have the recipe's length or has a token outside the vocabulary.
    """

    def __init__(
        self, config: DatasetConfig, *, batch_size: int, drop_last: bool, vocab_size: int, eos_id: int | None = None
    ) -> None:
        super().__init__(
            local=config.local,
            remote=config.remote,
            split=config.split,
            validate_hash=VALIDATE_HASH,
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
        if drop_last:
            self._cut_to_global_batches(batch_size)

    def _cut_to_global_batches(self, batch_size: int) -> None:
        """Draw a whole number of global batches an epoch, an even subset of the samples."""
        ranks = World.detect().num_ranks
        global_batch_size = batch_size * ranks
        self.epoch_size = self.size - self.size % global_batch_size
        if not self.epoch_size:
            raise UserError(
                f"{self.place}: {self.size} sample(s), fewer than one global batch of {global_batch_size}; "
                "prepare more text or lower the batch size"
            )
        self.streams[0].choose = self.epoch_size
        self.length = self.epoch_size // ranks

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Tensor]:
        """One sample: ``input_ids``, ``labels`` and, with an ``eos_id``, ``sequence_id``, int64 [S] each."""
        tokens = super().get_item(sample_id, retry)[TOKENS]
        if tokens.shape != (self.max_seq_len,):
            raise UserError(
                f"{self.place}: a sample of {len(tokens)} tokens, and the recipe's max_seq_len is {self.max_seq_len}"
            )
        if tokens.max() >= self.vocab_size:
            raise UserError(f"{self.place}: token {tokens.max()}, and the model's vocab_size is {self.vocab_size}")
        input_ids = torch.from_numpy(tokens.astype(np.int64))
        sample = {"input_ids": input_ids, "labels": input_ids.clone()}
        return sample if self.eos_id is None else sample | {"sequence_id": number_documents(input_ids, self.eos_id)}


def number_documents(tokens_S: Tensor, eos_id: int) -> Tensor:
    """int64 [S]: which document of the sample each token is of, from 0; ``eos_id`` ends one."""
    ends_S = tokens_S == eos_id
    return ends_S.cumsum(0) - ends_S.long()


def build_loader(
    config: LoaderConfig, *, batch_size: int, model_vocab_size: int, documents_of: Path | None = None
) -> StreamingDataLoader:
    """The loader of one rank.

    ``state_dict()`` and ``load_state_dict()`` of the result hold and restore the position within the epoch, which may
    be restored on another number of ranks with the same global batch size. Collective: every rank calls it.

    Args:
        config: The recipe's ``train_loader`` or ``eval_loader``.
        batch_size: Samples of one batch of this rank.
        model_vocab_size: Rows of the model's embedding.
        documents_of: The tokenizer of the data, where batches are to have a ``sequence_id``; a local corpus says by
            itself which token ends its documents, remote data do not.

    Raises:
        UserError: The data are absent, incomplete, too few, or do not fit the recipe. Local data are checked before
            anything is allocated; remote data as they arrive.
    """
    if config.dataset.remote is None:
        check_local(config.dataset, model_vocab_size)
    dataset = TokenDataset(
        config.dataset,
        batch_size=batch_size,
        drop_last=config.drop_last,
        vocab_size=model_vocab_size,
        eos_id=None if documents_of is None else _eos_id(config.dataset, documents_of),
    )
    return StreamingDataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=config.num_workers,
        drop_last=config.drop_last,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.num_workers > 0,
    )


def _eos_id(config: DatasetConfig, tokenizer_dir: Path) -> int:
    if config.remote is None:
        return read_corpus_summary(config.local).eos_id
    return load_tokenizer(tokenizer_dir).eos_id


def check_local(config: DatasetConfig, model_vocab_size: int) -> None:
    """Check a local corpus against the recipe, from its small files alone.

    Raises:
        UserError: It is missing (with the command that makes it), not complete, or does not fit.
    """
    local = Path(config.local)
    if not local.exists():
        command = ["moefoundry", "prepare", "stdlib", config.local]
        command += ["--max-seq-len", str(config.max_seq_len), "--vocab-size", str(model_vocab_size)]
        raise UserError(
            f"{local}: no such directory (the recipe's dataset.local); make it with: {shlex.join(command)} "
            "(or your own text in place of stdlib)"
        )
    summary = read_corpus_summary(local)
    if summary.max_seq_len != config.max_seq_len:
        raise UserError(
            f"{local}: packed to max_seq_len {summary.max_seq_len}, and the recipe's max_seq_len is "
            f"{config.max_seq_len}; change the recipe, or prepare the data again"
        )
    if summary.vocab_size > model_vocab_size:
        raise UserError(
            f"{local}: its vocabulary of {summary.vocab_size} exceeds the model's vocab_size {model_vocab_size}"
        )
    if config.split not in summary.splits:
        raise UserError(f"{local}: no split {config.split!r}; it has {', '.join(summary.splits)}")
    if not summary.splits[config.split].samples:
        raise UserError(f"{local}/{config.split}: no samples")
    _check_shards(local / config.split)


def _check_shards(directory: Path) -> None:
    """Every shard of the index is there with its size and can be validated: the library would stall or stop early."""
    file = directory / "index.json"
    try:
        shards: list[dict[str, Any]] = json.loads(file.read_text())["shards"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error
    for shard in shards:
        info = shard["raw_data"]
        path = directory / info["basename"]
        if VALIDATE_HASH not in info["hashes"]:
            raise UserError(f"{file}: no {VALIDATE_HASH} of {info['basename']}; prepare the data again")
        if not path.is_file():
            raise UserError(f"{path}: missing shard")
        if path.stat().st_size != info["bytes"]:
            raise UserError(f"{path}: truncated shard: {path.stat().st_size} bytes of {info['bytes']}")
