"""FP8: the quantizers, the grouped products and the experts of :mod:`benchmarks.fp8`, then the whole MoE layer."""

from __future__ import annotations

from benchmarks import fp8
from benchmarks.gpu.figures import Figures, Part
from benchmarks.gpu.layer import SHAPES, TINY, Case, measure
from benchmarks.gpu.routers import ROUTERS
from benchmarks.gpu.steps import Options

ROWS = 32768


def run(figures: Figures, options: Options) -> None:
    """What a CPU can do there: the references, and a tiny layer."""
    if options.device == "cpu":
        figures.run("quantizers", lambda part: part.put(gb_per_second=fp8.throughput_on_cpu(8, 1)))
        figures.run(f"layer {TINY[0]}", measure, Case(TINY[0], "grouped_mm", "uniform", "fp8"), options)
        return
    figures.run("quantizers", quantizers)
    for shape in fp8.SHAPES:
        figures.run(f"experts {shape}", experts, shape, kind="experts")
    for layer_shape in SHAPES:
        for precision in ("fp8", "fp8 by DeepGEMM"):
            case = Case(layer_shape, "grouped_mm", ROUTERS[0], precision)
            figures.run(f"layer {case}", measure, case, options, kind=f"layers in {precision}")
    for shape in fp8.SHAPES:
        figures.run(f"products {shape}", products, shape, kind="products")


def quantizers(part: Part) -> None:
    """GB/s of each, and as a part of a copy's."""
    part.put(**fp8.throughput_on_gpu(ROWS))


def products(part: Part, shape: fp8.Shape) -> None:
    """TFLOP/s of the three products, and how many times as fast as BF16's."""
    part.put(**fp8.products_on_gpu(shape))


def experts(part: Part, shape: fp8.Shape) -> None:
    """Milliseconds of all experts, quantizing included, and how many times as fast as BF16's."""
    part.put(**fp8.experts_on_gpu(shape))
