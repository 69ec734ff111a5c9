"""Held-out loss of a model, the same for every number of ranks and size of batches."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from moefoundry.checkpoint.ranks import rank
from moefoundry.model.transformer import MoETransformer


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss over a split.

    Attributes:
        nats: Mean cross entropy of a target.
        targets: Number of targets.
    """

    nats: float
    targets: int


@torch.no_grad()
def held_out_loss(
    model: MoETransformer, batches: Iterable[Mapping[str, Tensor]], total: int, progress: bool = False
) -> HeldOutLoss:
    """Average the cross entropy over all targets; every rank calls it.

    Args:
        model: In evaluation mode; whole or sharded.
        batches: This rank's batches, as many as every rank has.
        total: Number of the batches, for the bar.
        progress: Show a bar on a terminal.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    hidden = not (progress and rank() == 0 and sys.stderr.isatty())
    for batch in tqdm(batches, "batches", total, leave=False, disable=hidden):
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        losses = model(inputs["input_ids"], inputs["labels"], sequence_id=inputs.get("sequence_id"))
        sums += torch.stack([losses.lm.double() * losses.num_targets, losses.num_targets.double()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return HeldOutLoss((sums[0] / sums[1].clamp(min=1)).item(), int(sums[1]))
