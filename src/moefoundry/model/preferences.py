"""Direct preference optimization (DPO, arXiv 2305.18290): the loss of pairs of a chosen and a rejected response.

A row is one pair: document 0 is the prompt with the chosen response, document 1 the prompt with the rejected one. The
frozen reference is not run in training: its log-probabilities come with the data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHOSEN, REJECTED = 0, 1


def log_probs_of_pairs(losses_BS: Tensor, documents_BS: Tensor) -> Tensor:
    """Sum log-probabilities over the chosen and over the rejected response, [B, 2].

    Args:
        losses_BS: Cross entropy at each position, nats; 0 where there is no target.
        documents_BS: int64 [B, S], 0 or 1; -1 on padding.
    """
    return torch.stack([-(losses_BS * (documents_BS == side)).sum(dim=1) for side in (CHOSEN, REJECTED)], dim=1)


def reward_margins(log_probs_B2: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    """Compute by how much the reward of the chosen response exceeds that of the rejected one, [B].

    The reward of a response is ``beta * (log p - log p of the reference)``; constants of the prompt cancel.
    """
    rewards_B2 = beta * (log_probs_B2 - reference_B2)
    return rewards_B2[:, CHOSEN] - rewards_B2[:, REJECTED]


def dpo_losses(log_probs_B2: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    """Compute the loss of each pair, [B] (eq. 7): ``-log sigmoid`` of its :func:`reward_margins`."""
    return -F.logsigmoid(reward_margins(log_probs_B2, reference_B2, beta))
