"""The command: ``python -m benchmarks.gpu --out DIR [--steps a,b] [--limit 560] [--device cpu --tiny]``.

``--render JSON...`` prints the table of results that were kept: ``benchmarks/GPU.md`` is made by it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path

from benchmarks.gpu.steps import STEPS, Options, Step


def main(argv: list[str] | None = None) -> int:
    """Run the steps, one of them, or render results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    names = [step.name for step in STEPS]
    parser.add_argument("--out", type=Path, help="directory for the JSON files and the table")
    parser.add_argument(
        "--steps", default=",".join(names), help="comma-separated, run in the order given (default: all)"
    )
    parser.add_argument("--limit", type=float, default=560.0, help="seconds for everything (default 560)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="does everything run? The figures mean nothing")
    parser.add_argument("--step", choices=names, help=argparse.SUPPRESS)  # of a step's own process
    parser.add_argument("--render", nargs="+", type=Path, metavar="JSON", help="print the table of kept results")
    args = parser.parse_args(argv)
    if args.render:
        from benchmarks.gpu.table import render

        print(render([json.loads(path.read_text()) for path in args.render]), end="")
        return 0
    if args.out is None:
        parser.error("--out is needed")
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu needs --tiny")
    options = Options(args.out.resolve(), args.device, args.tiny)
    named = list(dict.fromkeys(args.steps.split(",")))
    if unknown := set(named) - set(names):
        parser.error(f"no step is named {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    steps = [step for name in named for step in STEPS if step.name == name]
    return start(steps, options, args.limit, args.step)


def start(steps: list[Step], options: Options, limit: float, own: str | None) -> int:
    """Run all steps, or as a step's process that one."""
    from benchmarks.gpu import runner

    if own is not None:
        (step,) = (step for step in STEPS if step.name == own)
        runner.child(step, options)
        return 0
    if options.device == "cuda" and not has_device():
        print("no CUDA device: the driver names none", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    runner.Run(steps, options, limit).run()
    return 0


def has_device() -> bool:
    """Whether CUDA's driver is there and has a device; asks it without torch, whose import takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


if __name__ == "__main__":
    sys.exit(main())
