"""Predict the speed of the fused experts' kernels on an H100 from their machine code. Nothing is measured.

    python -m benchmarks.predict [--library-tflops 798] [--json FILE]

Prints tables in Markdown: the layer beside published figures, each of its kernels, and the model beside products that
others measured. ``--library-tflops`` is what the vendor's library reaches on the GPU in BF16 for large matrices.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.layer import SHAPES, Shape
from benchmarks.gpu.routers import expert_ids
from benchmarks.predict import published
from benchmarks.predict.layer import Launch, Passes, record_experts, record_layer, seconds, work_of
from benchmarks.predict.model import Chip, chip_of, predict

LIBRARY_TFLOPS = 798.0
"""Rate of a product of 8192 x 8192 x 8192 on the H100 that is to be used."""
SONIC_MOE = ((363, 404), (503, 512), (559, 568))
"""TFLOP/s, forward and backward, read off SonicMoE's chart (arXiv 2512.14080) to within 4, for the first shapes."""
ROUTERS = ("uniform", "zipf")


def rows_of(router: str, shape: Shape) -> list[int]:
    """Rows of each expert."""
    return torch.bincount(expert_ids(router, shape, "cpu").flatten(), minlength=shape.E).tolist()


def rates(passes: Passes, shape: Shape, rows_E: list[int], chip: Chip) -> list[int]:
    """TFLOP/s, forward and backward."""
    times = (seconds(recorded, shape, rows_E, chip) for recorded in passes)
    return [round(shape.operations * factor / time / 1e12) for factor, time in zip((1, 2), times, strict=True)]


def kernels(passes: Passes, shape: Shape, rows_E: list[int], chip: Chip) -> list[dict[str, Any]]:
    """Give what is predicted of each launch."""
    found = []
    for launch in (*passes.forward, *passes.backward):
        if not isinstance(launch, Launch):
            continue
        work = work_of(launch, shape, rows_E)
        result = predict(launch.code, work, chip)
        tile = " x ".join(str(launch.options[letter]) for letter in "MNK" if letter in launch.options)
        found.append(
            {
                "kernel": launch.kernel,
                "tile": tile,
                "warps": launch.code.warps,
                "registers": launch.code.registers,
                "shared": launch.code.shared,
                "programs": result.programs,
                "step": launch.code.step.instructions if launch.code.step else None,
                "around": launch.code.before.instructions
                + (launch.code.after.instructions if launch.code.after else 0),
                "ms": round(result.seconds * 1e3, 3),
                "tflops": round(work.operations / result.seconds / 1e12),
                "limit": result.limit,
                "limits_ms": {name: round(value * 1e3, 3) for name, value in result.limits.items()},
            }
        )
    return found


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--library-tflops", type=float, default=LIBRARY_TFLOPS, help="default %(default)s")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    args = parser.parse_args(argv)
    chip = chip_of(args.library_tflops)
    results: dict[str, Any] = {"chip": chip._asdict(), "shapes": {}}
    layers, parts = [], []
    for shape, sonic in zip(SHAPES, (*SONIC_MOE, None), strict=True):
        experts, layer = record_experts(shape), record_layer(shape)
        rows = {router: rows_of(router, shape) for router in ROUTERS}
        found: dict[str, Any] = {
            "experts": {router: rates(experts, shape, rows[router], chip) for router in ROUTERS},
            "layer": {router: rates(layer, shape, rows[router], chip) for router in ROUTERS},
            "slower": rates(experts, shape, rows["uniform"], chip_of(published.LIBRARY_TFLOPS)),
            "kernels": kernels(experts, shape, rows["uniform"], chip),
        }
        results["shapes"][str(shape)] = found
        pairs = [found[part][router] for part in ("experts", "layer") for router in ROUTERS]
        pairs.insert(2, found["slower"])
        layers.append([shape, *("/".join(map(str, pair)) for pair in pairs), "/".join(map(str, sonic or "-"))])
        parts += [
            [shape, *(value for name, value in kernel.items() if name != "limits_ms")] for kernel in found["kernels"]
        ]
    results["published"] = checks = published.compare()
    heads = [f"{part}, {router}" for part in ("experts", "layer") for router in ROUTERS]
    heads.insert(2, f"experts, uniform, library at {published.LIBRARY_TFLOPS:.0f}")
    print(table(["forward/backward, predicted TFLOP/s", *heads, "SonicMoE, measured"], layers))
    print(table(["shape", *(name for name in found["kernels"][0] if name != "limits_ms")], parts))
    for kernel, pairs_of_depth in checks.items():
        print(table([f"{kernel}, K", "predicted", "measured"], [[k, *pair] for k, pair in pairs_of_depth.items()]))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
