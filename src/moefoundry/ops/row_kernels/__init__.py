"""Triton kernels that read each row of a matrix once: RMSNorm, rotation of heads, softmax of the output logits.

PyTorch computes each of these by up to a dozen operators, in fp32 copies of narrow inputs. The kernels load narrow
values, compute in fp32 and store narrow ones. They equal the operators to the rounding of their dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moefoundry.ops.fp8.backend import QUANTIZER_CAPABILITY, Backend, choose_backend
from moefoundry.ops.kernel_choice import NARROW, fused_kernels

if TYPE_CHECKING:
    from types import ModuleType


def row_kernels(x: Tensor) -> ModuleType | None:
    """Give the module of functions over the kernels if they are chosen and take ``x``: narrow, and on an NVIDIA GPU.

    Compiled code gets None: the compiler fuses the operators itself.
    """
    if x.dtype not in NARROW or torch.compiler.is_compiling():
        return None
    if not fused_kernels() or choose_backend(x.device, QUANTIZER_CAPABILITY) is not Backend.TRITON:
        return None
    from moefoundry.ops.row_kernels import function

    return function
