"""Metrics of a recipe of LLM Foundry: ``additional_train_metrics: [exact_cross_entropy]`` of its models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.foundry import LanguageCrossEntropy
from moefoundry.ops.cross_entropy import IGNORE_INDEX


class ExactCrossEntropy(LanguageCrossEntropy):
    """Mean cross entropy over all targets, in nats, summed in float64: the same for every batch size and rank count.

    Composer's ``LanguageCrossEntropy`` adds in fp32, which loses digits of a large split.
    """

    def update(self, output: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            output: [..., V] logits.
            target: int64 [...], shifted; :data:`IGNORE_INDEX` is left out.
        """
        logits_NV, targets_N = output.flatten(0, -2).float(), target.flatten()
        losses_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none")
        self.total += losses_N.sum(dtype=torch.float64)
        self.count += (targets_N != IGNORE_INDEX).sum()
