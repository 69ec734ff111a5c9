"""The output projection, which also computes losses, without all logits at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moefoundry.model.losses import NamedLoss, sums_over_targets
from moefoundry.ops.cross_entropy import (
    IGNORE_INDEX,
    linear_cross_entropies,
    linear_cross_entropy,
    softmax_dtype,
)
from moefoundry.ops.rounding import round_gradient, round_operand
from moefoundry.ops.sizes import CHUNK_TOKENS


def multiplied(x: Tensor, factor: float) -> Tensor:
    """Multiply by a constant, without a kernel where that changes nothing."""
    return x if factor == 1 else x * factor


class OutputHead(nn.Linear):
    """The output projection.

    Attributes:
        operand_dtype: Dtype to which a precision policy rounds operands; None does not round.
        divisor: Divides the logits; applied to the hidden states, which are fewer.
    """

    operand_dtype: torch.dtype | None = None
    divisor: float = 1.0

    def forward(self, hidden_BSD: Tensor, targets_BS: Tensor | None = None, each: bool = False) -> Tensor:
        """Compute logits or cross entropy.

        Args:
            hidden_BSD: [B, S, D].
            targets_BS: int64 [B, S]; ``IGNORE_INDEX`` is no target.
            each: Compute the cross entropy of each target, not their sum.

        Returns:
            Without targets logits [B, S, V]; with them the sum of the cross entropies, a scalar; with ``each`` [B, S],
            0 where there is no target. Nats, fp32 or wider.
        """
        hidden_BSD = multiplied(hidden_BSD, 1 / self.divisor)
        if targets_BS is None:
            return self._logits(hidden_BSD)
        if each:
            return torch.cat(self._by_chunk(_cross_entropies, hidden_BSD, targets_BS)).view_as(targets_BS)
        return linear_cross_entropy(hidden_BSD.flatten(0, 1), self.weight, targets_BS.flatten(), **self._options())

    def sum_and_rows(self, hidden_BSD: Tensor, targets_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the cross entropies, as ``forward`` does, and those of each row, [B], without gradient."""
        hidden_BSD = multiplied(hidden_BSD, 1 / self.divisor)
        operands = hidden_BSD.flatten(0, 1), self.weight, targets_BS.flatten()
        total, losses_T = linear_cross_entropies(*operands, **self._options())
        return total, losses_T.view_as(targets_BS).sum(dim=1)

    def sums_over_targets(self, losses: Sequence[NamedLoss], hidden_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        """Sum each loss over the targets, [len(losses)]."""

        def of_chunk(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
            return sums_over_targets(losses, logits_NV, targets_N)

        hidden_BSD = multiplied(hidden_BSD, 1 / self.divisor)
        return torch.stack(self._by_chunk(of_chunk, hidden_BSD, targets_BS)).sum(dim=0)

    def _by_chunk(
        self, compute: Callable[[Tensor, Tensor], Tensor], hidden_BSD: Tensor, targets_BS: Tensor
    ) -> list[Tensor]:
        """Compute ``(logits_NV, targets_N)`` of one chunk of tokens at a time, and again in the backward pass."""

        def of_chunk(hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
            logits_NV = self._logits(hidden_ND)
            return compute(logits_NV.to(softmax_dtype(logits_NV.dtype)), targets_N)

        chunks = zip(
            hidden_BSD.flatten(0, 1).split(CHUNK_TOKENS), targets_BS.flatten().split(CHUNK_TOKENS), strict=True
        )
        return [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]

    def _logits(self, hidden_BSD: Tensor) -> Tensor:
        if self.operand_dtype is None:
            return super().forward(hidden_BSD)
        operands = (round_operand(x, self.operand_dtype) for x in (hidden_BSD, self.weight))
        logits_BSV = round_gradient(nn.functional.linear(*operands), self.operand_dtype)
        return logits_BSV if self.bias is None else logits_BSV + self.bias

    def _options(self) -> dict[str, Any]:
        return {"operand_dtype": self.operand_dtype, "bias_V": self.bias}


def _cross_entropies(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none")
