"""What a checkpoint costs training: seconds that it stands still, with saves in the background and without.

    python -m benchmarks.checkpointing [--gigabytes 1] [--saves 5] [--directory /tmp]

Ranks share a synthetic state of fp32 tensors of 16 MB, sharded over them, and train on between saves: steps of matrix
products, until the save has ended. Both kinds of save alternate. Prints JSON: of 1 rank and of 2, the median seconds
that a save stops training, its first save apart (it also plans and allocates), and their ratio; how slow training is
while a save goes on; bytes hashed, saved and verified in a second. Files go through to the disk (fsync), so the seconds
of a synchronous save are a property of the disk; of a memory file system, if ``--directory`` names one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ranks import on_ranks
from moefoundry.checkpoint.manifest import Origin, damage, digest
from moefoundry.checkpoint.save import Saver
from moefoundry.checkpoint.store import CheckpointStore

TENSOR_BYTES = 16 * 10**6
STATE = {"recipe": {}, "weights_only": True}


def state_of(nbytes: int) -> dict[str, Tensor]:
    """Tensors of ``nbytes`` together, sharded over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh, ranks = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_world_size()
    rows = TENSOR_BYTES // 4 // 1000 // ranks
    return {
        f"model/{number}": DTensor.from_local(torch.randn(rows, 1000), mesh, [Shard(0)])
        for number in range(nbytes // TENSOR_BYTES)
    }


def measure(nbytes: int, saves: int, directory: Path) -> dict[str, Any]:
    """The figures of one world; every rank calls it."""
    torch.set_num_threads(1)
    tensors = state_of(nbytes)
    stall: dict[str, list[float]] = {"synchronous": [], "background": []}
    calm, busy = [], []
    savers = {kind: Saver(CheckpointStore(directory / kind), lambda checkpoint: None) for kind in stall}
    x = torch.randn(500, 500)

    def step() -> float:
        start = time.perf_counter()
        for _ in range(10):
            x @ x
        return time.perf_counter() - start

    for number in range(1 + saves):
        for kind, saver in savers.items():
            begin = saver.save if kind == "synchronous" else saver.start
            dist.barrier()
            start = time.perf_counter()
            begin(number, tensors, STATE, Origin(number))
            stall[kind].append(time.perf_counter() - start)
            while saver.is_writing:
                busy.append(step())
            saver.finish()
            calm += [step() for _ in range(5)]
            if dist.get_rank() == 0:
                shutil.rmtree(saver.store.path(number - 1), ignore_errors=True)
    median = {kind: statistics.median(seconds[1:]) for kind, seconds in stall.items()}
    start = time.perf_counter()
    assert not damage(savers["synchronous"].store.path(saves))
    verify_seconds = time.perf_counter() - start
    return {
        "synchronous_seconds": round(median["synchronous"], 3),
        "stall_seconds": round(median["background"], 3),
        "stall_share": round(median["background"] / median["synchronous"], 3),
        "first": {kind: round(seconds[0], 3) for kind, seconds in stall.items()},
        "saved_gb_per_second": round(nbytes / 1e9 / median["synchronous"], 2),
        "verified_gb_per_second": round(nbytes / 1e9 / verify_seconds, 2),
        "step_during_save": round(statistics.median(busy) / statistics.median(calm), 2) if busy else None,
    }


def hashing() -> float:
    """Bytes that one core hashes in a second, in GB."""
    block = memoryview(bytes(16 * 2**20))
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        digest(block)
        seconds.append(time.perf_counter() - start)
    return round(len(block) / 1e9 / statistics.median(seconds), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="What checkpoints cost training.")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the state, all ranks (default 1)")
    parser.add_argument("--saves", type=int, default=5, help="saves of each kind after the first (default 5)")
    parser.add_argument("--directory", help="where to write (default: a temporary directory)")
    args = parser.parse_args()
    results: dict[str, Any] = {"gigabytes": args.gigabytes, "hashed_gb_per_second": hashing()}
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory(prefix="checkpointing-", dir=args.directory) as scratch:
            arguments = (int(args.gigabytes * 1e9), args.saves, Path(scratch))
            results[f"{ranks} rank{'s' if ranks > 1 else ''}"] = on_ranks(measure, ranks, *arguments)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
