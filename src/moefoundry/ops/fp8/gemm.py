"""The matrix products of a linear layer in FP8, each by the implementation that its device needs.

    Fprop   Y  = X W^T     X in ROW tiles, W in BLOCK tiles    K = I
    Dgrad   dX = dY W      dY in ROW tiles, the same W         K = O
    Wgrad   dW = dY^T X    both in COLUMN tiles                K = the tokens

With groups, rows of group 0 come first, then those of group 1, ..., and every group has its own weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefoundry.ops.fp8.backend import GEMM_CAPABILITY, Backend, choose_backend
from moefoundry.ops.fp8.deep_gemm import multiply_deep_gemm
from moefoundry.ops.fp8.formats import Format, QuantizedTensor, Tile
from moefoundry.ops.fp8.gemm_reference import multiply_reference, wgrad_reference


def fprop(
    x_RI: QuantizedTensor,
    weight: QuantizedTensor,
    group_sizes_E: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
) -> Tensor:
    """Compute ``x @ weight.T``, [R, O].

    Args:
        x_RI: [R, I], E4M3 in ``ROW`` tiles.
        weight: [O, I] in ``BLOCK`` tiles; [E, O, I] with groups.
        group_sizes_E: int64 [E], sums to R; None multiplies all rows by one weight. DeepGEMM needs multiples of 128.
        dtype: Dtype of the result, bfloat16 or float32; sums are always float32.
        backend: The backend to use; None chooses by device.

    Raises:
        ValueError: A tile, format or shape is wrong, or the backend cannot run.
    """
    _check_operand(x_RI, Tile.ROW)
    _check_operand(weight, Tile.BLOCK)
    groups = () if group_sizes_E is None else (len(group_sizes_E),)
    if weight.shape[:-2] != groups or weight.shape[-1] != x_RI.shape[-1]:
        raise ValueError(f"x {x_RI.shape} and weight {weight.shape} do not fit with groups {groups}")
    backend = choose_backend(x_RI.values.device, GEMM_CAPABILITY, backend, grouped=group_sizes_E is not None)
    return _multiply(*x_RI.tensors, *weight.tensors, group_sizes_E, dtype, backend)


def dgrad(
    grad_RO: QuantizedTensor,
    weight: QuantizedTensor,
    group_sizes_E: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
) -> Tensor:
    """Compute ``grad @ weight``, [R, I]: :func:`fprop` with the transposed weight, which has the same blocks."""
    return fprop(grad_RO, weight.mT, group_sizes_E, dtype, backend)


def wgrad(
    grad_RO: QuantizedTensor,
    x_RI: QuantizedTensor,
    dtype: torch.dtype = torch.float32,
    backend: Backend | None = None,
) -> Tensor:
    """Compute ``grad.T @ x``, [O, I], or [E, O, I] with groups; exactly zero for a group without rows.

    Args:
        grad_RO: [R, O], in ``COLUMN`` tiles.
        x_RI: [R, I], in ``COLUMN`` tiles, with the same groups.
        dtype: Dtype of the result, bfloat16 or float32; sums are always float32.
        backend: The backend to use; None chooses by device.

    Raises:
        ValueError: A tile or shape is wrong, or the backend cannot run.
    """
    _check_operand(grad_RO, Tile.COLUMN)
    _check_operand(x_RI, Tile.COLUMN)
    if grad_RO.shape[0] != x_RI.shape[0] or grad_RO.values.shape[1] != x_RI.values.shape[1]:
        raise ValueError(f"grad {grad_RO.shape} and x {x_RI.shape} differ in their rows or groups")
    if choose_backend(x_RI.values.device, GEMM_CAPABILITY, backend) is Backend.REFERENCE:
        return wgrad_reference(grad_RO, x_RI, dtype)
    from moefoundry.ops.fp8.triton_gemm import wgrad_triton

    return wgrad_triton(grad_RO, x_RI, dtype)


@torch.library.custom_op("moefoundry::fp8_multiply", mutates_args=())
def _multiply(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    group_sizes: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Compute :func:`fprop` as a torch operator, so that selective activation checkpointing can keep its result."""
    x_RK = QuantizedTensor(x, x_scales, Tile.ROW, tuple(x.shape))
    weights = QuantizedTensor(weight, weight_scales, Tile.BLOCK, tuple(weight.shape))
    if backend == Backend.REFERENCE:
        return multiply_reference(x_RK, weights, group_sizes, dtype)
    if backend == Backend.DEEPGEMM and group_sizes is not None:
        return multiply_deep_gemm(x_RK, weights, group_sizes, dtype)
    from moefoundry.ops.fp8.triton_gemm import multiply_triton

    return multiply_triton(x_RK, weights, group_sizes, dtype)


MULTIPLY_OP = torch.ops.moefoundry.fp8_multiply.default
"""The operator of Fprop and Dgrad, for selective activation checkpointing."""


def _check_operand(x: QuantizedTensor, tile: Tile) -> None:
    if x.tile is not tile or x.format is not Format.E4M3 or (tile is not Tile.BLOCK and len(x.shape) != 2):
        raise ValueError(f"expected E4M3 in {tile.name} tiles, got {x.format.name} {x.shape} in {x.tile.name} tiles")
