"""Run a function on several gloo ranks of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """What ``fn(*args)`` returns on rank 0 of a new world; every process computes with one thread.

    Args:
        fn: A function at the top level of a module.
        world_size: Number of processes.
        args: The same on every rank; pickled.
    """
    with tempfile.TemporaryDirectory() as scratch:
        mp.spawn(_rank, (world_size, Path(scratch), fn, args), nprocs=world_size)
        return torch.load(Path(scratch) / "result", weights_only=True)


def _rank(rank: int, world_size: int, scratch: Path, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=world_size)
    result = fn(*args)
    if rank == 0:
        torch.save(result, scratch / "result")
    dist.barrier()
    dist.destroy_process_group()
