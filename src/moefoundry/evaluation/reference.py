"""Score preference data with a model: log-probabilities of both responses of each pair."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moefoundry.config.schema_data import PackingConfig, PackingMethod
from moefoundry.config.schema_parts import DatasetConfig, LoaderConfig
from moefoundry.data.loader import build_loader
from moefoundry.data.sources import read_lengths
from moefoundry.model.transformer import MoETransformer


@torch.no_grad()
def score_pairs(model: MoETransformer, data: Path, split: str) -> NDArray[np.float32]:
    """Compute log-probabilities of every pair of a split, float32 [pairs, 2], in the order of the data.

    Args:
        model: In evaluation mode, on the device that computes; pairs are told apart whatever its ``document_masking``.
        data: A directory that ``prepare --preferences`` has made.
        split: One of its splits.

    Raises:
        UserError: The data are no pairs, or do not fit the model's vocabulary.
    """
    lengths = read_lengths(data / split)
    longest = int((lengths[0::2] + lengths[1::2]).max()) if len(lengths) % 2 == 0 else int(lengths.max())
    pairs = PackingConfig(PackingMethod.pairs)
    dataset = DatasetConfig(str(data), split=split, shuffle=False, shuffle_seed=0, max_seq_len=longest, packing=pairs)
    loader = build_loader(
        LoaderConfig(dataset=dataset, drop_last=False),
        batch_size=1,
        model_vocab_size=model.cfg.vocab_size,
        documents_of=data / "tokenizer",
    )
    device = next(model.parameters()).device
    model.pairs, model.cfg.document_masking = True, True
    scored = []
    for batch in loader:
        ids, labels, documents = (batch[name].to(device) for name in ("input_ids", "labels", "sequence_id"))
        log_probs = model(ids, labels, sequence_id=documents).log_probs
        assert log_probs is not None, "the model gives them for pairs"
        scored.append(log_probs.float().cpu())
    return torch.cat(scored).numpy()
