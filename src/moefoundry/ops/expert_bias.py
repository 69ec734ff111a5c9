"""Biases of experts: added to rows in expert order, and summed up again for their gradients.

The bias after ``down`` needs no rows: the weighted sum of a token's biases is one product of its weights, by expert,
and all biases. A router's bias for the choice of experts is something else (``moe/router.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.permute import RowOrder, permute_slots
from moefoundry.ops.swiglu import PLAIN, Activation


class HiddenLayer(NamedTuple):
    """Parts of the experts' hidden layer beside its products.

    Attributes:
        activation: Constants of the SwiGLU.
        gate_bias_EF, up_bias_EF: Biases of this rank's experts, of one dtype with their weights; None has none.
    """

    activation: Activation = PLAIN
    gate_bias_EF: Tensor | None = None
    up_bias_EF: Tensor | None = None

    @property
    def plain(self) -> bool:
        """True for SwiGLU without biases."""
        return self.activation == PLAIN and self.gate_bias_EF is None


PLAIN_LAYER = HiddenLayer()


def add_bias(rows_NF: Tensor, bias_EF: Tensor | None, tokens_per_expert_E: Tensor) -> Tensor:
    """Add to each row the bias of its expert; keeps no rows for the backward pass.

    Args:
        rows_NF: Rows in expert order.
        bias_EF: A bias for each expert, of the rows' dtype; None adds nothing.
        tokens_per_expert_E: int64 [E]; sums to N.
    """
    return rows_NF if bias_EF is None else _AddBias.apply(rows_NF, bias_EF, tokens_per_expert_E)


def sum_by_expert(rows_NF: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """Sum the rows of each expert, [N, F] -> [E, F], not differentiable; without atomics."""
    if not len(rows_NF):
        return rows_NF.new_zeros(len(tokens_per_expert_E), rows_NF.shape[1])
    first = F.pad(tokens_per_expert_E.cumsum(0), (1, 0))
    rows = torch.arange(len(rows_NF), device=rows_NF.device)
    return F.embedding_bag(rows, rows_NF, first, mode="sum", include_last_offset=True)


def weighted_biases(weights_PK: Tensor, bias_ED: Tensor, order: RowOrder) -> Tensor:
    """Sum the biases of each token's experts, times their weights, [P, D], in the dtype of the biases.

    Args:
        weights_PK: Weight of each slot, differentiable.
        bias_ED: A bias for each expert on this rank.
        order: Order of the slots that are for these experts.
    """
    weights_PE = weights_PK.new_zeros(len(weights_PK), len(bias_ED))
    places = order.token_of_row_N, expert_of_row(order)
    return weights_PE.index_put(places, permute_slots(weights_PK, order)).to(bias_ED.dtype) @ bias_ED


def expert_of_row(order: RowOrder) -> Tensor:
    """Give the expert of each row, int64 [N]; the host does not wait."""
    counts_E = order.tokens_per_expert_E
    experts_E = torch.arange(len(counts_E), device=counts_E.device)
    return experts_E.repeat_interleave(counts_E, output_size=len(order.slot_of_row_N))


class _AddBias(Function):
    @staticmethod
    def forward(ctx: Any, rows_NF: Tensor, bias_EF: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(counts_E)
        return rows_NF + bias_EF.repeat_interleave(counts_E, dim=0, output_size=len(rows_NF))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (counts_E,) = ctx.saved_tensors
        return grad_NF, sum_by_expert(grad_NF.contiguous(), counts_E) if ctx.needs_input_grad[1] else None, None
