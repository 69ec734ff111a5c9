"""Grouped linear layer: one weight for each expert, over rows in expert order.

``F.grouped_mm`` multiplies all experts in one call, without a loop on the host. The loop is the oracle, and the only
implementation for float64, which ``grouped_mm`` refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

GroupedLinear = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(rows_RI, weight_EOI, tokens_per_expert_E) -> [R, O]``."""

STRIDE_BYTES = 16  # grouped_mm wants the row stride of every operand to be a multiple of this


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """Multiply each row by the weight of its expert, [R, I] x [E, O, I] -> [R, O].

    Args:
        rows_RI: float32 or bfloat16, rows of expert 0 first, then of expert 1, ...
        weight_EOI: Same dtype; each expert's weight has the layout of ``nn.Linear``.
        tokens_per_expert_E: int64 [E]; sums to R.

    Raises:
        ValueError: ``F.grouped_mm`` does not take the dtype or a width; the loop does.
    """
    if rows_RI.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"backend grouped_mm does not take {rows_RI.dtype}; use backend loop")
    if any(width * rows_RI.element_size() % STRIDE_BYTES for width in weight_EOI.shape[1:]):
        raise ValueError(
            f"backend grouped_mm needs widths of a multiple of {STRIDE_BYTES} bytes, "
            f"got {tuple(weight_EOI.shape[1:])} of {rows_RI.dtype}; use backend loop"
        )
    offsets_E = tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    return _GroupedLinear.apply(rows_RI, weight_EOI, offsets_E)


def grouped_linear_loop(rows_RI: Tensor, weight_EOI: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """Compute :func:`grouped_linear` one expert at a time; any float dtype, waits for the host."""
    groups = rows_RI.split(tokens_per_expert_E.tolist())
    return torch.cat([rows @ weight.T for rows, weight in zip(groups, weight_EOI, strict=True)])


class _GroupedLinear(Function):
    """``F.grouped_mm`` with a backward pass of its own.

    Torch's refuses an incoming gradient that is not row-major in memory, such as an expanded one.
    """

    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, weight_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RI, weight_EOI, offsets_E)
        return F.grouped_mm(rows_RI, weight_EOI.transpose(-2, -1), offs=offsets_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RI, weight_EOI, offsets_E = ctx.saved_tensors
        grad_RO = row_major(grad_RO)
        grad_rows_RI = F.grouped_mm(grad_RO, weight_EOI, offs=offsets_E) if ctx.needs_input_grad[0] else None
        grad_weight_EOI = F.grouped_mm(grad_RO.T, rows_RI, offs=offsets_E) if ctx.needs_input_grad[1] else None
        if grad_weight_EOI is not None and _leaves_empty_groups(rows_RI.device):
            zero_empty_groups(grad_weight_EOI, offsets_E)
        return grad_rows_RI, grad_weight_EOI, None


@torch.compiler.assume_constant_result
def _leaves_empty_groups(device: torch.device) -> bool:
    """Tell if ``F.grouped_mm`` writes nothing for a group without rows, as on Blackwell (pytorch issue 172439)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (10, 0)


def zero_empty_groups(grad_weight_EOI: Tensor, offsets_E: Tensor) -> None:
    """Set the gradients of experts without rows to zero, in place.

    Args:
        grad_weight_EOI: Gradients; of an expert without rows they may be anything.
        offsets_E: int32 [E], where the rows of each expert end.
    """
    empty_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)) == 0
    grad_weight_EOI.masked_fill_(empty_E[:, None, None], 0)


def row_major(x_RO: Tensor) -> Tensor:
    """Make row-major. ``contiguous()`` is not enough: it accepts any strides if there is at most one row."""
    if x_RO.stride() == (x_RO.shape[1], 1):
        return x_RO
    return torch.empty(x_RO.shape, dtype=x_RO.dtype, device=x_RO.device).copy_(x_RO)
