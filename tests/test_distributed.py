"""The harness that other tests trust: results by rank, failures with their rank, nothing left behind."""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.conftest import pytest_collection_finish
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


def die_with_shared_memory(note: Path) -> None:
    from streaming.base.shared import SharedMemory, prefix

    segment = Path("/dev/shm") / f"{next(prefix._each_prefix_int()):06}_locals"
    SharedMemory(segment.name, True, 8)
    assert segment.exists()
    note.write_text(str(segment))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_is_named_and_its_shared_memory_removed(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 0 ended with exit status -9"):
        run_distributed(die_with_shared_memory, 1, tmp_path / "note")
    assert not Path((tmp_path / "note").read_text()).exists()


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


@pytest.mark.parametrize(("marks", "starts"), [(["gpu", "gpu"], 0), (["gpu", None], 1), ([], 0)])
def test_tests_of_a_gpu_alone_start_no_server(
    marks: list[str | None], starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = mock.Mock()
    monkeypatch.setitem(sys.modules, "tests.distributed", module)
    items = [SimpleNamespace(get_closest_marker={mark: mark}.get) for mark in marks]
    pytest_collection_finish(mock.Mock(items=items, **{"config.option.collectonly": False}))
    assert module.start_server.call_count == starts
