"""Checks of GPUs, their driver and NCCL, through torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moefoundry.doctor.finding import Finding, Status, graded

GIB = 2**30
DRIVER = Path("/proc/driver/nvidia/version")


def device_checks() -> Iterator[Finding]:
    """Check the accelerators of this host."""
    try:
        import torch
    except (ImportError, OSError) as error:
        text = " ".join(str(error).split())
        yield Finding("torch", Status.error, f"cannot be imported: {text}", "make setup installs one that can")
        return
    if not torch.cuda.is_available():
        text = f"none that torch {torch.__version__} can use; training runs on the CPU"
        remedy = f"there is a driver (torch was built for CUDA {torch.version.cuda}); compare it with nvidia-smi"
        yield graded("GPU", text, (DRIVER.exists(), Status.error, remedy))
        return
    yield from _gpus()
    yield _driver()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("NCCL", Status.ok, f"{nccl}, built into torch {torch.__version__}")


def _gpus() -> Iterator[Finding]:
    """Check each GPU; others' processes leave less memory."""
    import torch

    kinds = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        kind = f"sm_{properties.major}{properties.minor}"
        text = f"{properties.name}, {kind}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        built = any(int(each.removeprefix("sm_").rstrip("af")) // 10 == properties.major for each in _numbered(kinds))
        yield graded(
            f"GPU {index}",
            text,
            (not built, Status.error, f"torch was built for {', '.join(kinds)}; install one that has {kind}"),
            (free < 0.9 * total, Status.warning, "another process uses it: nvidia-smi names it"),
        )


def _numbered(kinds: list[str]) -> list[str]:
    return [kind for kind in kinds if kind.startswith("sm_")]


def _driver() -> Finding:
    """Compare the driver's CUDA with torch's."""
    import torch

    number: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    driver = f"{number // 1000}.{number % 1000 // 10}"
    built = torch.version.cuda or "0.0"
    text = f"CUDA {driver} by the driver, torch was built for {built}"
    older = number // 1000 < int(built.partition(".")[0])
    return graded("driver", text, (older, Status.warning, f"a driver for CUDA {built} or later is safer; update it"))
