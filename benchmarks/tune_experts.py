"""Time every tiling of the fused experts' kernels on this GPU, to choose those in ``launches.CONFIGS``.

    python -m benchmarks.tune_experts --out tune.json

Prints for each shape and kernel its fastest tilings, and those of ``F.grouped_mm``'s products. ``--out`` has all of
them, as soon as each is timed. Compiles on all cores first. Each shape has a process of its own, and another for the
tilings that are left where one hangs, or makes the device unusable.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.__main__ import has_device
from benchmarks.gpu.figures import Figures, Part, end_running_part, file_of_stacks, parts_ended, parts_of
from benchmarks.gpu.gpu_tests import ROOT
from benchmarks.gpu.runner import stop
from moefoundry.ops.fused_experts import launches
from moefoundry.ops.fused_experts.launches import Config
from moefoundry.ops.permute import order_by_expert, permute, sum_rows

SHAPES = [(24576, 1536, 256, 128, 8), (32768, 4096, 512, 128, 8), (32768, 4096, 1024, 128, 8)]
"""T, D, F, E, K of the shapes that published layers are compared at."""
COMPILE_SECONDS, TILING_SECONDS = 180.0, 20.0
"""What takes longer hangs. The first tiling of a process has CUDA's start in it."""
SHOWN = 3
"""Tilings of a kernel that are printed."""
TILINGS = {
    "up_swiglu": [
        Config(128, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 32, 8, 5),
        Config(128, 128, 32, 8, 6),
        Config(128, 64, 64, 4, 3),
        Config(128, 64, 64, 8, 4),
        Config(64, 128, 64, 4, 3),
        Config(256, 64, 64, 8, 3),
    ],
    "down": [
        Config(128, 256, 64, 8, 3),
        Config(128, 256, 64, 8, 4),
        Config(128, 128, 64, 4, 3),
        Config(128, 128, 64, 8, 4),
        Config(256, 128, 64, 8, 3),
        Config(64, 256, 64, 4, 3),
        Config(128, 256, 128, 8, 2),
    ],
    "up_backward": [
        Config(128, 256, 64, 8, 3),
        Config(128, 256, 32, 8, 4),
        Config(128, 256, 32, 8, 5),
        Config(128, 128, 64, 4, 3),
        Config(128, 128, 64, 8, 4),
        Config(256, 128, 64, 8, 3),
    ],
    "down_backward_swiglu": [
        Config(128, 256, 64, 8, 3),
        Config(128, 128, 64, 8, 3),
        Config(128, 128, 64, 8, 4),
        Config(128, 128, 32, 8, 6),
        Config(128, 64, 64, 4, 4),
        Config(128, 128, 128, 8, 3),
        Config(256, 64, 64, 8, 4),
    ],
    "weight_gradient": [
        Config(128, 256, 64, 8, 5),
        Config(128, 256, 32, 8, 5),
        Config(128, 256, 32, 8, 7),
        Config(128, 128, 64, 4, 5),
        Config(128, 128, 64, 8, 5),
        Config(128, 128, 64, 8, 7),
        Config(64, 256, 64, 8, 5),
        Config(256, 128, 64, 8, 5),
    ],
}


class Layer:
    """The operands of a layer's kernels, with random routing.

    Args:
        shape: T, D, F, E, K.
        device: Where they lie.
    """

    def __init__(self, shape: tuple[int, ...], device: str = "cuda") -> None:
        tokens, width, hidden, experts, top_k = shape
        self.shape, self.device = shape, device
        torch.manual_seed(0)
        ids = torch.rand(tokens, experts, device=device).topk(top_k, dim=1).indices
        self.order = order_by_expert(ids, experts)
        self.token_of_row_N = self.order.token_of_row_N.to(torch.int32)
        self.row_weights_N = torch.rand(tokens * top_k, device=device)
        self.ends_E = self.order.tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        self.x, self.grad = self._random(tokens, width), self._random(tokens, width)
        self.gate, self.up = (self._random(experts, hidden, width) * width**-0.5 for _ in range(2))
        self.down = self._random(experts, width, hidden) * hidden**-0.5
        self.gate_up = self._random(tokens * top_k, 2 * hidden)
        self.hidden = self._random(tokens * top_k, hidden)
        self.rows = self._random(tokens * top_k, width)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16)

    def tiles(self, m: int) -> launches.Tiles:
        """Rows tiled by ``m``."""
        return launches.place_tiles(self.order.tokens_per_expert_E, len(self.token_of_row_N), m)

    @property
    def gather(self) -> tuple[Tensor, Tensor]:
        """Token and weight of each row."""
        return self.token_of_row_N, self.row_weights_N

    def weight_gradient(self, left: Tensor, right: Tensor, outputs: int, gather_left: bool) -> Any:
        """Launch the kernel of the weights' gradients."""
        return launches.multiply_transposed(
            left, right, self.token_of_row_N, self.ends_E, outputs, gather_left=gather_left
        )


class Kernel(NamedTuple):
    """What is tuned.

    Attributes:
        config: Its key in ``launches.CONFIGS``.
        factor: It does as many times N D F multiplications and additions.
        launch: Launches it for a layer whose rows are tiled.
    """

    config: str
    factor: int
    launch: Callable[[Layer, launches.Tiles], Any]


KERNELS = {
    "up_swiglu": Kernel("up_swiglu", 4, lambda a, tiles: launches.multiply_up(a.x, *a.gather, a.gate, a.up, tiles)),
    "down": Kernel("down", 2, lambda a, tiles: launches.multiply_down(a.hidden, a.down, tiles)),
    "up_backward": Kernel(
        "up_backward", 4, lambda a, tiles: launches.multiply_up_backward(a.gate_up, a.gate, a.up, tiles)
    ),
    "down_backward_swiglu": Kernel(
        "down_backward_swiglu",
        2,
        lambda a, tiles: launches.multiply_down_backward(a.grad, *a.gather, a.down, a.gate_up, tiles),
    ),
    "weight_gradient of gate and up": Kernel(
        "weight_gradient", 4, lambda a, _: a.weight_gradient(a.gate_up, a.x, 2, gather_left=False)
    ),
    "weight_gradient of down": Kernel(
        "weight_gradient", 2, lambda a, _: a.weight_gradient(a.grad, a.hidden, 1, gather_left=True)
    ),
}
PEERS: dict[str, Callable[[Layer], Any]] = {
    "grouped_mm, up": lambda a: F.grouped_mm(a.rows, a.gate.mT, offs=a.ends_E),
    "grouped_mm, down": lambda a: F.grouped_mm(a.hidden, a.down.mT, offs=a.ends_E),
    "grouped_mm, dgrad of down": lambda a: F.grouped_mm(a.rows, a.down, offs=a.ends_E),
    "grouped_mm, dgrad of up": lambda a: F.grouped_mm(a.hidden, a.gate, offs=a.ends_E),
    "grouped_mm, wgrad": lambda a: F.grouped_mm(a.hidden.T, a.rows, offs=a.ends_E),
}
"""The parts of the plain way; each does 2 N D F."""
MOVES: dict[str, Callable[[Layer], Any]] = {
    "sum_rows": lambda a: launches.sum_rows(a.rows, a.order),
    "embedding_bag": lambda a: sum_rows(a.rows, a.order),
    "permute": lambda a: permute(a.x, a.order),
}
"""What only moves bytes, N D of them read or written at least once."""


def time_ms(call: Callable[[], Any]) -> float:
    """Median milliseconds."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=15, rep=60, return_mode="median"))


@cache
def layer_of(shape: tuple[int, ...]) -> Layer:
    """Make a layer once in a process."""
    return Layer(shape)


def measure(figures: Figures, shape: tuple[int, ...]) -> None:
    """TFLOP/s and milliseconds of every kernel and tiling at one shape, each a part of its own."""
    product = shape[0] * shape[4] * shape[1] * shape[2] / 1e9

    def peer(part: Part, call: Callable[[Layer], Any]) -> None:
        layer = layer_of(shape)
        part.put(**rate(time_ms(lambda: call(layer)), 2 * product))

    def move(part: Part, call: Callable[[Layer], Any]) -> None:
        layer = layer_of(shape)
        part.put(ms=round(time_ms(lambda: call(layer)), 3))

    def tile(part: Part, kernel: Kernel, tiling: Config) -> None:
        layer = layer_of(shape)
        launches.CONFIGS[kernel.config], tiles = tiling, layer.tiles(tiling.m)
        part.put(**rate(time_ms(lambda: kernel.launch(layer, tiles)), kernel.factor * product))

    figures.run("device", lambda part: part.put(name=torch.cuda.get_device_name()))
    for measured, calls in ((peer, PEERS), (move, MOVES)):
        for name, call in calls.items():
            figures.run(f"{shape}; {name}", measured, call)
    for name, kernel in KERNELS.items():
        for tiling in TILINGS[kernel.config]:
            label = f"{name}; {tuple(tiling)}"
            figures.run(f"{shape}; {label}", tile, kernel, tiling, kind=label)


def rate(milliseconds: float, gflop: float) -> dict[str, float]:
    return {"ms": round(milliseconds, 3), "tflops": round(gflop / milliseconds)}


def compile_all() -> None:
    """Compile on all cores. What fails here fails again where it is timed, and is told there."""
    jobs = [(name, tiling) for name, kernel in KERNELS.items() for tiling in TILINGS[kernel.config]]
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), get_context("spawn")) as pool:
        list(pool.map(compile_one, *zip(*jobs, strict=True)))


def compile_one(name: str, tiling: Config) -> None:
    """Leave a kernel in Triton's cache; the sizes do not matter beyond their divisibility."""
    kernel = KERNELS[name]
    launches.CONFIGS[kernel.config] = tiling
    try:
        layer = layer_of((256, 512, 256, 128, 8))
        kernel.launch(layer, layer.tiles(tiling.m))
    except Exception as error:
        print(f"{name}, {tuple(tiling)}: {error}"[:300], file=sys.stderr)


def run_apart(*arguments: str, seconds: float | None = None) -> int | None:
    """Run this command in a process of its own; its exit code, or None if it had to be stopped."""
    command = [sys.executable, "-m", "benchmarks.tune_experts", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        stop(process)


def measure_apart(number: int, out: Path) -> None:
    """Measure a shape in a process of its own, and in another the tilings that are left where it ends early."""
    code, before = None, -1
    while code != 0 and parts_ended(out) > before:
        before = parts_ended(out)
        code = run_apart("--shape", str(number), "--out", str(out))
        end_running_part(out, f"its process ended with exit code {code}")


def table(parts: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The fastest tilings of each kernel, in lines of Markdown."""
    by_kernel: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name, figures in parts.items():
        if name == "device":
            yield from (f"{figures.get('name')}", "")
            continue
        shape, kernel, *tiling = name.split("; ")
        by_kernel.setdefault((shape, kernel), {})["".join(tiling)] = figures
    yield "| T, D, F, E, K | kernel | fastest, ms and TFLOP/s | failed |"
    yield "|---|---|---|---|"
    for (shape, kernel), tilings in by_kernel.items():
        done = sorted((figures["ms"], name) for name, figures in tilings.items() if figures["state"] == "done")
        best = [f"{name} {ms} {tilings[name].get('tflops', '')}".strip() for ms, name in done[:SHOWN]]
        errors = [str(figures.get("error"))[:60] for figures in tilings.values() if figures["state"] != "done"]
        failed = f"{len(errors)} of {len(tilings)}: {errors[0]}" if errors else ""
        yield f"| {shape} | {kernel} | {'; '.join(best)} | {failed} |"


def main(argv: list[str] | None = None) -> int:
    """Compile, measure every shape, print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep all times here, as JSON")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)  # of processes of this command
    parser.add_argument("--shape", type=int, choices=range(len(SHAPES)), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.compile:
        compile_all()
        return 0
    if args.shape is not None:
        measure(Figures(args.out, TILING_SECONDS), SHAPES[args.shape])
        return 0
    if not has_device():
        print("no CUDA device: the driver names none", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out.resolve() if args.out else Path(scratch, "tune.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        run_apart("--compile", seconds=COMPILE_SECONDS)
        for number in range(len(SHAPES)):
            measure_apart(number, out)
        file_of_stacks(out).unlink(missing_ok=True)
        print("\n".join(table(parts_of(out))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
