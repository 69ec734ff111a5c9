"""Choice between PyTorch's operators and kernels that no GPU has run yet: ``fused_kernels`` of a run's recipe."""

from __future__ import annotations

import torch

NARROW = (torch.bfloat16, torch.float16)
"""Dtypes that these kernels take."""

_fused = False


def use_fused_kernels(on: bool) -> None:
    """Choose for this process, from the next forward pass on; kernels run only where they can."""
    global _fused  # one choice of a process, as torch's own of precision
    _fused = on


def fused_kernels() -> bool:
    """Tell which is chosen; operators at first."""
    return _fused
