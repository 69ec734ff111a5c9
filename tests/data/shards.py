"""A small corpus of several shards, and what the tests of loaders do with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from streaming import StreamingDataLoader

from moefoundry.config.schema_parts import DatasetConfig, LoaderConfig
from moefoundry.data.blocks import plan_blocks
from moefoundry.data.corpus import Corpus
from moefoundry.data.survey import Survey, survey_in_order

SEQ_LEN = 16
VOCAB = 280


def config_of(corpus: Path, split: str = "train", **changes: Any) -> LoaderConfig:
    """A loader of ``corpus``; ``changes`` are keys of its dataset."""
    dataset = DatasetConfig(
        local=str(corpus), split=split, shuffle=split == "train", shuffle_seed=5, max_seq_len=SEQ_LEN
    )
    return LoaderConfig(dataset=replace(dataset, **changes), drop_last=split == "train")


def tokens_of(loader: StreamingDataLoader, batches: int | None = None) -> list[list[list[int]]]:
    """The next batches of an epoch."""
    iterator = iter(loader)
    taken = [batch["input_ids"].tolist() for _, batch in zip(range(batches or 10**6), iterator, strict=False)]
    del iterator
    return taken


def scan(corpus: Corpus, **caps: int) -> Survey:
    """A survey of ``corpus`` in one block."""
    return survey_in_order(corpus, plan_blocks(corpus, 1 << 30), **caps)


def flip_bit(file: Path) -> None:
    """One bit of the last byte, which is a token's."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
