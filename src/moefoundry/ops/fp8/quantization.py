"""Quantize, dequantize and change tiles, each by the implementation that its device needs."""

from __future__ import annotations

import torch
from torch import Tensor

from moefoundry.ops.fp8.backend import QUANTIZER_CAPABILITY, Backend, choose_backend
from moefoundry.ops.fp8.formats import Format, QuantizedTensor, Scaling, Tile
from moefoundry.ops.fp8.reference import (
    dequantize_reference,
    quantize_columns_reference,
    quantize_reference,
    quantize_transposed_reference,
    retile_reference,
)


def quantize(
    x: Tensor,
    tile: Tile,
    format: Format = Format.E4M3,
    scaling: Scaling = Scaling.POWER_OF_TWO,
    backend: Backend | None = None,
) -> QuantizedTensor:
    """Round ``x`` to small floats, scaled tile by tile to their own absolute maximum.

    Args:
        x: [..., R, C], float32, bfloat16 or float16, any R and C; leading dimensions count matrices.
        tile: ``ROW`` or ``BLOCK``.
        format: E4M3; or E5M6, with ``ROW`` tiles.
        scaling: Kind of scales. See ``scales.py`` for tiles that are zero, tiny, or not finite.
        backend: The backend to use; None chooses by device.

    Raises:
        ValueError: The dtype, tile or format is another one, or the backend cannot run.
    """
    _check_float(x)
    if x.dim() < 2:
        raise ValueError(f"quantize takes [..., R, C], got shape {tuple(x.shape)}")
    if tile is Tile.COLUMN:
        raise ValueError("COLUMN tiles are laid out by groups; use quantize_columns")
    if format is Format.E5M6 and tile is not Tile.ROW:
        raise ValueError(f"E5M6 is quantized in ROW tiles, not {tile.name}")
    if _backend(x, backend) is Backend.REFERENCE:
        return quantize_reference(x, tile, format, scaling)
    from moefoundry.ops.fp8.triton_quantize import quantize_triton

    return quantize_triton(x, tile, format, scaling)


def quantize_transposed(
    x: Tensor, scaling: Scaling = Scaling.POWER_OF_TWO, backend: Backend | None = None
) -> QuantizedTensor:
    """Quantize ``x`` [..., R, C] to E4M3 in ``BLOCK`` tiles and transpose it, [..., C, R], in one pass over memory.

    Equals ``quantize(x, Tile.BLOCK).mT``, whose bytes lie in the order of ``x``.
    """
    _check_float(x)
    if _backend(x, backend) is Backend.REFERENCE:
        return quantize_transposed_reference(x, scaling)
    from moefoundry.ops.fp8.triton_quantize import quantize_transposed_triton

    return quantize_transposed_triton(x, scaling)


def quantize_rows_once(x: Tensor, backend: Backend | None = None) -> QuantizedTensor:
    """Quantize ``x`` [..., C] to E4M3 rows [R, C], once for all layers that have this input.

    The rows are stored on the tensor object, or on the tensor that it is a view of, until it is freed or changed in
    place. Layers that keep them for backward share their memory.
    """
    shape = x.numel() // x.shape[-1], x.shape[-1]
    if x.is_inference():  # such tensors do not count changes in place
        return quantize(x.reshape(shape), Tile.ROW, backend=backend)
    memo = getattr(_whole(x), "_fp8_rows", None)
    if memo is not None and memo[0] == x._version and memo[1].shape == shape:
        return memo[1]
    rows_RC = quantize(x.detach().reshape(shape), Tile.ROW, backend=backend)
    remember_rows(x, rows_RC)
    return rows_RC


def remember_rows(x: Tensor, rows_RC: QuantizedTensor) -> None:
    """Store ``rows_RC``, which have the values of ``x``, for :func:`quantize_rows_once`."""
    if not x.is_inference():
        _whole(x)._fp8_rows = x._version, rows_RC  # type: ignore[attr-defined]


def _whole(x: Tensor) -> Tensor:
    """Find the tensor of which ``x`` is a view of all elements: FSDP gives its units new views of their inputs."""
    base = x._base
    same = base is not None and base.numel() == x.numel() and base.is_contiguous() and x.is_contiguous()
    return base if base is not None and same else x


def quantize_columns(
    x_RC: Tensor,
    group_sizes_E: Tensor | None = None,
    scaling: Scaling = Scaling.POWER_OF_TWO,
    backend: Backend | None = None,
) -> QuantizedTensor:
    """Quantize an operand of Wgrad: E4M3 in ``COLUMN`` tiles, stored transposed.

    Args:
        x_RC: [R, C], float32, bfloat16 or float16.
        group_sizes_E: int64 [E] on the same device, sums to R; each group begins on a new tile. None is one group.
        scaling: Kind of scales.
        backend: The backend to use; None chooses by device.

    Raises:
        ValueError: The dtype or shape is another one, or the backend cannot run.
    """
    _check_float(x_RC)
    if x_RC.dim() != 2:
        raise ValueError(f"quantize_columns takes [R, C], got shape {tuple(x_RC.shape)}")
    if _backend(x_RC, backend) is Backend.REFERENCE:
        return quantize_columns_reference(x_RC, group_sizes_E, scaling)
    from moefoundry.ops.fp8.triton_quantize import quantize_columns_triton

    return quantize_columns_triton(x_RC, group_sizes_E, scaling)


def dequantize(x: QuantizedTensor, dtype: torch.dtype = torch.float32, backend: Backend | None = None) -> Tensor:
    """Compute the numbers of ``x``, in its own shape.

    With power-of-two scales, they are exact in bfloat16 and float32.

    Raises:
        ValueError: The backend cannot run. There is no kernel for ``COLUMN`` tiles, which only tests read.
    """
    if x.tile is Tile.COLUMN and backend is Backend.TRITON:
        raise ValueError("there is no kernel that dequantizes COLUMN tiles; use backend reference")
    if x.tile is Tile.COLUMN or _backend(x.values, backend) is Backend.REFERENCE:
        return dequantize_reference(x, dtype)
    from moefoundry.ops.fp8.triton_quantize import dequantize_triton

    return dequantize_triton(x, dtype)


def retile(
    x: QuantizedTensor,
    group_sizes_E: Tensor | None = None,
    scaling: Scaling = Scaling.POWER_OF_TWO,
    backend: Backend | None = None,
) -> QuantizedTensor:
    """Turn rows kept from Fprop into an operand of Wgrad: dequantize, transpose, quantize (DeepSeek-V3, section 3.5).

    With power-of-two scales, only values that become subnormal are rounded again.

    Args:
        x: [R, C] in ``ROW`` tiles, E4M3 or E5M6; the result is E4M3.
        group_sizes_E: As for :func:`quantize_columns`.
        scaling: Kind of scales of the result.
        backend: The backend to use; None chooses by device.

    Raises:
        ValueError: The tiles or the shape are wrong, or the backend cannot run.
    """
    if x.tile is not Tile.ROW or len(x.shape) != 2:
        raise ValueError(f"retile takes [R, C] in ROW tiles, got {x.shape} in {x.tile.name} tiles")
    if _backend(x.values, backend) is Backend.REFERENCE:
        return retile_reference(x, group_sizes_E, scaling)
    from moefoundry.ops.fp8.triton_quantize import retile_triton

    return retile_triton(x, group_sizes_E, scaling)


def _check_float(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"only float32, bfloat16 and float16 can be quantized, not {x.dtype}")


def _backend(x: Tensor, asked: Backend | None) -> Backend:
    return choose_backend(x.device, QUANTIZER_CAPABILITY, asked)
