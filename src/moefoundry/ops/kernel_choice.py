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


def kernels_run(device: torch.device) -> bool:
    """Tell whether these kernels are chosen, and run on ``device``: NVIDIA GPUs with BF16.

    Code that is being compiled has none of them, but for those in operators of its own: the compiler fuses the rest.
    """
    return _fused and not torch.compiler.is_compiling() and _can_run(device)


def _can_run(device: torch.device) -> bool:
    from moefoundry.ops.fp8.backend import QUANTIZER_CAPABILITY, Backend, choose_backend  # FP8 imports users of this

    return choose_backend(device, QUANTIZER_CAPABILITY) is Backend.TRITON
