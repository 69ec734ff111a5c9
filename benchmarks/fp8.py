"""What FP8 costs and saves in numbers: bytes kept and dispatched by format, and how fast quantizers run.

    python -m benchmarks.fp8 [--quick]

Prints JSON. Bytes are of real tensors. Throughput is of the PyTorch references on this CPU with ``OMP_NUM_THREADS``
threads, and where there is a CUDA device of the kernels too, beside a copy of as many bytes: kernels wait for memory.
What needs a GPU is reported as not run where there is none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import in_turn, machine
from moefoundry.ops.fp8 import (
    Backend,
    Format,
    QuantizedTensor,
    Scaling,
    Tile,
    dequantize,
    dgrad,
    fprop,
    quantize,
    quantize_columns,
    retile,
    wgrad,
)

NOT_RUN = "not run: torch.cuda.is_available() is False"
WIDTH, FFN_WIDTH = 7168, 2048  # DeepSeek-V3's model and experts
GROUPED = {"rows": 32768, "experts": 8}


def bytes_by_format() -> dict[str, float]:
    """Bytes a value of an activation [.., 7168], scales included."""
    x = torch.randn(64, WIDTH)
    kept = {
        f"{format.name} 1x128, {scaling} scales": quantize(x, Tile.ROW, format, scaling).nbytes / x.numel()
        for format in Format
        for scaling in Scaling
    }
    return {"bf16": 2.0, **kept}


def bytes_of_dispatch() -> dict[str, float]:
    """Bytes of the exchanges of a layer over those of BF16; of the four legs, two can be FP8."""
    values = bytes_by_format()
    leg = {scaling: values[f"E4M3 1x128, {scaling} scales"] / values["bf16"] for scaling in Scaling}
    legs = {f"one leg, {scaling} scales": ratio for scaling, ratio in leg.items()}
    # dispatch forward and the gradients to the experts in FP8; combine forward and its result backward in BF16
    return {**legs, "four legs": (2 * leg[Scaling.POWER_OF_TWO] + 2) / 4}


def bytes_kept_for_backward() -> dict[str, float]:
    """KiB a token that one expert's FFN keeps: the input of both up-projections and the two inputs of SwiGLU."""
    x, gate = torch.randn(64, WIDTH), torch.randn(64, FFN_WIDTH)
    fp8 = quantize(x, Tile.ROW).nbytes + 2 * quantize(gate, Tile.ROW).nbytes
    # without recomputation SwiGLU's output is kept as well
    return {"bf16": (x.numel() + 3 * gate.numel()) * 2 / 64 / 1024, "fp8, SwiGLU recomputed": fp8 / 64 / 1024}


def quantizers(x: Tensor, backend: Backend) -> dict[str, Callable[[], Any]]:
    """Each reads or writes ``x`` once."""
    kept: dict[Format, QuantizedTensor] = {format: quantize(x, Tile.ROW, format, backend=backend) for format in Format}
    calls: dict[str, Callable[[], Any]] = {"copy": x.clone}
    for format, tensor in kept.items():
        calls[f"quantize {format.name} 1x128"] = lambda f=format: quantize(x, Tile.ROW, f, backend=backend)
        calls[f"dequantize {format.name} 1x128"] = lambda t=tensor: dequantize(t, x.dtype, backend)
        calls[f"retile {format.name} to 128x1"] = lambda t=tensor: retile(t, backend=backend)
    calls["quantize E4M3 128x128"] = lambda: quantize(x, Tile.BLOCK, backend=backend)
    calls["quantize E4M3 128x1"] = lambda: quantize_columns(x, backend=backend)
    return calls


def bytes_moved(name: str, x: Tensor) -> float:
    """That a call has to read and to write."""
    of_format = {"E4M3": 129 / 128, "E5M6": 193 / 128}
    small = next((size for format, size in of_format.items() if format in name), x.itemsize)
    return x.numel() * (small + (of_format["E4M3"] if name.startswith("retile") else x.itemsize))


def throughput_on_cpu(rows: int, rounds: int) -> dict[str, float]:
    """GB/s read and written."""
    x = torch.randn(rows, WIDTH, dtype=torch.bfloat16)
    seconds = in_turn(quantizers(x, Backend.REFERENCE), rounds, warmup=1)
    return {name: round(bytes_moved(name, x) / statistics.median(s) / 1e9, 2) for name, s in seconds.items()}


def throughput_on_gpu(rows: int) -> dict[str, dict[str, float]]:
    """GB/s of the kernels, and the part of a copy's."""
    from triton.testing import do_bench

    x = torch.randn(rows, WIDTH, dtype=torch.bfloat16, device="cuda")
    calls = quantizers(x, Backend.TRITON)
    speed = {name: bytes_moved(name, x) / do_bench(call, return_mode="median") / 1e6 for name, call in calls.items()}
    return {name: {"GB/s": round(s), "of a copy": round(s / speed["copy"], 2)} for name, s in speed.items()}


def products_on_gpu() -> dict[str, float]:
    """TFLOP/s of the grouped products, of DeepSeek-V3's up-projection; DeepGEMM: about 1234, 1236 and 457 (H100)."""
    from triton.testing import do_bench

    rows, experts = GROUPED["rows"], GROUPED["experts"]
    sizes_E = torch.full((experts,), rows // experts, device="cuda")
    x, grad = (torch.randn(rows, width, dtype=torch.bfloat16, device="cuda") for width in (WIDTH, FFN_WIDTH))
    weight = quantize(torch.randn(experts, FFN_WIDTH, WIDTH, dtype=torch.bfloat16, device="cuda"), Tile.BLOCK)
    x_rows, grad_rows = quantize(x, Tile.ROW), quantize(grad, Tile.ROW)
    x_columns, grad_columns = retile(x_rows, sizes_E), quantize_columns(grad, sizes_E)
    calls: dict[str, Callable[[], Any]] = {
        "fprop": lambda: fprop(x_rows, weight, sizes_E),
        "dgrad": lambda: dgrad(grad_rows, weight, sizes_E),
        "wgrad": lambda: wgrad(grad_columns, x_columns),
    }
    flops = 2 * rows * WIDTH * FFN_WIDTH
    return {name: round(flops / do_bench(call, return_mode="median") / 1e9) for name, call in calls.items()}


def run(quick: bool) -> dict[str, Any]:
    """Everything; ``quick`` is too short for numbers to mean much."""
    gpu = torch.cuda.is_available()
    return {
        "machine": machine(torch.get_num_threads(), "default"),
        "bytes a value": bytes_by_format(),
        "bytes of dispatch and combine over BF16": bytes_of_dispatch(),
        "KiB a token kept by an expert": bytes_kept_for_backward(),
        "GB/s of the references on the CPU": throughput_on_cpu(*((256, 1) if quick else (4096, 5))),
        "kernels on the GPU": throughput_on_gpu(1024 if quick else 32768) if gpu else NOT_RUN,
        "TFLOP/s of the grouped products on the GPU": products_on_gpu() if gpu else NOT_RUN,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bytes and throughput of the FP8 formats.")
    parser.add_argument("--quick", action="store_true", help="does everything run?")
    print(json.dumps(run(parser.parse_args(argv).quick), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
