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
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import in_turn, machine
from moefoundry.config import Fp8Config, Fp8Recipe, MoEConfig, PrecisionConfig
from moefoundry.model.norm import RMSNorm
from moefoundry.moe.experts import GroupedExperts
from moefoundry.moe.layer import MoELayer
from moefoundry.ops.fp8 import (
    Backend,
    Format,
    QuantizedTensor,
    Scaling,
    Tile,
    dequantize,
    fprop,
    quantize,
    quantize_columns,
    quantize_transposed,
    retile,
    wgrad,
)
from moefoundry.ops.permute import order_by_expert
from moefoundry.ops.sizes import row_bytes
from moefoundry.precision import apply_precision

NOT_RUN = "not run: torch.cuda.is_available() is False"
WIDTH, FFN_WIDTH = 7168, 2048  # DeepSeek-V3's model and experts
RECIPES = {"bf16": None, "deepseek_v3": Fp8Recipe.deepseek_v3}
BLOCK_WIDTH, BLOCK_HIDDEN, TOP_K = 7 * 128, 2 * 128, 8  # DeepSeek-V3's proportions, for counting


class Shape(NamedTuple):
    """A layer's experts: rows M, experts E, F and D."""

    rows: int
    experts: int
    hidden: int
    width: int

    def __str__(self) -> str:
        return f"M{self.rows} E{self.experts} F{self.hidden} D{self.width}"


SHAPES = (
    Shape(32768, 8, FFN_WIDTH, WIDTH),
    Shape(24576 * 8, 128, 256, 1536),
    Shape(32768 * 8, 128, 512, 4096),
    Shape(32768 * 8, 128, 1024, 4096),
)
"""DeepSeek-V3's, of which torchao's benchmark page has DeepGEMM's TFLOP/s on an H100 (1234 forward, 1236 dgrad, 457
wgrad); then those that SonicMoE, ScatterMoE and MegaBlocks are compared at, 8 experts a token."""


def bytes_by_format() -> dict[str, float]:
    """Bytes a value of an activation [.., 7168], scales included."""
    x = torch.randn(64, WIDTH)
    kept = {
        f"{format.name} 1x128, {scaling} scales": quantize(x, Tile.ROW, format, scaling).nbytes / x.numel()
        for format in Format
        for scaling in Scaling
    }
    return {"bf16": 2.0, **kept, "E4M3 1x128 on the wire": row_bytes(WIDTH) / WIDTH}


def bytes_of_dispatch() -> dict[str, float]:
    """Bytes of the four legs of a layer's exchange over those of BF16; ``pytest tests/moe/test_dispatch.py`` counts
    them on ranks."""
    leg = row_bytes(WIDTH) / (2 * WIDTH)
    return {"tokens to experts": leg, "results back": 1, "their gradients": leg, "gradients back": 1} | {
        "four legs": (2 * leg + 2) / 4
    }


def bytes_kept_for_backward() -> dict[str, float]:
    """KiB a token that norm and MoE layer keep, counted; D : F and experts a token are DeepSeek-V3's."""
    kept = {name: count_kept(*build_block(recipe)) for name, recipe in RECIPES.items()}
    product = (TOP_K + 1) * BLOCK_HIDDEN * 2 / 1024
    bf16 = kept["bf16"] - product
    kept["bf16, SwiGLU recomputed"] = bf16
    return {**kept, "deepseek_v3 over bf16 with SwiGLU recomputed": kept["deepseek_v3"] / bf16}


def build_block(recipe: Fp8Recipe | None) -> tuple[nn.Module, Tensor]:
    """Norm and MoE layer in BF16, and tokens for them."""
    moe = MoEConfig(num_experts=16, top_k=TOP_K, expert_hidden_size=BLOCK_HIDDEN, num_shared_experts=1)
    block = nn.Sequential(RMSNorm(BLOCK_WIDTH, 1e-6), MoELayer(BLOCK_WIDTH, moe)).to(torch.bfloat16)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    apply_precision(block, PrecisionConfig(fp8=Fp8Config(recipe)))
    return block, torch.randn(1, 64, BLOCK_WIDTH, dtype=torch.bfloat16).requires_grad_()


def count_kept(block: nn.Module, x: Tensor) -> float:
    """KiB a token of what autograd keeps, without parameters; each storage counts once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    del out
    return sum(storages.values()) / x.shape[1] / 1024


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


def products_on_gpu(shape: Shape) -> dict[str, dict[str, float]]:
    """TFLOP/s of the grouped products of an up-projection, and over those of ``F.grouped_mm`` in BF16."""
    from triton.testing import do_bench

    sizes_E = torch.full((shape.experts,), shape.rows // shape.experts, device="cuda")
    ends_E = sizes_E.cumsum(0, dtype=torch.int32)
    x, grad = (random_bf16(shape.rows, width) for width in (shape.width, shape.hidden))
    weight_bf16 = random_bf16(shape.experts, shape.hidden, shape.width)
    weight, x_rows, grad_rows = quantize(weight_bf16, Tile.BLOCK), quantize(x, Tile.ROW), quantize(grad, Tile.ROW)
    x_columns, grad_columns = retile(x_rows, sizes_E), quantize_columns(grad, sizes_E)
    weight_T = quantize_transposed(weight_bf16)
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "fprop": (lambda: fprop(x_rows, weight, sizes_E), lambda: F.grouped_mm(x, weight_bf16.mT, offs=ends_E)),
        "dgrad": (lambda: fprop(grad_rows, weight_T, sizes_E), lambda: F.grouped_mm(grad, weight_bf16, offs=ends_E)),
        "wgrad": (lambda: wgrad(grad_columns, x_columns), lambda: F.grouped_mm(grad.T, x, offs=ends_E)),
    }
    flops = 2 * shape.rows * shape.width * shape.hidden
    results = {}
    for name, (ours, theirs) in calls.items():
        milliseconds, bf16 = (do_bench(call, return_mode="median") for call in (ours, theirs))
        results[name] = {"TFLOP/s": round(flops / milliseconds / 1e9), "of BF16": round(bf16 / milliseconds, 2)}
    return results


def experts_on_gpu(shape: Shape) -> dict[str, float]:
    """Forward and backward of all of a layer's experts, quantizing included, over BF16."""
    from triton.testing import do_bench

    ids = torch.arange(shape.rows, device="cuda").remainder(shape.experts).unsqueeze(1)
    routed = torch.ones(ids.shape, device="cuda"), order_by_expert(ids, shape.experts)
    x, grad = random_bf16(shape.rows, shape.width).requires_grad_(), random_bf16(shape.rows, shape.width)
    milliseconds = {}
    cfg = MoEConfig(num_experts=shape.experts, expert_hidden_size=shape.hidden, backend="grouped_mm")
    for name, recipe in RECIPES.items():
        experts = GroupedExperts(shape.width, cfg)
        block = nn.ModuleDict({"experts": experts}).to("cuda", torch.bfloat16)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        apply_precision(block, PrecisionConfig(fp8=Fp8Config(recipe)))
        milliseconds[name] = do_bench(
            partial(experts_once, experts, x, routed, grad),
            return_mode="median",
        )
    return {**milliseconds, "speed over bf16": round(milliseconds["bf16"] / milliseconds["deepseek_v3"], 2)}


def experts_once(experts: GroupedExperts, x: Tensor, routed: tuple[Any, ...], grad: Tensor) -> None:
    """Both passes, with new tensors: what is kept of a tensor that was quantized before is not there."""
    x = x.detach().requires_grad_()
    torch.autograd.grad(experts(x, *routed), [x, *experts.parameters()], grad.detach())


def random_bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def run(quick: bool) -> dict[str, Any]:
    """Everything; ``quick`` is too short for numbers to mean much."""
    gpu = torch.cuda.is_available()
    return {
        "machine": machine(torch.get_num_threads(), "default"),
        "bytes a value": bytes_by_format(),
        "bytes of dispatch and combine over BF16": bytes_of_dispatch(),
        "KiB a token kept by norm and MoE layer": bytes_kept_for_backward(),
        "GB/s of the references on the CPU": throughput_on_cpu(*((256, 1) if quick else (4096, 5))),
        "kernels on the GPU": throughput_on_gpu(1024 if quick else 32768) if gpu else NOT_RUN,
        "grouped products on the GPU": {str(s): products_on_gpu(s) for s in SHAPES} if gpu else NOT_RUN,
        "experts forward and backward on the GPU, ms": {str(s): experts_on_gpu(s) for s in SHAPES} if gpu else NOT_RUN,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Bytes and throughput of the FP8 formats.")
    parser.add_argument("--quick", action="store_true", help="does everything run?")
    print(json.dumps(run(parser.parse_args(argv).quick), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
