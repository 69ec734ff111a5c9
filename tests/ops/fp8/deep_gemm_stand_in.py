"""A stand-in for the package ``deep_gemm``: the signature and demands of sgl-deep-gemm 0.2.5 on compute capability 9.0.

A demand that is not met is an assertion. Like the kernel, it looks at the first row of each tile for the expert.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

TILE = 128


def get_mk_alignment_for_contiguous_layout() -> int:
    return TILE


def m_grouped_fp8_gemm_nt_contiguous(
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    d: Tensor,
    grouped_layout: Tensor,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
    epilogue: Any = None,
) -> None:
    (values, scales), (weights, weight_scales) = a, b
    (rows, inner), (groups, columns, inner_of_weights) = values.shape, weights.shape
    tiles = -(-inner // TILE)
    assert values.dtype == weights.dtype == torch.float8_e4m3fn
    assert values.is_contiguous(), "K is last, and whole"
    assert weights.is_contiguous(), "K is last, and whole"
    assert inner == inner_of_weights
    assert inner % 16 == columns % 8 == 0, "strides of TMA are multiples of 16 bytes"
    assert d.shape == (rows, columns)
    assert d.dtype == torch.bfloat16
    assert d.is_contiguous()
    assert grouped_layout.shape == (rows,)
    assert grouped_layout.dtype == torch.int32
    assert grouped_layout.is_contiguous()
    assert scales.dtype == weight_scales.dtype == torch.float32
    assert scales.shape == (rows, tiles)
    assert scales.stride() == (1, -(-rows // 4) * 4), "rows first, as TMA reads them, or it copies them"
    assert weight_scales.shape == (groups, -(-columns // TILE), tiles)
    assert weight_scales.stride(0) == weight_scales.shape[1] * tiles
    assert weight_scales.is_contiguous() or weight_scales.mT.is_contiguous()
    d.fill_(torch.nan)  # what no tile writes
    for start in range(0, rows, TILE):
        part = slice(start, start + TILE)
        expert = int(grouped_layout[start])
        assert set(grouped_layout[part].tolist()) <= {expert, -1}, "a tile is of one expert"
        if expert >= 0:
            of_columns = weight_scales[expert].repeat_interleave(TILE, 0)[:columns]
            total = torch.zeros(len(values[part]), columns)
            for k in range(tiles):
                inside = slice(k * TILE, (k + 1) * TILE)
                product = values[part, inside].float() @ weights[expert, :, inside].float().T
                total += product * scales[part, k, None] * of_columns[:, k]
            d[part] = total


def package() -> ModuleType:
    """Make the module that ``import deep_gemm`` is to find."""
    module = ModuleType("deep_gemm")
    module.__spec__ = ModuleSpec("deep_gemm", None)
    for function in (get_mk_alignment_for_contiguous_layout, m_grouped_fp8_gemm_nt_contiguous):
        setattr(module, function.__name__, function)
    return module
