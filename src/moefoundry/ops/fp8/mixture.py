"""A mixture of SwiGLU experts in FP8: tokens and gradients are quantized before they are copied to their experts.

Tiles of a row contain one token only, so its copies have the same bits. K copies of FP8 rows take half of the bytes of
K copies in BF16, and one quantization in place of K. Tokens or gradients that came from other ranks in FP8 are copied
without quantizing them again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer
from moefoundry.ops.fp8.backend import Backend
from moefoundry.ops.fp8.deep_gemm import in_tiles
from moefoundry.ops.fp8.feed_forward import fp8_feed_forward
from moefoundry.ops.fp8.formats import QuantizedTensor, Tile
from moefoundry.ops.fp8.quantization import quantize_rows_once, remember_rows
from moefoundry.ops.fp8.weights import KeptBlocks
from moefoundry.ops.permute import RowOrder, gather_rows, permute_slots, sum_of_rows


@torch.compiler.disable
def fp8_mixture(
    tokens_PD: Tensor,
    weights_PK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    order: RowOrder,
    hidden: HiddenLayer = PLAIN_LAYER,
    backend: Backend | None = None,
    blocks: KeptBlocks | None = None,
) -> Tensor:
    """Compute each token's weighted sum of its experts' SwiGLU, [P, D] -> [P, D], in the dtype of the tokens.

    Args:
        tokens_PD: float32, bfloat16 or float16.
        weights_PK: Weight of each slot, differentiable.
        gate_EFD: Weights of the experts, each in the layout of ``nn.Linear``; likewise the others.
        up_EFD: [E, F, D].
        down_EDF: [E, D, F].
        order: Order of the slots that have rows.
        hidden: Activation, and biases of gate and up.
        backend: The backend to use; None chooses by device.
        blocks: Keeps the quantized weights; None quantizes them in each pass.
    """
    num_tokens = len(tokens_PD)
    if backend is Backend.DEEPGEMM:
        order = in_tiles(order, num_tokens)
        tokens_PD, weights_PK = (F.pad(each, (0, 0, 0, 1)) for each in (tokens_PD, weights_PK))
    rows_RD = _FromTokens.apply(tokens_PD, order)
    out_RD = fp8_feed_forward(
        rows_RD,
        gate_EFD,
        up_EFD,
        down_EDF,
        order.tokens_per_expert_E,
        permute_slots(weights_PK, order),
        hidden,
        backend,
        rows=gather_quantized(quantize_rows_once(tokens_PD, backend), order),
        blocks=blocks,
    )
    mixed_PD = _SumRows.apply(out_RD, order, backend)
    return mixed_PD if len(mixed_PD) == num_tokens else mixed_PD[:num_tokens]


def gather_quantized(x: QuantizedTensor, order: RowOrder) -> QuantizedTensor:
    """Copy tokens' rows, [P, C] in ``ROW`` tiles, into the order of their experts, [R, C]."""
    values, scales = (gather_rows(part, order) for part in (x.values.view(torch.uint8), x.scales))
    return QuantizedTensor(values.view(x.values.dtype), scales, Tile.ROW, (len(values), x.shape[1]), x.format)


class _FromTokens(Function):
    """Stand-in for the rows [R, D] in autograd; the values are in the quantized rows."""

    @staticmethod
    def forward(ctx: Any, tokens_PD: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return tokens_PD.new_empty(1).expand(len(order.slot_of_row_N), tokens_PD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return sum_of_rows(grad_RD, ctx.order), None


class _SumRows(Function):
    """``sum_rows`` whose gradients are quantized before they are copied; the copies remember their quantized rows."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order: RowOrder, backend: Backend | None) -> Tensor:
        ctx.order, ctx.backend = order, backend
        return sum_of_rows(rows_RD, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        quantized_PD, grad_RD = quantize_rows_once(grad_PD, ctx.backend), gather_rows(grad_PD, ctx.order)
        remember_rows(grad_RD, gather_quantized(quantized_PD, ctx.order))
        return grad_RD, None, None
