"""A linear layer in FP8 with autograd (DeepSeek-V3, arXiv 2412.19437, sections 3.3.1 to 3.3.3).

All three products take FP8. Only the weight, and the input in FP8, are kept for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.fp8.backend import Backend
from moefoundry.ops.fp8.formats import Format, QuantizedTensor, Tile
from moefoundry.ops.fp8.gemm import fprop, wgrad
from moefoundry.ops.fp8.quantization import dequantize, quantize, quantize_columns, quantize_rows_once, retile
from moefoundry.ops.fp8.weights import KeptBlocks, blocks_for_dgrad, blocks_for_fprop
from moefoundry.ops.wide_linear import gradients, multiply_and_return, or_as_it_came


@torch.compiler.disable
def fp8_linear(
    x: Tensor,
    weight_OI: Tensor,
    kept: Format = Format.E4M3,
    backend: Backend | None = None,
    blocks: KeptBlocks | None = None,
) -> Tensor:
    """Compute ``x @ weight.T``, [..., O], in the dtype of ``x``; Wgrad sums in fp32 and gives the weight's dtype.

    Args:
        x: [..., I], float32, bfloat16 or float16.
        weight_OI: Weight in the layout of ``nn.Linear``; quantized in blocks of 128x128.
        kept: Format in which the input is kept for Wgrad: E4M3, the rows that Fprop takes, which layers with the same
            input share; or E5M6 (for the layer after attention).
        backend: The backend to use; None chooses by device.
        blocks: Keeps the quantized weight; None quantizes it in each pass.
    """
    if not torch.is_grad_enabled():
        kept = Format.E4M3  # Fprop needs those rows anyway
    return _Linear.apply(x, weight_OI, quantize_rows_once(x, backend), kept, backend, blocks)


@torch.compiler.disable
def fp8_kept_linear(x_RI: Tensor, weight_OI: Tensor, backend: Backend | None = None) -> tuple[Tensor, Tensor]:
    """Compute :func:`~moefoundry.ops.wide_linear.wide_linear`, and keep its input as E4M3 rows for backward.

    Layers with the same input share the rows. Only the weight's gradient is computed from rounded values.
    """
    return or_as_it_came(_KeptLinear.apply(x_RI, weight_OI, quantize_rows_once(x_RI, backend), backend), x_RI)


@torch.compiler.disable
def fp8_frozen_grouped_linear(
    rows_RI: Tensor,
    weight_EOI: Tensor,
    tokens_per_expert_E: Tensor,
    backend: Backend | None = None,
    blocks: KeptBlocks | None = None,
    name: str = "weight",
) -> Tensor:
    """Compute :func:`~moefoundry.ops.grouped_linear.grouped_linear` of weights that do not train.

    Only the weights are kept for backward.

    Args:
        rows_RI: [R, I], float32, bfloat16 or float16, in the order of their experts.
        weight_EOI: Weights in the layout of ``nn.Linear``; they get no gradient.
        tokens_per_expert_E: int64 [E]; sums to R.
        backend: The backend to use; None chooses by device.
        blocks: Keeps the quantized weights; None quantizes them in each pass.
        name: Name of these weights in ``blocks``.
    """
    return _FrozenGroups.apply(rows_RI, weight_EOI, tokens_per_expert_E, backend, blocks, name)


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        rows_RI: QuantizedTensor,
        kept: Format,
        backend: Backend | None,
        blocks: KeptBlocks | None,
    ) -> Tensor:
        weight = blocks_for_fprop(weight_OI, blocks, "weight", backend)
        out_RO = fprop(rows_RI, weight, None, x.dtype, backend)
        if ctx.needs_input_grad[1] and kept is not Format.E4M3:
            rows_RI = quantize(x.reshape(rows_RI.shape), Tile.ROW, kept, backend=backend)
        ctx.save_for_backward(weight_OI, *(rows_RI.tensors if ctx.needs_input_grad[1] else ()))
        ctx.kept, ctx.shape, ctx.backend, ctx.blocks = kept, rows_RI.shape, backend, blocks
        return out_RO.view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        weight_OI, *tensors = ctx.saved_tensors
        grad_RO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight_OI = None
        if ctx.needs_input_grad[0]:
            weight_IO = blocks_for_dgrad(weight_OI, ctx.blocks, "weight", ctx.backend)
            grad_rows = quantize(grad_RO, Tile.ROW, backend=ctx.backend)
            grad_x_RI = fprop(grad_rows, weight_IO, None, grad.dtype, ctx.backend)
            grad_x = grad_x_RI.view(*grad.shape[:-1], weight_OI.shape[1])
        if ctx.needs_input_grad[1]:
            values, scales = tensors
            kept = QuantizedTensor(values, scales, Tile.ROW, ctx.shape, ctx.kept)
            x_columns = retile(kept, backend=ctx.backend)
            grad_columns = quantize_columns(grad_RO, backend=ctx.backend)
            grad_weight_OI = wgrad(grad_columns, x_columns, weight_OI.dtype, ctx.backend)
        return grad_x, grad_weight_OI, None, None, None, None


class _KeptLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, x_RI: Tensor, weight_OI: Tensor, rows_RI: QuantizedTensor, backend: Backend | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight_OI, *rows_RI.tensors)
        ctx.shape, ctx.dtype, ctx.backend = rows_RI.shape, x_RI.dtype, backend
        return multiply_and_return(ctx, x_RI, weight_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor, other_RI: Tensor | None = None) -> tuple[Tensor, Tensor, None, None]:
        weight_OI, values, scales = ctx.saved_tensors
        x_RI = dequantize(QuantizedTensor(values, scales, Tile.ROW, ctx.shape), ctx.dtype, ctx.backend)
        return *gradients(grad_RO, x_RI, weight_OI, other_RI), None, None


class _FrozenGroups(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RI: Tensor,
        weight_EOI: Tensor,
        counts_E: Tensor,
        backend: Backend | None,
        blocks: KeptBlocks | None,
        name: str,
    ) -> Tensor:
        ctx.save_for_backward(weight_EOI, counts_E)
        ctx.backend, ctx.blocks, ctx.name = backend, blocks, name
        weight = blocks_for_fprop(weight_EOI, blocks, name, backend)
        return fprop(quantize_rows_once(rows_RI, backend), weight, counts_E, rows_RI.dtype, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        weight_EOI, counts_E = ctx.saved_tensors
        weight_EIO = blocks_for_dgrad(weight_EOI, ctx.blocks, ctx.name, ctx.backend)
        grad_rows = quantize(grad_RO.contiguous(), Tile.ROW, backend=ctx.backend)
        grad_rows_RI = fprop(grad_rows, weight_EIO, counts_E, grad_RO.dtype, ctx.backend)
        return grad_rows_RI, None, None, None, None, None
