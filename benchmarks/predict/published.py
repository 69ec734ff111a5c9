"""Figures that others measured on an H100, to see how far the model is from them.

Plain products of Triton's, 128 x 256 x 64 with three stages and eight warps, are compiled here and predicted at the
sizes of Triton's tutorial on persistent kernels (``python/tutorials/gluon/07-persistence.py``). The tutorial's own
kernels have the same tiles, stages and warps. The model has its clock from there (the vendor's library at the largest
size), and bandwidth of the L2 cache and latency (two buffers of 128 x 256 x 128, three of 128 x 256 x 64).
The figures below gave nothing to it.
"""

from __future__ import annotations

# mypy: allow-untyped-defs, allow-incomplete-defs
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.predict.layer import Launch, Recorded, recording
from benchmarks.predict.model import SMS, Tile, Work, chip_of, predict

LIBRARY_TFLOPS = 665.49
"""Rate of the vendor's library on the tutorial's GPU, 8192 x 8192 x 16384 in FP16."""
ONE_TILE = {512: 491.74, 1024: 554.24, 2048: 573.87, 4096: 609.36, 8192: 629.44, 16384: 653.79}
"""TFLOP/s of 8192 x 8192 x K, each tile in a program of its own."""
PERSISTENT = {512: 539.88, 1024: 602.52, 2048: 625.91, 4096: 640.48, 8192: 661.57, 16384: 670.00}
"""A program on each multiprocessor that takes all tiles, and copies the operands of the next while it stores one."""
SIZE, M, N, K = 8192, 128, 256, 64


@triton.jit
def product(left, right, out, inner, columns, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Multiply [rows, inner] by the transposed [columns, inner]."""
    down, across = tl.program_id(0), tl.program_id(1)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, inner, K):
        a = left.load([down * M, start])
        total = tl.dot(a, right.load([across * N, start]).T, total)
    out.store([down * M, across * N], total.to(tl.float16))


@triton.jit
def persistent_product(left, right, out, tiles, inner, columns, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Multiply the same, tile after tile."""
    across_all = columns // N
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        down, across = tile // across_all, tile % across_all
        total = tl.zeros([M, N], tl.float32)
        for start in range(0, inner, K):
            a = left.load([down * M, start])
            total = tl.dot(a, right.load([across * N, start]).T, total)
        out.store([down * M, across * N], total.to(tl.float16))


def compile_products() -> dict[str, Launch]:
    """Compile both."""
    found: Recorded = []
    left, right, out = (torch.empty(SIZE, SIZE, dtype=torch.float16, device="meta") for _ in range(3))
    tiling = {"M": M, "N": N, "K": K, "num_warps": 8, "num_stages": 3}
    with recording(found):
        described = [
            TensorDescriptor.from_tensor(tensor, list(block))
            for tensor, block in ((left, (M, K)), (right, (N, K)), (out, (M, N)))
        ]
        product[(SIZE // M, SIZE // N)](*described, SIZE, SIZE, **tiling)
        persistent_product[(SMS,)](*described, SIZE // M * (SIZE // N), SIZE, SIZE, **tiling)
    return {part.kernel: part for part in found if isinstance(part, Launch)}


def compare() -> dict[str, dict[int, tuple[float, float]]]:
    """Give the predicted and the published TFLOP/s of both for each depth."""
    launches, chip = compile_products(), chip_of(LIBRARY_TFLOPS)

    def rate(kernel: str, depth: int) -> float:
        operations = 2 * SIZE * SIZE * depth
        tiles = [Tile(SIZE // M * (SIZE // N), depth // K)]
        work = Work(tiles, 2 * K * (M + N), 4 * SIZE * depth + 2 * SIZE**2, operations)
        return operations / predict(launches[kernel].code, work, chip).seconds / 1e12

    return {
        kernel: {depth: (round(rate(kernel, depth), 1), measured) for depth, measured in published.items()}
        for kernel, published in (("product", ONE_TILE), ("persistent_product", PERSISTENT))
    }
