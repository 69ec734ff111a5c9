"""SwiGLU feed-forward networks in FP8 with autograd, one or one for each group of rows.

    h = silu(gate x) * (up x);   out = down h          (biases of gate and up, and other activations, if wanted)

Two things are kept for backward: the input, as the E4M3 rows that Fprop takes, and the two inputs of SwiGLU in E4M3;
its output is computed again (DeepSeek-V3, arXiv 2412.19437, section 3.3.3). A row's weight, if given, multiplies ``h``:
so the backward pass of the sum over a token's experts needs none of their outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer, sum_by_expert
from moefoundry.ops.fp8.backend import Backend
from moefoundry.ops.fp8.formats import QuantizedTensor, Tile
from moefoundry.ops.fp8.gemm import fprop, wgrad
from moefoundry.ops.fp8.quantization import dequantize, quantize, quantize_columns, quantize_rows_once, retile
from moefoundry.ops.fp8.swiglu import fuses_backward, swiglu_backward_in_tiles, swiglu_forward
from moefoundry.ops.fp8.weights import KeptBlocks, blocks_for_dgrad, blocks_for_fprop
from moefoundry.ops.recompute import last_operand_is_there, unread
from moefoundry.ops.swiglu import Activation, swiglu, swiglu_backward


@torch.compiler.disable
def fp8_feed_forward(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    group_sizes_E: Tensor | None = None,
    row_weights_R: Tensor | None = None,
    hidden: HiddenLayer = PLAIN_LAYER,
    backend: Backend | None = None,
    rows: QuantizedTensor | None = None,
    blocks: KeptBlocks | None = None,
) -> Tensor:
    """Compute [..., D] -> [..., D], in the dtype of ``x``; Wgrad sums in fp32 and gives the weights' dtype.

    Args:
        x: [..., D]; with groups [R, D], rows of group 0 first, then those of group 1, ...
        gate: [F, D], or [E, F, D] with groups.
        up: As ``gate``.
        down: [D, F], or [E, D, F].
        group_sizes_E: int64 [E], sums to R.
        row_weights_R: [R], differentiable, weights of the rows.
        hidden: Activation, and with groups biases of gate and up.
        backend: The backend to use; None chooses by device.
        rows: ``x`` quantized to E4M3 rows [R, D]; None quantizes it.
        blocks: Keeps the quantized weights; None quantizes them in each pass.
    """
    rows, keep = quantize_rows_once(x, backend) if rows is None else rows, torch.is_grad_enabled()
    return _FeedForward.apply(
        x, row_weights_R, gate, up, down, *hidden[1:], group_sizes_E, rows, keep, hidden[0], backend, blocks
    )


class _FeedForward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_weights_R: Tensor | None,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        gate_bias_EF: Tensor | None,
        up_bias_EF: Tensor | None,
        group_sizes_E: Tensor | None,
        x_RD: QuantizedTensor,
        keep: bool,
        activation: Activation,
        backend: Backend | None,
        blocks: KeptBlocks | None,
    ) -> Tensor:
        def forth(rows: QuantizedTensor, name: str, weight: Tensor) -> Tensor:
            return fprop(rows, blocks_for_fprop(weight, blocks, name, backend), group_sizes_E, x.dtype, backend)

        gate_RF, up_RF = forth(x_RD, "gate", gate), forth(x_RD, "up", up)
        if gate_bias_EF is not None and up_bias_EF is not None and group_sizes_E is not None:
            gate_RF, up_RF = (  # not in place: selective checkpointing may have kept the products
                out + bias.repeat_interleave(group_sizes_E, dim=0, output_size=len(out))
                for out, bias in ((gate_RF, gate_bias_EF), (up_RF, up_bias_EF))
            )
        hidden, kept_of_swiglu = swiglu_forward(gate_RF, up_RF, row_weights_R, activation, keep, backend)
        kept = [x_RD, *kept_of_swiglu]
        if group_sizes_E is not None and last_operand_is_there():
            out_RD = unread(x, *x.shape)
        else:
            out_RD = forth(hidden, "down", down)
        tensors = [tensor for quantized in kept for tensor in quantized.tensors]
        ctx.save_for_backward(row_weights_R, gate, up, down, group_sizes_E, *tensors)
        ctx.shapes, ctx.activation, ctx.backend = [quantized.shape for quantized in kept], activation, backend
        ctx.blocks = blocks
        if blocks is not None and keep:
            blocks.enter()
        return out_RD if out_RD.shape == x.shape else out_RD.view(x.shape)  # FSDP warns of views

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        row_weights_R, gate, up, down, group_sizes_E, *tensors = ctx.saved_tensors
        grad_RD = grad.reshape(-1, grad.shape[-1])
        x_RD, gate_RF, up_RF = (
            QuantizedTensor(*pair, Tile.ROW, shape)
            for pair, shape in zip(zip(tensors[::2], tensors[1::2], strict=True), ctx.shapes, strict=True)
        )
        products = _Products(group_sizes_E, grad.dtype, ctx.backend, ctx.blocks)
        weights, operands = (gate, up, down), (x_RD, gate_RF, up_RF, row_weights_R)
        needed = ctx.needs_input_grad
        alone = all((needed[0], *needed[2:5])) and not any(needed[5:7])
        if alone and fuses_backward(grad_RD, ctx.activation, ctx.backend):
            grads = _backward_in_tiles(products, grad_RD, operands, weights, ctx.activation)
        else:
            grads = _backward_in_steps(products, grad_RD, operands, weights, ctx.activation, needed)
        if ctx.blocks is not None:
            ctx.blocks.leave()
        grad_x, *others = grads
        return None if grad_x is None else grad_x.view(grad.shape), *others, *[None] * 6


class _Products(NamedTuple):
    """The products of a backward pass, and what they have in common."""

    group_sizes_E: Tensor | None
    dtype: torch.dtype
    backend: Backend | None
    blocks: KeptBlocks | None

    def back(self, rows: QuantizedTensor, name: str, weight: Tensor) -> Tensor:
        weight_T = blocks_for_dgrad(weight, self.blocks, name, self.backend)
        return fprop(rows, weight_T, self.group_sizes_E, self.dtype, self.backend)

    def rows(self, x: Tensor) -> QuantizedTensor:
        return quantize(x, Tile.ROW, backend=self.backend)

    def columns(self, x: Tensor) -> QuantizedTensor:
        return quantize_columns(x, self.group_sizes_E, backend=self.backend)

    def retile(self, x: QuantizedTensor) -> QuantizedTensor:
        return retile(x, self.group_sizes_E, backend=self.backend)

    def of_weight(self, grad: QuantizedTensor, x: QuantizedTensor, weight: Tensor) -> Tensor:
        return wgrad(grad, x, weight.dtype, self.backend)


_Operands = tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor, Tensor | None]
"""Rows of the input, of gate and of up, and the rows' weights."""
_Weights = tuple[Tensor, Tensor, Tensor]


def _backward_in_tiles(
    products: _Products, grad_RD: Tensor, operands: _Operands, weights: _Weights, activation: Activation
) -> tuple[Tensor | None, ...]:
    """Compute all gradients; SwiGLU's leave its kernel in FP8."""
    x_RD, gate_RF, up_RF, row_weights_R = operands
    gate, up, down = weights
    grad_hidden_RF = products.back(quantize_rows_once(grad_RD, products.backend), "down", down)
    tiles = swiglu_backward_in_tiles(
        grad_hidden_RF, (gate_RF, up_RF), row_weights_R, products.group_sizes_E, activation, products.backend
    )
    grad_down = products.of_weight(products.columns(grad_RD), tiles.hidden, down)
    grad_x = products.back(tiles.rows[0], "gate", gate).add_(products.back(tiles.rows[1], "up", up))
    x_columns = products.retile(x_RD)
    grad_gate = products.of_weight(tiles.columns[0], x_columns, gate)
    grad_up = products.of_weight(tiles.columns[1], x_columns, up)
    return grad_x, tiles.row_weights, grad_gate, grad_up, grad_down, None, None


def _backward_in_steps(
    products: _Products,
    grad_RD: Tensor,
    operands: _Operands,
    weights: _Weights,
    activation: Activation,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Compute the gradients that are needed, one operation after the other."""
    x_RD, *swiglu_inputs, row_weights_R = operands
    gate, up, down = weights
    gate_RF, up_RF = (dequantize(x, grad_RD.dtype, products.backend) for x in swiglu_inputs)
    grad_x = grad_gate = grad_up = grad_down = None
    if needed[4]:
        hidden = products.columns(swiglu(gate_RF, up_RF, row_weights_R, activation))
        grad_down = products.of_weight(products.columns(grad_RD), hidden, down)
    grad_hidden_RF = products.back(quantize_rows_once(grad_RD, products.backend), "down", down)  # or came in FP8
    grad_gate_RF, grad_up_RF, grad_row_weights_R = swiglu_backward(
        grad_hidden_RF, gate_RF, up_RF, row_weights_R, activation
    )
    sizes_E = products.group_sizes_E
    grad_biases = [
        sum_by_expert(grad, sizes_E) if wanted and sizes_E is not None else None
        for grad, wanted in zip((grad_gate_RF, grad_up_RF), needed[5:7], strict=True)
    ]
    if needed[0]:
        grad_x = products.back(products.rows(grad_gate_RF), "gate", gate)
        grad_x.add_(products.back(products.rows(grad_up_RF), "up", up))
    if needed[2]:  # and up's, which trains where gate does
        x_columns = products.retile(x_RD)
        grad_gate = products.of_weight(products.columns(grad_gate_RF), x_columns, gate)
        grad_up = products.of_weight(products.columns(grad_up_RF), x_columns, up)
    return grad_x, grad_row_weights_R, grad_gate, grad_up, grad_down, *grad_biases
