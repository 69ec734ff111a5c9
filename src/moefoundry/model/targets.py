"""Targets: the label that each position predicts, and how many there are."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops.cross_entropy import IGNORE_INDEX


def shifted_targets(labels_BS: Tensor, sequence_id_BS: Tensor | None = None, shift: int = 1) -> Tensor:
    """Shift labels so that position s has its target, label s + ``shift``.

    Args:
        labels_BS: int64 [B, S].
        sequence_id_BS: int64 [B, S], document of each position; labels of another document are no targets.
        shift: Distance to the label, in tokens.

    Returns:
        int64 [B, S], ``IGNORE_INDEX`` where there is no target.
    """
    targets_BS = labels_BS[:, shift:]
    if sequence_id_BS is not None:
        crosses_BS = sequence_id_BS[:, shift:] != sequence_id_BS[:, :-shift]
        targets_BS = targets_BS.masked_fill(crosses_BS, IGNORE_INDEX)
    return F.pad(targets_BS, (0, labels_BS.shape[1] - targets_BS.shape[1]), value=IGNORE_INDEX)


def count_targets(targets_BS: Tensor) -> Tensor:
    """Count the targets of each sample that are not ignored, int64 [B]."""
    return (targets_BS != IGNORE_INDEX).sum(-1)
