"""The grouped products by DeepGEMM (the package ``deep_gemm``): ``precision.fp8.backend: deepgemm``.

Fprop and Dgrad are ``m_grouped_fp8_gemm_nt_contiguous``: 1x128 tiles of rows by 128x128 blocks of weights, both with K
last, fp32 scales, sums promoted to fp32 after every 128 of K, results in BF16. Scales of rows are given as it copies
them, rows first. All else, linear layers without groups among it, is computed as without it:

- Wgrad. ``k_grouped_fp8_gemm_nt_contiguous`` takes the rows of each group from the host, which would have to wait.
- Quantization.

A tile of 128 rows must be of one expert. So rows are laid out in whole tiles from the beginning (:func:`in_tiles`), and
nothing is copied for a product. Every step between the products has up to 127 E rows more than there are slots: how
many are needed only the device knows, and the host takes the bound.

Written against the public interface of DeepGEMM, and tested with a stand-in for it; it has not run on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moefoundry.ops.fp8.formats import QuantizedTensor
from moefoundry.ops.fp8.scales import scale_values
from moefoundry.ops.permute import RowOrder, pad_order
from moefoundry.ops.sizes import TILE

PACKAGE, PRODUCT = "deep_gemm", "m_grouped_fp8_gemm_nt_contiguous"
MAJOR = 9
"""First number of the compute capability whose layout of scales this is."""
ALIGNMENT = 16
"""Values of a whole number of 16 bytes, which a row must have."""


@cache
def obstacle(device: torch.device) -> str:
    """Say why DeepGEMM cannot multiply on ``device``; empty if it can."""
    if device.type != "cuda":
        return f"it needs an NVIDIA GPU, not {device}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] != MAJOR:
        return f"it is for compute capability {MAJOR}.x, not {torch.cuda.get_device_capability(device)}"
    return missing()


def missing() -> str:
    """Say why the package cannot be used; empty if it can."""
    if importlib.util.find_spec(PACKAGE) is None:
        return f"the package {PACKAGE} is not installed"
    try:
        library = importlib.import_module(PACKAGE)
        if not hasattr(library, PRODUCT):
            return f"the package {PACKAGE} has no {PRODUCT}: another version of it is needed"
        alignment = library.get_mk_alignment_for_contiguous_layout()
    except Exception as error:  # it looks for CUDA's compiler while it is imported
        return f"the package {PACKAGE} does not load: {type(error).__name__}: {error}"
    return f"its groups begin at multiples of {alignment} rows, not {TILE}" if TILE % alignment else ""


def in_tiles(order: RowOrder, num_tokens: int) -> RowOrder:
    """Lay rows out in whole tiles, each of one expert, as :func:`~moefoundry.ops.permute.pad_order` does.

    Rows that are left over belong to the last expert, so that the sizes of the groups sum to the number of rows.
    """
    padded = pad_order(order, num_tokens, TILE)
    sizes_E = padded.tokens_per_expert_E.clone()
    sizes_E[-1] += len(padded.slot_of_row_N) - sizes_E.sum()
    return replace(padded, tokens_per_expert_E=sizes_E)


def multiply_deep_gemm(
    x: QuantizedTensor, weight: QuantizedTensor, group_sizes_E: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute :func:`moefoundry.ops.fp8.fprop` of groups in whole tiles.

    A transposed weight is copied, if its bytes are not transposed, too.

    Raises:
        ValueError: A width or the dtype of the result is not DeepGEMM's.
    """
    (rows, inner), columns = x.shape, weight.shape[-2]
    if inner % ALIGNMENT or columns % ALIGNMENT:
        raise ValueError(f"backend deepgemm needs widths that are multiples of {ALIGNMENT}, not {inner} and {columns}")
    if dtype != torch.bfloat16:
        raise ValueError(f"backend deepgemm gives bfloat16, not {dtype}; use backend triton")
    out = torch.empty(rows, columns, dtype=dtype, device=x.values.device)
    if not out.numel():
        return out
    x_scales = torch.empty(x.scales.shape[::-1], dtype=torch.float32, device=out.device).mT
    x_scales.copy_(scale_values(x.scales))
    experts_E = torch.arange(len(group_sizes_E), dtype=torch.int32, device=out.device)
    library: Any = importlib.import_module(PACKAGE)
    getattr(library, PRODUCT)(
        (x.values.contiguous(), x_scales),
        (weight.values.contiguous(), scale_values(weight.scales)),
        out,
        experts_E.repeat_interleave(group_sizes_E, output_size=rows),
    )
    return out
