"""Time every tiling of the fused experts' kernels on this GPU, to choose those in ``launches.CONFIGS``.

    python -m benchmarks.tune_experts [--out tune.json]

Prints JSON: for each shape and kernel TFLOP/s by tiling, best first, and those of ``F.grouped_mm``'s products. Compiles
on all cores first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops.fused_experts import launches
from moefoundry.ops.fused_experts.launches import Config
from moefoundry.ops.permute import order_by_expert, permute, sum_rows

SHAPES = [(24576, 1536, 256, 128, 8), (32768, 4096, 512, 128, 8), (32768, 4096, 1024, 128, 8)]
"""T, D, F, E, K of the shapes that published layers are compared at."""
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

    def calls(self, kernel: str, m: int) -> dict[str, tuple[Callable[[], Any], int]]:
        """What launches a kernel on rows tiled by ``m``, and how many times N D F multiplications and additions it
        does."""
        tiles = launches.place_tiles(self.order.tokens_per_expert_E, len(self.token_of_row_N), m)
        gather = self.token_of_row_N, self.row_weights_N
        return {
            "up_swiglu": {"": (lambda: launches.multiply_up(self.x, *gather, self.gate, self.up, tiles), 4)},
            "down": {"": (lambda: launches.multiply_down(self.hidden, self.down, tiles), 2)},
            "up_backward": {"": (lambda: launches.multiply_up_backward(self.gate_up, self.gate, self.up, tiles), 4)},
            "down_backward_swiglu": {
                "": (lambda: launches.multiply_down_backward(self.grad, *gather, self.down, self.gate_up, tiles), 2)
            },
            "weight_gradient": {
                " of gate and up": (lambda: self._weight_gradient(self.gate_up, self.x, 2, gather_left=False), 4),
                " of down": (lambda: self._weight_gradient(self.grad, self.hidden, 1, gather_left=True), 2),
            },
        }[kernel]

    def _weight_gradient(self, left: Tensor, right: Tensor, outputs: int, gather_left: bool) -> Any:
        return launches.multiply_transposed(
            left, right, self.token_of_row_N, self.ends_E, outputs, gather_left=gather_left
        )

    def peers(self) -> dict[str, tuple[Callable[[], Any], int]]:
        """The parts of the plain way."""
        ends = self.ends_E
        return {
            "grouped_mm, up": (lambda: F.grouped_mm(self.rows, self.gate.mT, offs=ends), 2),
            "grouped_mm, down": (lambda: F.grouped_mm(self.hidden, self.down.mT, offs=ends), 2),
            "grouped_mm, dgrad of down": (lambda: F.grouped_mm(self.rows, self.down, offs=ends), 2),
            "grouped_mm, dgrad of up": (lambda: F.grouped_mm(self.hidden, self.gate, offs=ends), 2),
            "grouped_mm, wgrad": (lambda: F.grouped_mm(self.hidden.T, self.rows, offs=ends), 2),
        }

    def moves(self) -> dict[str, Callable[[], Any]]:
        """What only moves bytes, N D of them read or written at least once."""
        return {
            "sum_rows": lambda: launches.sum_rows(self.rows, self.order),
            "embedding_bag": lambda: sum_rows(self.rows, self.order),
            "permute": lambda: permute(self.x, self.order),
        }


def time_ms(call: Callable[[], Any]) -> float:
    """Median milliseconds."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=15, rep=60, return_mode="median"))


def measure(shape: tuple[int, ...]) -> dict[str, Any]:
    """TFLOP/s and milliseconds of every kernel and tiling."""
    layer = Layer(shape)
    product = shape[0] * shape[4] * shape[1] * shape[2] / 1e9
    results: dict[str, Any] = {}
    for name, (call, factor) in layer.peers().items():
        results[name] = attempt(lambda call=call, factor=factor: rate(time_ms(call), factor * product))
    for name, call in layer.moves().items():
        results[name] = attempt(lambda call=call: {"ms": round(time_ms(call), 3)})
    for kernel, tilings in TILINGS.items():
        by_case: dict[str, dict[str, Any]] = {}
        for tiling in tilings:
            launches.CONFIGS[kernel] = tiling
            for case, (call, factor) in layer.calls(kernel, tiling.m).items():
                found = attempt(lambda call=call, factor=factor: rate(time_ms(call), factor * product))
                by_case.setdefault(kernel + case, {})[str(tuple(tiling))] = found
        for case, found in by_case.items():
            results[case] = dict(sorted(found.items(), key=lambda item: item[1].get("ms", 1e9)))
    return results


def rate(milliseconds: float, gflop: float) -> dict[str, float]:
    return {"ms": round(milliseconds, 3), "TFLOP/s": round(gflop / milliseconds)}


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure, or say why not."""
    try:
        return measure()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def compile_one(job: tuple[str, Config]) -> None:
    """Leave a kernel in Triton's cache; the sizes do not matter beyond their divisibility."""
    kernel, tiling = job
    layer = Layer((256, 512, 256, 128, 8))
    launches.CONFIGS[kernel] = tiling
    for call, _ in layer.calls(kernel, tiling.m).values():
        attempt(lambda call=call: {"": call()})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    jobs = [(kernel, tiling) for kernel, tilings in TILINGS.items() for tiling in tilings]
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs))
    results: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for shape in SHAPES:
        results[str(shape)] = measure(shape)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
