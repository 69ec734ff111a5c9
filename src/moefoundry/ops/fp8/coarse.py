"""Linear layers in FP8 with coarser scales than tiles, for comparison: one scale a tensor, or one a row.

All operands are E4M3 with float32 scales, ``amax / 448``, computed at each product. A scale is for the whole tensor (or
for one expert's weight), or for each row along K, the dimension that the product sums over; so each of the three
products quantizes its own operands. Inputs are kept for backward in their own dtype. There are no kernels: values are
rounded and multiplied in fp32, which shows the accuracy of these recipes and not their speed.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.fp8.formats import Format, Scaling
from moefoundry.ops.fp8.scales import scales_of


class Granularity(StrEnum):
    """Elements that share a scale."""

    TENSOR = "tensorwise"
    ROW = "rowwise"


@torch.compiler.disable
def coarse_linear(x: Tensor, weight: Tensor, granularity: Granularity, group_sizes_E: Tensor | None = None) -> Tensor:
    """Compute ``x @ weight.T``, [..., O], in the dtype of ``x``; gradients have the dtypes of their tensors.

    Args:
        x: [..., I]; with groups [R, I], rows of group 0 first, then those of group 1, ...
        weight: [O, I], or [E, O, I] with groups.
        granularity: Elements that share a scale.
        group_sizes_E: int64 [E], sums to R; the host waits for it.
    """
    if group_sizes_E is None:
        out_RO = _CoarseLinear.apply(x.reshape(-1, x.shape[-1]), weight.unsqueeze(0), granularity, None)
        return out_RO.view(*x.shape[:-1], len(weight))
    return _CoarseLinear.apply(x, weight, granularity, group_sizes_E.tolist())


class _CoarseLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_EOI: Tensor, granularity: Granularity, sizes: list[int] | None
    ) -> Tensor:
        ctx.save_for_backward(x_RI, weight_EOI)
        ctx.granularity, ctx.sizes = granularity, sizes or [len(x_RI)]
        return _multiply(x_RI, _rounded_weight(weight_EOI, 2, granularity), ctx.sizes, granularity)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_RI, weight_EOI = ctx.saved_tensors
        granularity, sizes = ctx.granularity, ctx.sizes
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            weight_EIO = _rounded_weight(weight_EOI, 1, granularity).mT
            grad_x = _multiply(grad_RO, weight_EIO, sizes, granularity)
        if ctx.needs_input_grad[1]:
            grads, xs = (_rounded_columns(operand, sizes, granularity) for operand in (grad_RO, x_RI))
            grad_weight = torch.stack([grad.T @ x for grad, x in zip(grads, xs, strict=True)]).to(weight_EOI.dtype)
        return grad_x, grad_weight, None, None


def _multiply(rows_RK: Tensor, weight_ENK: Tensor, sizes: list[int], granularity: Granularity) -> Tensor:
    """Multiply rows by a weight that is rounded already, [R, N]."""
    groups = round_coarsely(rows_RK, (0, 1) if granularity is Granularity.TENSOR else (1,)).split(sizes)
    products = [rows @ weight.T for rows, weight in zip(groups, weight_ENK, strict=True)]
    return torch.cat(products).to(rows_RK.dtype)


def _rounded_weight(weight_EOI: Tensor, summed: int, granularity: Granularity) -> Tensor:
    """Round a weight; ``summed`` is the dimension that the product sums over."""
    return round_coarsely(weight_EOI, (1, 2) if granularity is Granularity.TENSOR else (summed,))


def _rounded_columns(x_RC: Tensor, sizes: list[int], granularity: Granularity) -> list[Tensor]:
    """Round an operand of Wgrad, which sums over the rows of each group."""
    if granularity is Granularity.TENSOR:
        return list(round_coarsely(x_RC, (0, 1)).split(sizes))
    return [round_coarsely(group, (0,)) for group in x_RC.split(sizes)]


def round_coarsely(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Round ``x`` to E4M3's values times one FP32 scale for each slice along ``dims``; float32."""
    x = x.float()
    if not x.numel():
        return x
    scales = scales_of(x.abs().amax(dims, keepdim=True), Format.E4M3, Scaling.FP32)
    largest = Format.E4M3.largest
    return (x / scales).clamp_(-largest, largest).to(torch.float8_e4m3fn).float() * scales
