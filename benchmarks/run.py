"""``python -m benchmarks.run [NAME]``: measure one or all of ``NAMES``, print the table, write ``results/``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from benchmarks import harness

NAMES = ("moe_layer", "end_to_end", "startup", "dispatch", "dispatch_cpu", "mesh", "ema")
BUSY = 0.5  # load average of a machine that is not quiet
Found = list[harness.Comparison] | tuple[list[harness.Comparison], list[str]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Compare moefoundry with its peers.")
    parser.add_argument("name", nargs="?", choices=[*NAMES, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="one small case of each, nothing written: does it run?")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side, over its ranks"
    )
    parser.add_argument("--ranks", type=int, default=1, help="processes of each side in end_to_end")
    parser.add_argument(
        "--allocator", choices=harness.ALLOCATORS, default="default", help="glibc settings of all sides"
    )
    args = parser.parse_args(argv)
    restart_with_environment(args, sys.argv[1:] if argv is None else argv)
    for name in NAMES if args.name == "all" else [args.name]:
        report(name, args)
    return 0


def restart_with_environment(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Start this process again with the settings that must be there from the start; every side inherits them."""
    wanted = harness.ALLOCATORS[args.allocator] | {
        "OMP_NUM_THREADS": str(args.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.run", *argv], os.environ | wanted)


def report(name: str, args: argparse.Namespace) -> None:
    """Run one benchmark, print its table, and write its record unless it was a quick one."""
    about = harness.machine(args.threads, args.allocator)
    if about["load_average"] > BUSY:
        print(f"warning: load average {about['load_average']:.2f}; the machine is not quiet", file=sys.stderr)
    found = BENCHMARKS[name](args)
    comparisons, notes = found if isinstance(found, tuple) else (found, [])
    record = harness.Record(name, about, comparisons, notes)
    print(
        harness.render([record]) if args.quick else f"{harness.write(record)}\n{harness.render([record])}", flush=True
    )


def run_moe_layer(args: argparse.Namespace) -> list[harness.Comparison]:
    import torch

    from benchmarks import moe_layer

    torch.set_num_threads(args.threads)
    return moe_layer.compare(quick=args.quick)


def run_end_to_end(args: argparse.Namespace) -> list[harness.Comparison]:
    from benchmarks import end_to_end

    prepare_data()
    return end_to_end.compare(args.threads, ranks=args.ranks, quick=args.quick)


def run_startup(args: argparse.Namespace) -> list[harness.Comparison]:
    from benchmarks import startup

    prepare_data()
    return startup.compare(args.threads, quick=args.quick)


def run_dispatch(args: argparse.Namespace) -> list[harness.Comparison]:
    from benchmarks import dispatch

    return dispatch.compare(quick=args.quick)


def run_dispatch_cpu(args: argparse.Namespace) -> Found:
    from benchmarks import dispatch

    return dispatch.compare_cpu(quick=args.quick)


def run_mesh(args: argparse.Namespace) -> list[harness.Comparison]:
    from benchmarks import mesh

    return mesh.compare(quick=args.quick)


def run_ema(args: argparse.Namespace) -> list[harness.Comparison]:
    from benchmarks import ema

    prepare_data()
    return ema.compare(args.threads, quick=args.quick)


def prepare_data() -> None:
    """The quickstart's data, packed; does nothing when they are there."""
    from benchmarks.worker import PACKED, RECIPE
    from moefoundry.config import load_recipe

    recipe = load_recipe(RECIPE, [PACKED])
    length = f"--max-seq-len={recipe.max_seq_len}"
    command = [sys.executable, "-m", "moefoundry", "prepare", "stdlib", recipe.train_loader.dataset.local, length]
    subprocess.run(command, cwd=harness.ROOT.parent, check=True)


BENCHMARKS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "moe_layer": run_moe_layer,
    "end_to_end": run_end_to_end,
    "startup": run_startup,
    "dispatch": run_dispatch,
    "dispatch_cpu": run_dispatch_cpu,
    "mesh": run_mesh,
    "ema": run_ema,
}

if __name__ == "__main__":
    sys.exit(main())
