"""SwiGLU feed-forward networks in FP8 with autograd, one or one for each group of rows.

    h = silu(gate x) * (up x);   out = down h          (biases of gate and up, and other activations, if wanted)

Two things are kept for backward: the input, as the E4M3 rows that Fprop takes, and the two inputs of SwiGLU in E4M3;
its output is computed again (DeepSeek-V3, arXiv 2412.19437, section 3.3.3). A row's weight, if given, multiplies ``h``:
so the backward pass of the sum over a token's experts needs none of their outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer, sum_by_expert
from moefoundry.ops.fp8.backend import Backend
from moefoundry.ops.fp8.formats import QuantizedTensor, Tile
from moefoundry.ops.fp8.gemm import dgrad, fprop, wgrad
from moefoundry.ops.fp8.quantization import dequantize, quantize, quantize_columns, quantize_rows_once, retile
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
    """
    rows, keep = quantize_rows_once(x, backend) if rows is None else rows, torch.is_grad_enabled()
    return _FeedForward.apply(
        x, row_weights_R, gate, up, down, *hidden[1:], group_sizes_E, rows, keep, hidden[0], backend
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
    ) -> Tensor:
        gate_RF, up_RF = (
            fprop(x_RD, quantize(weight, Tile.BLOCK, backend=backend), group_sizes_E, x.dtype, backend)
            for weight in (gate, up)
        )
        if gate_bias_EF is not None and up_bias_EF is not None and group_sizes_E is not None:
            gate_RF, up_RF = (  # not in place: selective checkpointing may have kept the products
                out + bias.repeat_interleave(group_sizes_E, dim=0, output_size=len(out))
                for out, bias in ((gate_RF, gate_bias_EF), (up_RF, up_bias_EF))
            )
        kept = [x_RD]
        if keep:
            kept += [quantize(gate_RF, Tile.ROW, backend=backend), quantize(up_RF, Tile.ROW, backend=backend)]
        hidden = quantize(swiglu(gate_RF, up_RF, row_weights_R, activation), Tile.ROW, backend=backend)
        out_RD = fprop(hidden, quantize(down, Tile.BLOCK, backend=backend), group_sizes_E, x.dtype, backend)
        tensors = [tensor for quantized in kept for tensor in quantized.tensors]
        ctx.save_for_backward(row_weights_R, gate, up, down, group_sizes_E, *tensors)
        ctx.shapes, ctx.activation, ctx.backend = [quantized.shape for quantized in kept], activation, backend
        return out_RD if out_RD.shape == x.shape else out_RD.view(x.shape)  # FSDP warns of views

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        row_weights_R, gate, up, down, group_sizes_E, *tensors = ctx.saved_tensors
        backend, grad_RD = ctx.backend, grad.reshape(-1, grad.shape[-1])
        x_RD, *swiglu_inputs = (
            QuantizedTensor(*pair, Tile.ROW, shape)
            for pair, shape in zip(zip(tensors[::2], tensors[1::2], strict=True), ctx.shapes, strict=True)
        )
        gate_RF, up_RF = (dequantize(x, grad.dtype, backend) for x in swiglu_inputs)

        def rows(x: Tensor) -> QuantizedTensor:
            return quantize(x, Tile.ROW, backend=backend)

        def back(rows: QuantizedTensor, weight: Tensor) -> Tensor:
            return dgrad(rows, quantize(weight, Tile.BLOCK, backend=backend), group_sizes_E, grad.dtype, backend)

        def columns(x: Tensor) -> QuantizedTensor:
            return quantize_columns(x, group_sizes_E, backend=backend)

        grad_gate = grad_up = grad_down = None
        if ctx.needs_input_grad[4]:
            hidden = columns(swiglu(gate_RF, up_RF, row_weights_R, ctx.activation))
            grad_down = wgrad(columns(grad_RD), hidden, down.dtype, backend)
        grad_hidden_RF = back(quantize_rows_once(grad_RD, backend), down)  # they may have come in FP8
        grad_gate_RF, grad_up_RF, grad_row_weights_R = swiglu_backward(
            grad_hidden_RF, gate_RF, up_RF, row_weights_R, ctx.activation
        )
        grad_biases = [
            sum_by_expert(grad, group_sizes_E) if needed else None
            for grad, needed in zip((grad_gate_RF, grad_up_RF), ctx.needs_input_grad[5:7], strict=True)
        ]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = back(rows(grad_gate_RF), gate).add_(back(rows(grad_up_RF), up)).view(grad.shape)
        if ctx.needs_input_grad[2]:  # and up's, which trains where gate does
            x_columns = retile(x_RD, group_sizes_E, backend=backend)
            grad_gate, grad_up = (
                wgrad(columns(grad), x_columns, weight.dtype, backend)
                for grad, weight in ((grad_gate_RF, gate), (grad_up_RF, up))
            )
        grads = grad_x, grad_row_weights_R, grad_gate, grad_up, grad_down, *grad_biases
        return *grads, None, None, None, None, None
