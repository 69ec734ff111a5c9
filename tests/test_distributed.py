"""The harness that other tests trust: results by rank, failures with their rank, nothing left behind."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, captured_output, run_distributed


def total(start: int) -> tuple[int, torch.Tensor, dict[str, str]]:
    value = torch.tensor(float(start + dist.get_rank()))
    dist.all_reduce(value)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
    return dist.get_rank(), value, {name: os.environ[name] for name in names}


def test_results_come_by_rank_from_one_world() -> None:
    for rank, (own_rank, value, environment) in enumerate(run_distributed(total, 2, 10)):
        assert own_rank == rank
        assert value == 21.0
        assert environment == {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "NODE_RANK": "0",
        }


def fail_on_one_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        print("last words")
        raise ValueError("a bad value")
    dist.barrier()


def test_an_exception_is_raised_with_its_rank_traceback_and_output() -> None:
    with pytest.raises(ValueError, match="a bad value") as raised:
        run_distributed(fail_on_one_rank, 2, 1)
    note = raised.value.__notes__[0]
    assert note.startswith("rank 1: Traceback")
    assert "in fail_on_one_rank" in note
    assert "last words" in note


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.endswith("_locals")}


def die_with_shared_memory() -> None:
    from streaming.base.shared import SharedMemory, prefix

    SharedMemory(f"{next(prefix._each_prefix_int()):06}_locals", True, 8)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_is_named_and_its_shared_memory_removed() -> None:
    before = segments()
    with pytest.raises(RankError, match="rank 0 ended with exit status -9"):
        run_distributed(die_with_shared_memory, 1)
    assert segments() <= before


def hang_on_one_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def test_a_hanging_rank_is_named_with_its_stack() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1 ran out of time") as raised:
        run_distributed(hang_on_one_rank, 2, 1, timeout=2.0)
    assert "in hang_on_one_rank" in raised.value.__notes__[0]
    assert time.monotonic() - start < 300


def speak() -> list[str]:
    with captured_output() as texts:
        print("to a person")
        os.write(2, b"from a library\n")
        print("and again", file=sys.stderr)
    return texts


def test_output_is_captured_below_python() -> None:
    assert run_distributed(speak, 1) == [["to a person\n", "from a library\nand again\n"]]
