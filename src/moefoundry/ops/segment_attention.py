"""Causal attention inside segments of consecutive tokens, by the flash kernel that takes sequences of any lengths.

A segment is a document, or a row of the batch. The kernel knows the ends of segments and a window, so no mask of [S, S]
is made; and it reads keys and values of grouped queries as they are. It wants one width for all heads: narrower ones
get zeros, which change neither products nor sums (MLA's values of 128 beside keys of 192: 1.2 times the operations
forward, 1.15 times backward).

Sinks are those of ``ops/attention_sinks.py``: the kernel also gives the logarithms of its denominators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.kernel_choice import NARROW, fused_kernels

aten = torch.ops.aten
LARGEST_WIDTH, WIDTH_MULTIPLE = 256, 8
CAPABILITY = (8, 0)


class Segments(NamedTuple):
    """Segments of the tokens of a batch, row after row.

    Attributes:
        ends: int32 [N + 1], 0 and the end of each segment.
        longest: Tokens of the longest one, or more.
    """

    ends: Tensor
    longest: int


def segments_of_rows(rows: int, length: int, device: torch.device) -> Segments:
    """Make each row a segment."""
    return Segments(torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device), length)


def segments_of_lengths(lengths: Sequence[int], device: torch.device) -> Segments:
    """Make segments of these lengths; the host does not wait for the device."""
    ends = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    return Segments(ends.to(device, non_blocking=True), max(lengths, default=0))


def takes_segments(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Tell if :func:`attend_in_segments` is chosen, and can run on ``device`` with heads of this width and dtype."""
    fits = dtype in NARROW and width <= LARGEST_WIDTH and width % WIDTH_MULTIPLE == 0
    return fits and fused_kernels() and has_kernel(device)


@cache
def has_kernel(device: torch.device) -> bool:
    """Tell if ``device`` has the kernel: NVIDIA GPUs from compute capability 8.0 on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def attend_in_segments(
    q_BHSd: Tensor,
    k_BGSd: Tensor,
    v_BGSw: Tensor,
    segments: Segments,
    window: int | None = None,
    scale: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Compute causal scaled dot-product attention of each segment.

    Args:
        q_BHSd: Queries, for which :func:`takes_segments` is true.
        k_BGSd: Keys; G divides H.
        v_BGSw: Values, maybe of another width.
        segments: They cover all B * S tokens.
        window: Tokens that a position sees, itself included; None is all before it.
        scale: Factor of the products; None is ``d ** -0.5``.
        sinks_H: Logit of each head that the softmax counts in its denominator, and nowhere else.

    Returns:
        [B, S, H * w].
    """
    scale = q_BHSd.shape[-1] ** -0.5 if scale is None else scale
    batch, out_width = q_BHSd.shape[0], v_BGSw.shape[-1]
    width = max(q_BHSd.shape[-1], out_width)
    q, k, v = (_widened(x, width).transpose(1, 2).flatten(0, 1) for x in (q_BHSd, k_BGSd, v_BGSw))
    out_THd = _InSegments.apply(q, k, v, sinks_H, segments, window, scale)
    return out_THd[..., :out_width].unflatten(0, (batch, -1)).flatten(2)


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))  # which would copy


class _InSegments(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks_H: Tensor | None,
        segments: Segments,
        window: int | None,
        scale: float,
    ) -> Tensor:
        ctx.options = {"scale": scale}
        if window is not None:
            ctx.options |= {"window_size_left": window - 1, "window_size_right": 0}
        ctx.longest = segments.longest
        ends, longest = segments
        out, logs_HT, state, unused, _ = aten._flash_attention_forward(
            q, k, v, ends, ends, longest, longest, 0.0, True, False, **ctx.options
        )
        if sinks_H is not None:
            whole_HT = torch.logaddexp(logs_HT, sinks_H.to(logs_HT.dtype).unsqueeze(-1))
            out = out * (logs_HT - whole_HT).exp().T.unsqueeze(-1).to(out.dtype)
            logs_HT = whole_HT
        ctx.save_for_backward(q, k, v, sinks_H, out, logs_HT, ends, state, unused)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, out, logs_HT, ends, state, unused = ctx.saved_tensors
        longest = ctx.longest
        grads = aten._flash_attention_backward(
            grad.contiguous(),
            q,
            k,
            v,
            out,
            logs_HT,
            ends,
            ends,
            longest,
            longest,
            0.0,
            True,
            state,
            unused,
            **ctx.options,
        )
        grad_sinks_H = None
        if ctx.needs_input_grad[3]:
            products_TH = (grad * out).sum(-1, dtype=logs_HT.dtype)
            shares_HT = (sinks_H.to(logs_HT.dtype).unsqueeze(-1) - logs_HT).exp()
            grad_sinks_H = -(shares_HT * products_TH.T).sum(1).to(sinks_H.dtype)
        return *grads, grad_sinks_H, None, None, None
