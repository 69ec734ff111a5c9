"""Functions over the kernels, with autograd; each equals an operator of ``model`` or ``ops`` to rounding."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.cross_entropy import IGNORE_INDEX
from moefoundry.ops.row_kernels import kernels

TILE_ELEMENTS = 4096
"""Elements of a program's rows together, about: of narrow rows it takes several."""
PROGRAMS = 528
"""Programs of the norm's backward pass, each of which sums a part of the weight's gradient: four for each of an H100's
132 multiprocessors. Their number is the same on every device, and so is the order of the sums."""
LOGITS = 8192
"""Logits that a program has at a time."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute ``x / sqrt(mean(x**2) + eps) * (weight + offset)`` over the last dim; keeps its operands alone.

    Args:
        x: [..., W], bfloat16 or float16, which is the dtype of the result.
        weight: [W], any float dtype.
        eps: Added before the root.
        offset: Added to the weights.
    """
    return _RmsNorm.apply(x, weight, eps, offset)


def rotate(x_BHSd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate pairs of elements of each head.

    Args:
        x_BHSd: bfloat16 or float16.
        cos: fp32 [S, d/2] or [B, 1, S, d/2].
        sin: Likewise.
        interleaved: Pairs are (x[2i], x[2i + 1]), not (x[i], x[i + d/2]).

    Returns:
        [B, H, S, d], in memory as [B, S, H, d].
    """
    return _Rotate.apply(x_BHSd, cos, sin, interleaved)


def cross_entropy_(logits_NV: Tensor, labels_N: Tensor, gradient: bool) -> Tensor:
    """Compute the cross entropies, fp32 [N]; with ``gradient``, that of their sum takes the place of the logits.

    Args:
        logits_NV: bfloat16 or float16, contiguous.
        labels_N: int64; ``IGNORE_INDEX`` is no label, and has loss and gradient 0.
        gradient: Write the gradient.
    """
    rows, width = logits_NV.shape
    losses_N = torch.empty(rows, dtype=torch.float32, device=logits_NV.device)
    if rows:
        part = min(triton.next_power_of_2(width), LOGITS)
        kernels.cross_entropy[(rows,)](
            logits_NV,
            labels_N.contiguous(),
            losses_N,
            width,
            IGNORED=IGNORE_INDEX,
            GRADIENT=gradient,
            WIDTH=part,
            num_warps=max(1, min(16, part // 512)),
        )
    return losses_N


def _tile(width: int) -> dict[str, int]:
    """Choose the rows of a program, and its warps."""
    padded = triton.next_power_of_2(width)
    return {"ROWS": max(1, TILE_ELEMENTS // padded), "num_warps": max(4, min(16, padded // 512))}


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        width, out = x.shape[-1], torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows, tile = x.numel() // width, _tile(width)
        if rows:
            kernels.rms_norm[(triton.cdiv(rows, tile["ROWS"]),)](
                x.contiguous(),
                weight,
                out,
                rows,
                width,
                eps,
                OFFSET=offset,
                WIDTH=triton.next_power_of_2(width),
                **tile,
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        width, grad_x = x.shape[-1], torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows, tile = x.numel() // width, _tile(width)
        tiles = triton.cdiv(triton.cdiv(rows, tile["ROWS"]), PROGRAMS)  # of each program
        programs = triton.cdiv(triton.cdiv(rows, tile["ROWS"]), max(tiles, 1))
        parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        if rows:
            kernels.rms_norm_backward[(programs,)](
                grad.contiguous(),
                x.contiguous(),
                weight,
                grad_x,
                parts,
                rows,
                width,
                ctx.eps,
                tiles,
                OFFSET=ctx.offset,
                WIDTH=triton.next_power_of_2(width),
                **tile,
            )
        return grad_x, parts.sum(0).to(weight.dtype), None, None


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotated(x, cos, sin, interleaved, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, ctx.interleaved, -1.0), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, sign: float) -> Tensor:
    if x.stride(-1) != 1:
        x = x.contiguous()
    batch, heads, seq_len, width = x.shape
    rows, half = batch * heads * seq_len, width // 2
    out = torch.empty(batch, seq_len, heads, width, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(half)
    tile = max(1, TILE_ELEMENTS // (2 * padded))
    if rows:
        kernels.rotate[(triton.cdiv(rows, tile),)](
            x,
            cos.contiguous(),
            sin.contiguous(),
            out,
            rows,
            heads,
            seq_len,
            half,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            seq_len * half if cos.dim() == 4 else 0,
            SIGN=sign,
            INTERLEAVED=interleaved,
            ROWS=tile,
            HALF=padded,
            num_warps=4,
        )
    return out.transpose(1, 2)
