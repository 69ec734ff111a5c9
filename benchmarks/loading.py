"""Time to load a checkpoint, beside a plain read of the same bytes into memory that is there already.

    python -m benchmarks.loading [--gigabytes 1] [--ranks 2] [--rounds 7] [--directory DIR]

Prints JSON: for 1 and ``--ranks`` ranks the median seconds of both, and the median ratio with its spread. Ranks read at
the same time, each the shards that it holds; with ``replicate`` the second half of them reads nothing and is sent what
the first has read. The files are in the page cache, so that the loader's own work (hashes, copies, exchange) shows as
much as it ever can.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks.harness import in_turn
from benchmarks.ranks import on_ranks
from moefoundry.checkpoint.load import read_into
from moefoundry.checkpoint.manifest import STATE_KEYS
from moefoundry.checkpoint.save import write
from moefoundry.mesh import MeshDegrees, build_meshes

COLUMNS = 2048
TENSOR_BYTES = 64 * 2**20


def state(nbytes: int, mesh: tuple[int, int, int]) -> dict[str, Tensor]:
    """Tensors of 64 MiB, of which each rank has its shard."""
    dense = build_meshes(MeshDegrees(*mesh), "cpu").dense
    placements = (Replicate(), Shard(0)) if dense.ndim == 2 else (Shard(0),)
    rows = TENSOR_BYTES // 4 // COLUMNS // mesh[1]
    return {
        f"model/{number}": DTensor.from_local(torch.rand(rows, COLUMNS), dense, placements, run_check=False)
        for number in range(max(1, nbytes // TENSOR_BYTES))
    }


def plain_read(files: list[tuple[Path, memoryview]]) -> None:
    """Read files into memory, and wait for the other ranks, as a load does."""
    for path, memory in files:
        with path.open("rb", buffering=0) as stream:
            done = 0
            while done < len(memory):
                done += stream.readinto(memory[done:]) or 0
    dist.barrier()


def measure(root: Path, nbytes: int, mesh: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Load and read in turn on every rank; what rank 0 saw."""
    tensors = state(nbytes, mesh)
    write(root, tensors, dict.fromkeys(STATE_KEYS, 0))
    mine = [path for path in sorted(root.glob("*.distcp")) if int(path.name.split("_")[2]) % mesh[1] == dist.get_rank()]
    files = [(path, memoryview(bytearray(path.read_bytes()))) for path in mine]
    contenders = {"load": partial(read_into, root, tensors), "read": partial(plain_read, files)}
    seconds = in_turn(contenders, rounds, warmup=1)
    ratios = [load / read for load, read in zip(seconds["load"], seconds["read"], strict=True)]
    return {
        **{f"{name}_seconds": round(statistics.median(values), 3) for name, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "smallest_ratio": round(min(ratios), 2),
        "largest_ratio": round(max(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to load a checkpoint.")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, help="where the checkpoints are written (default: a temporary one)")
    args = parser.parse_args()
    results = {}
    for mesh in ((1, 1, 1), (1, args.ranks, 1), (args.ranks, 1, 1)):
        with tempfile.TemporaryDirectory(prefix="loading-", dir=args.directory) as scratch:
            name = f"replicate {mesh[0]} x shard {mesh[1]}"
            nbytes = int(args.gigabytes * 1e9)
            results[name] = on_ranks(measure, mesh[0] * mesh[1], Path(scratch), nbytes, mesh, args.rounds)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
