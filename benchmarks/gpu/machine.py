"""What the device, its matrix products and its memory do: what other figures are held against."""

from __future__ import annotations

import importlib.metadata
import json
import platform

import torch

from benchmarks.gpu.figures import Figures, Part
from benchmarks.gpu.steps import Options
from benchmarks.gpu.timing import tflops, timed

PACKAGES = (
    *("torch", "triton", "transformers", "liger-kernel", "quack-kernels", "sgl-deep-gemm"),
    *("mosaicml", "mosaicml-streaming"),
)
PRODUCT = 8192  # M, N and K
PEAK_PART = "bf16 product"


def run(figures: Figures, options: Options) -> None:
    """Measure the machine."""
    figures.run("versions", versions, options)
    figures.run(PEAK_PART, product, options)
    figures.run("copy", copy, options)
    figures.run("gate product", gate_product, options)


def versions(part: Part, options: Options) -> None:
    """Names and versions of all that figures depend on."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    part.put(python=platform.python_version(), cuda=torch.version.cuda, **installed)
    if options.device == "cuda":
        device = torch.cuda.get_device_properties(0)
        capability = f"{device.major}.{device.minor}"
        part.put(device=device.name, capability=capability, sms=device.multi_processor_count)
        part.put(memory_bytes=device.total_memory, l2_bytes=device.L2_cache_size)
    else:
        part.put(device="cpu")


def product(part: Part, options: Options) -> None:
    """Random operands: on zeros the clock stays higher."""
    size = 128 if options.tiny else PRODUCT
    pairs = [[torch.randn(size, size, device=options.device, dtype=torch.bfloat16) for _ in range(2)] for _ in range(2)]
    time = timed([lambda a=a, b=b: a @ b for a, b in pairs], options.device, seconds=1.0)
    part.put(size=size, tflops=tflops(2 * size**3, time["ms"]), **time)


def copy(part: Part, options: Options) -> None:
    """Bytes read and written in a second."""
    source = torch.randint(255, (2**20 if options.tiny else 2**32,), dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    time = timed(lambda: target.copy_(source), options.device)
    part.put(gb_per_second=round(2 * source.numel() / time["ms"] / 1e6, 1), **time)


def gate_product(part: Part, options: Options) -> None:
    """A router's product of 32768 tokens of width 4096 with 128 experts, in fp32 without TF32 and in BF16."""
    tokens, width, experts = (64, 32, 8) if options.tiny else (32768, 4096, 128)
    x, gate = (torch.randn(rows, width, device=options.device) for rows in (tokens, experts))
    operations = 2 * tokens * width * experts
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = x.to(dtype), gate.to(dtype)
        time = timed(lambda a=a, b=b: a @ b.T, options.device)
        part.put(**{name: {"tflops": tflops(operations, time["ms"]), **time}})


def measured_peak(options: Options) -> float | None:
    """TFLOP/s of the BF16 product of this run; None if it was not measured."""
    path = options.out / "gpu.json"
    steps = json.loads(path.read_text())["steps"] if path.exists() else {}
    peak: float | None = steps.get("machine", {}).get("parts", {}).get(PEAK_PART, {}).get("tflops")
    return peak
