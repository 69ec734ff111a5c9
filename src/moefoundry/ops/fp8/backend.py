"""Choice between implementations: plain PyTorch anywhere, Triton kernels on NVIDIA GPUs, DeepGEMM by name.

In Triton's interpreter (``TRITON_INTERPRET=1`` before the first import of triton) kernels also run on a CPU, slowly;
there they are used only if they are asked for by name.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from importlib.util import find_spec

import torch

from moefoundry.ops.fp8 import deep_gemm

QUANTIZER_CAPABILITY = (8, 0)  # BF16
GEMM_CAPABILITY = (8, 9)  # tensor cores that take FP8


class Backend(StrEnum):
    """An implementation."""

    REFERENCE = "reference"
    TRITON = "triton"
    DEEPGEMM = "deepgemm"  # grouped products alone


def choose_backend(
    device: torch.device, capability: tuple[int, int], asked: Backend | None = None, grouped: bool = False
) -> Backend:
    """Choose Triton if it can run on ``device``, unless a backend is asked for.

    Args:
        device: Device of the operands.
        capability: Compute capability that the kernel needs.
        asked: The backend to use, or None.
        grouped: It is for Fprop or Dgrad with groups; for all else DeepGEMM is as None.

    Raises:
        ValueError: The backend that is asked for cannot run; the message says why.
    """
    if asked is Backend.DEEPGEMM and grouped:
        if found := deep_gemm.obstacle(device):
            raise ValueError(f"backend deepgemm cannot run: {found}; use backend triton")
        return asked
    if asked is Backend.DEEPGEMM:
        asked = None
    if asked is Backend.REFERENCE:
        return asked
    obstacle = _obstacle(device, capability, interpret=asked is Backend.TRITON)
    if asked is Backend.TRITON and obstacle:
        raise ValueError(f"backend triton cannot run: {obstacle}; use backend reference")
    return Backend.REFERENCE if obstacle else Backend.TRITON


def describe_backend(device: torch.device, capability: tuple[int, int], asked: Backend | None = None) -> str:
    """Name the choice of :func:`choose_backend`, and the reason if Triton was possible to choose but cannot run."""
    backend = choose_backend(device, capability, asked, grouped=True)
    if backend is asked or backend is Backend.TRITON:
        return backend
    return f"{backend} ({_obstacle(device, capability, interpret=False)})"


@cache
def _obstacle(device: torch.device, capability: tuple[int, int], interpret: bool) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        return None if interpret and _interpreted() else f"its kernels need a CUDA device, not {device}"
    if torch.version.hip is not None:
        return "its kernels are made for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < capability:
        return f"its kernels need compute capability {capability}, not {torch.cuda.get_device_capability(device)}"
    return None


def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
