"""Stand-in for ``grouped_gemm`` 0.3.0, which MegaBlocks' ``mlp_impl: grouped`` calls, on ``F.grouped_mm``.

The package takes bfloat16 on GPUs; this takes every float dtype on every device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.grouped_linear import STRIDE_BYTES, row_major


def multiply(
    a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False, c: Tensor | None = None
) -> Tensor:
    """Multiply each group's rows: ``grouped_gemm.backend.gmm``, which has no gradient.

    Args:
        a: [N, I], rows of group 0 first, then of group 1, ...
        b: [G, I, O]; [G, O, I] with ``trans_b``; [N, O] with ``trans_a``.
        batch_sizes: int64 [G] on the host; sums to N.
        trans_a: Multiply the transposes of each group's rows of ``a`` with those of ``b``.
        trans_b: Multiply with the transposes of ``b``.
        c: Where the result is written, if given.

    Returns:
        [N, O]; [G, I, O] with ``trans_a``.
    """
    a, b = row_major(a.detach()), b.detach()
    b = row_major(b) if trans_a else b.contiguous()
    out = (
        _grouped_mm(a, b, batch_sizes, trans_a, trans_b) if _fits(a, b) else _loop(a, b, batch_sizes, trans_a, trans_b)
    )
    return out if c is None else c.copy_(out)


def multiply_with_gradient(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """:func:`multiply` with a gradient: ``grouped_gemm.ops.gmm``."""
    return _GroupedGemm.apply(a, b, batch_sizes, trans_b)


def _fits(a: Tensor, b: Tensor) -> bool:
    """Tell whether ``F.grouped_mm`` takes them."""
    if a.dtype not in (torch.float32, torch.bfloat16, torch.float16) or len(a) == 0:
        return False
    return all(x.stride(-2) * x.itemsize % STRIDE_BYTES == 0 for x in (a, b))


def _grouped_mm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool) -> Tensor:
    ends = batch_sizes.to(a.device).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(a.T if trans_a else a, b.mT if trans_b else b, offs=ends)


def _loop(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool) -> Tensor:
    sizes = batch_sizes.tolist()
    if trans_a:
        return torch.stack([left.T @ right for left, right in zip(a.split(sizes), b.split(sizes), strict=True)])
    return torch.cat([rows @ weight for rows, weight in zip(a.split(sizes), b.mT if trans_b else b, strict=True)])


class _GroupedGemm(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool) -> Tensor:
        ctx.save_for_backward(a, b, batch_sizes)
        ctx.trans_b = trans_b
        return multiply(a, b, batch_sizes, trans_b=trans_b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a, b, batch_sizes = ctx.saved_tensors
        grad_a = multiply(grad, b, batch_sizes, trans_b=not ctx.trans_b) if ctx.needs_input_grad[0] else None
        left, right = (grad, a) if ctx.trans_b else (a, grad)
        grad_b = multiply(left, right, batch_sizes, trans_a=True) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None, None
