"""Triton kernels that read each row of a matrix once: RMSNorm, rotation of heads, softmax of the output logits.

PyTorch computes each of these by up to a dozen operators, in fp32 copies of narrow inputs. The kernels load narrow
values, compute in fp32 and store narrow ones. They equal the operators to the rounding of their dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moefoundry.ops.kernel_choice import NARROW, kernels_run

if TYPE_CHECKING:
    from types import ModuleType


def row_kernels(x: Tensor) -> ModuleType | None:
    """Give the module of functions over the kernels if they take ``x``, which is narrow, and run."""
    if x.dtype not in NARROW or not kernels_run(x.device):
        return None
    from moefoundry.ops.row_kernels import function

    return function
