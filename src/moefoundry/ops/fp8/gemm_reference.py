"""The three matrix products of a linear layer in plain PyTorch: dequantize, and multiply in fp32, 128 of K at a time.

    Fprop   Y  = X W^T     X in ROW tiles, W in BLOCK tiles    K = I
    Dgrad   dX = dY W      dY in ROW tiles, the same W         K = O
    Wgrad   dW = dY^T X    both in COLUMN tiles                K = the tokens of each group

Partial sums are added in FP32 after every 128 elements of K, in the order in which kernels add them (N_C of
DeepSeek-V3, section 3.3.2). With ``tensor_cores``, a model of the hardware's accumulator computes the partial sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefoundry.ops.fp8.formats import QuantizedTensor
from moefoundry.ops.fp8.reference import dequantize_reference
from moefoundry.ops.fp8.tensor_cores import TensorCores
from moefoundry.ops.sizes import TILE


def multiply_reference(
    x: QuantizedTensor,
    weight: QuantizedTensor,
    group_sizes_E: Tensor | None,
    dtype: torch.dtype,
    tensor_cores: TensorCores | None = None,
) -> Tensor:
    """Compute :func:`moefoundry.ops.fp8.fprop`, or with the transposed weight :func:`moefoundry.ops.fp8.dgrad`."""
    rows_RK = dequantize_reference(x, torch.float32)
    weights = dequantize_reference(weight, torch.float32)
    if group_sizes_E is None:
        return _multiply(rows_RK, weights, tensor_cores).to(dtype)
    groups = rows_RK.split(group_sizes_E.tolist())
    return torch.cat([_multiply(*pair, tensor_cores) for pair in zip(groups, weights, strict=True)]).to(dtype)


def wgrad_reference(
    grad: QuantizedTensor, x: QuantizedTensor, dtype: torch.dtype, tensor_cores: TensorCores | None = None
) -> Tensor:
    """Compute :func:`moefoundry.ops.fp8.wgrad`."""
    grad_RO, x_RI = (dequantize_reference(operand, torch.float32) for operand in (grad, x))
    if x.group_sizes is None:
        return _multiply(grad_RO.T, x_RI.T, tensor_cores).to(dtype)
    sizes = x.group_sizes.tolist()
    pairs = zip(grad_RO.split(sizes), x_RI.split(sizes), strict=True)
    return torch.stack([_multiply(grad.T, x.T, tensor_cores) for grad, x in pairs]).to(dtype)


def _multiply(a_MK: Tensor, b_NK: Tensor, tensor_cores: TensorCores | None) -> Tensor:
    if tensor_cores is not None:
        return tensor_cores.multiply(a_MK, b_NK)
    total_MN = a_MK.new_zeros(len(a_MK), len(b_NK))
    for a, b in zip(a_MK.split(TILE, dim=1), b_NK.split(TILE, dim=1), strict=True):
        total_MN.addmm_(a, b.T)
    return total_MN
