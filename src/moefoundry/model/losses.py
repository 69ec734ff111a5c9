"""Further losses of training, by name: the recipe's ``losses``.

A loss gives a number for each target (from the output logits) or for each token of each MoE layer (from the router).
The model takes the mean over targets or tokens, and sums over layers. So the loss of a batch is the same however the
batch is divided among ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moefoundry.config import LossConfig, LossesConfig, UserError
from moefoundry.config.making import chosen_parts, make_part
from moefoundry.moe.balance import normalized
from moefoundry.moe.router import TINY
from moefoundry.ops.cross_entropy import IGNORE_INDEX

TAKEN = ("total", "lm", "balance", "z", "mtp", "indexer")
"""Names of the losses that every run has."""


@dataclass(frozen=True)
class LogitsLoss:
    """A loss of the output logits.

    Attributes:
        values: ``(logits_NV, targets_N) -> values_N`` for N targets; fp32 logits, int64 targets. Values of
            ignored targets, which are 0 here, are not used.
    """

    values: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class RouterLoss:
    """A loss of the routers.

    Attributes:
        values: ``(router_logits_TE, scores_TE) -> values_T`` for T tokens in one MoE layer; fp32.
    """

    values: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NamedLoss:
    """A loss of a recipe.

    Attributes:
        name: Its key in ``losses``; logged as ``loss/train/NAME``.
        weight: Multiplies it in the total.
        loss: Computes it.
    """

    name: str
    weight: float
    loss: LogitsLoss | RouterLoss


def build_losses(cfg: LossesConfig) -> list[NamedLoss]:
    """Make the losses that a recipe turns on.

    Raises:
        UserError: A loss cannot be made, or has the name of one that every run has.
    """
    losses = []
    for name, part in chosen_parts("losses", cfg):
        if name in TAKEN:
            raise UserError(f"losses.{name}: every run has a loss of this name")
        loss = make_part("losses", name, f"losses.{name}", part)
        if not isinstance(loss, (LogitsLoss, RouterLoss)):
            raise UserError(f"losses.{name}: its package makes a {type(loss).__name__}, no LogitsLoss or RouterLoss")
        losses.append(NamedLoss(name, part.weight, loss))
    return losses


def values_of(named: NamedLoss, *inputs: Tensor) -> Tensor:
    """Compute a loss, [N].

    Args:
        named: The loss.
        inputs: Arguments of its ``values``, of N rows each.

    Raises:
        UserError: The loss does not give one number for each row.
    """
    values_N = named.loss.values(*inputs)
    if values_N.shape != inputs[0].shape[:1]:
        raise UserError(
            f"losses.{named.name}: gives {list(values_N.shape)} for {len(inputs[0])} rows, not one for each"
        )
    return values_N


def sums_over_targets(losses: Sequence[NamedLoss], logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Sum each loss over the targets that are not ignored, [len(losses)]."""
    kept_N = targets_N != IGNORE_INDEX
    targets_N = targets_N.where(kept_N, 0)  # in place of leaving them out, for which the host would wait for a GPU
    return torch.stack([values_of(each, logits_NV, targets_N).where(kept_N, 0.0).sum() for each in losses])


def weighted(losses: Sequence[NamedLoss], values: Tensor) -> dict[str, Tensor]:
    """Multiply the losses [len(losses)] by their weights; by name."""
    return {each.name: value * each.weight for each, value in zip(losses, values, strict=True)}


def logits_z(cfg: LossConfig) -> LogitsLoss:
    """z-loss of the output logits, ``logsumexp(logits)**2`` (PaLM, arXiv 2204.02311, section 5)."""
    return LogitsLoss(lambda logits_NV, targets_N: logits_NV.logsumexp(dim=-1).square())


def router_entropy(cfg: LossConfig) -> RouterLoss:
    """Entropy of a token's normalized scores, in nats; minimized with a positive weight, rewarded with a negative."""

    def of_tokens(router_logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        probs_TE = normalized(scores_TE)
        return -(probs_TE * (probs_TE + TINY).log()).sum(dim=-1)  # a probability of 0 has a finite gradient

    return RouterLoss(of_tokens)
