"""SparseMixer (Phi-3.5-MoE, arXiv 2409.12136): experts are picked one after the other, and gradients are estimated.

For each pick, the experts that were not picked before and whose logit is near the best of these share a softmax; that
of the picked one is its weight. In training the pick is drawn by the softmax, and its weight is divided by 3 in three
of four tokens whose pick is not the likeliest. The gradient is that of a third-order (Heun) estimate of the drawn
choice. Otherwise the likeliest is picked, and the gradient is its softmax's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.config import SparseMixerConfig

SMALL, REST = 0.3333, 0.6667  # as Phi's code has them
KEPT_ABOVE = 0.75


class SparseMixer:
    """Score function that also picks the experts. Its scores, for balancing, are a softmax over all."""

    def __init__(self, cfg: SparseMixerConfig) -> None:
        self.margin, self.sampled = cfg.margin, cfg.sampled

    def __call__(self, logits_TE: Tensor) -> Tensor:
        """Compute scores [T, E] of logits [T, E]."""
        return logits_TE.softmax(dim=-1)

    def pick(self, logits_TE: Tensor, top_k: int, training: bool) -> tuple[Tensor, Tensor]:
        """Pick experts.

        Args:
            logits_TE: [T, E].
            top_k: K.
            training: Draw them, unless the recipe says otherwise.

        Returns:
            Weights [T, K] of the logits' dtype, and experts, int64 [T, K], in the order in which they are picked.
        """
        left_TE, weights, ids = logits_TE, [], []
        for _ in range(top_k):
            near_TE = left_TE.masked_fill(self._far(logits_TE.detach(), left_TE.detach()), -torch.inf)
            if training and self.sampled:
                weight_T1, id_T1 = _drawn(logits_TE, near_TE.detach())
            else:
                id_T1 = left_TE.argmax(dim=-1, keepdim=True)
                weight_T1 = near_TE.softmax(dim=-1).gather(1, id_T1)
            weights.append(weight_T1)
            ids.append(id_T1)
            left_TE = left_TE.scatter(1, id_T1, -torch.inf)
        return torch.cat(weights, dim=1), torch.cat(ids, dim=1)

    def _far(self, logits_TE: Tensor, left_TE: Tensor) -> Tensor:
        best_T1 = left_TE.amax(dim=-1, keepdim=True)
        return (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1) > 2 * self.margin


def _drawn(logits_TE: Tensor, near_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Draw an expert by the softmax of ``near_TE``; give its weight [T, 1], with a gradient, and its number [T, 1]."""
    id_T1 = (near_TE - exponential(near_TE).log()).argmax(dim=-1, keepdim=True)
    chances_TE = near_TE.softmax(dim=-1)
    likeliest_T1 = id_T1 == chances_TE.argmax(dim=-1, keepdim=True)
    kept_T1 = (likeliest_T1 | (uniform(chances_TE[:, :1]) > KEPT_ABOVE)).to(chances_TE.dtype)
    weight_T1: Tensor = _HeunEstimate.apply(logits_TE, chances_TE, id_T1, SMALL + REST * kept_T1)
    return weight_T1, id_T1


def exponential(like: Tensor) -> Tensor:
    """Draw numbers of the exponential distribution."""
    return torch.empty_like(like).exponential_()


def uniform(like: Tensor) -> Tensor:
    """Draw numbers of the uniform distribution over [0, 1)."""
    return torch.rand_like(like)


class _HeunEstimate(Function):
    """The chance of the drawn expert times a factor; its gradient is that of the chance, times the chance, alone."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, chances_TE: Tensor, id_T1: Tensor, factor_T1: Tensor) -> Tensor:
        ctx.save_for_backward(chances_TE, id_T1)
        return chances_TE.gather(1, id_T1) * factor_T1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T1: Tensor) -> tuple[Tensor, None, None, None]:
        chances_TE, id_T1 = ctx.saved_tensors
        grad_T1 = grad_T1 * chances_TE.gather(1, id_T1)
        return (-chances_TE * grad_T1).scatter_add(1, id_T1, grad_T1), None, None, None
