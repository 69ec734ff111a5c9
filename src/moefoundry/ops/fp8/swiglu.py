"""SwiGLU between two FP8 products: its results leave as FP8 rows and columns, not as wide tensors.

The definitions are :mod:`moefoundry.ops.swiglu` and the quantizers, one after the other. The kernels read each operand
once, round to the operands' dtype where the definitions store a tensor, and quantize what they have in registers. They
differ from the definitions by the last bit of an exponential.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moefoundry.ops.fp8.backend import QUANTIZER_CAPABILITY, Backend, choose_backend
from moefoundry.ops.fp8.formats import QuantizedTensor, Tile
from moefoundry.ops.fp8.quantization import dequantize, quantize, quantize_columns
from moefoundry.ops.swiglu import PLAIN, Activation, swiglu, swiglu_backward


class Forward(NamedTuple):
    """Results of :func:`swiglu_forward`, E4M3 [R, F] in ``ROW`` tiles.

    Attributes:
        hidden: Weighted SwiGLU, the operand of the down projection.
        kept: The two inputs, for the backward pass; empty if they are not wanted.
    """

    hidden: QuantizedTensor
    kept: tuple[QuantizedTensor, ...]


class Backward(NamedTuple):
    """Results of :func:`swiglu_backward_in_tiles`, E4M3 [R, F].

    Attributes:
        hidden: Weighted SwiGLU in ``COLUMN`` tiles, for the gradient of the down projection.
        rows: Gradients of gate and up in ``ROW`` tiles, for the gradient of the input.
        columns: The same in ``COLUMN`` tiles, for the gradients of the projections.
        row_weights: [R]; None without row weights.
    """

    hidden: QuantizedTensor
    rows: tuple[QuantizedTensor, QuantizedTensor]
    columns: tuple[QuantizedTensor, QuantizedTensor]
    row_weights: Tensor | None


def swiglu_forward(
    gate_RF: Tensor,
    up_RF: Tensor,
    row_weights_R: Tensor | None,
    activation: Activation = PLAIN,
    keep: bool = True,
    backend: Backend | None = None,
) -> Forward:
    """Compute ``silu(gate) * up * row_weights``, and quantize it and, with ``keep``, its inputs.

    Args:
        gate_RF: float32, bfloat16 or float16.
        up_RF: [R, F], likewise.
        row_weights_R: [R], or None.
        activation: Activation; kernels know the plain one.
        keep: Quantize the inputs.
        backend: The backend to use; None chooses by device.
    """
    if activation == PLAIN and choose_backend(gate_RF.device, QUANTIZER_CAPABILITY, backend) is Backend.TRITON:
        from moefoundry.ops.fp8.triton_swiglu import swiglu_forward_triton

        return swiglu_forward_triton(gate_RF, up_RF, row_weights_R, keep)
    kept = tuple(quantize(x, Tile.ROW, backend=backend) for x in (gate_RF, up_RF)) if keep else ()
    hidden_RF = swiglu(gate_RF, up_RF, row_weights_R, activation)
    return Forward(quantize(hidden_RF, Tile.ROW, backend=backend), kept)


def fuses_backward(grad_RF: Tensor, activation: Activation, backend: Backend | None = None) -> bool:
    """Tell if :func:`swiglu_backward_in_tiles` has a kernel for this."""
    return activation == PLAIN and choose_backend(grad_RF.device, QUANTIZER_CAPABILITY, backend) is Backend.TRITON


def swiglu_backward_in_tiles(
    grad_RF: Tensor,
    kept: tuple[QuantizedTensor, QuantizedTensor],
    row_weights_R: Tensor | None,
    group_sizes_E: Tensor | None = None,
    activation: Activation = PLAIN,
    backend: Backend | None = None,
) -> Backward:
    """Compute all that the products of a backward pass take from SwiGLU.

    Args:
        grad_RF: Gradient of the weighted SwiGLU, float32, bfloat16 or float16.
        kept: Gate and up, E4M3 [R, F] in ``ROW`` tiles.
        row_weights_R: [R], or None.
        group_sizes_E: int64 [E], sums to R; None is one group.
        activation: Activation.
        backend: The backend to use; None chooses by device.
    """
    if fuses_backward(grad_RF, activation, backend):
        from moefoundry.ops.fp8.triton_swiglu import swiglu_backward_triton

        return swiglu_backward_triton(grad_RF, kept, row_weights_R, group_sizes_E)

    def columns(x: Tensor) -> QuantizedTensor:
        return quantize_columns(x, group_sizes_E, backend=backend)

    gate_RF, up_RF = (dequantize(x, grad_RF.dtype, backend) for x in kept)
    hidden = columns(swiglu(gate_RF, up_RF, row_weights_R, activation))
    grad_gate_RF, grad_up_RF, grad_weights_R = swiglu_backward(grad_RF, gate_RF, up_RF, row_weights_R, activation)
    rows = quantize(grad_gate_RF, Tile.ROW, backend=backend), quantize(grad_up_RF, Tile.ROW, backend=backend)
    return Backward(hidden, rows, (columns(grad_gate_RF), columns(grad_up_RF)), grad_weights_R)
