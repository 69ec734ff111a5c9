"""Joining the world: a rank's device, groups that have met, and exchanges of a step that was left."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moefoundry.callbacks import health
from moefoundry.config import MeshConfig, UserError
from moefoundry.mesh import Meshes, build_meshes, resolve_degrees
from moefoundry.ops.all_to_all import Splits, start_all_to_all
from moefoundry.retry import forget_step
from moefoundry.world import connect, device_of_rank
from tests.distributed import run_distributed
from tests.planning.sharded import fake_world


@pytest.mark.parametrize(("visible", "ranks", "number"), [(8, 8, 3), (8, 4, 3), (1, 4, 0), (1, 1, 0)])
def test_a_rank_has_its_own_gpu_and_exact_products(visible: int, ranks: int, number: int) -> None:
    """A launcher may show each rank one GPU: it has number 0 then, whatever the rank is."""
    found = made(visible, ranks)
    assert found._device == torch.device("cuda", number)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="8 ranks were started on a node with 4 GPUs"):
        made(4, 8)


def test_without_a_gpu_it_is_the_cpu() -> None:
    with mock.patch("torch.cuda.is_available", return_value=False):
        assert device_of_rank().name == "cpu"


def made(visible: int, ranks: int) -> Any:
    """The device of the last of a node's ranks, up to the fourth, on a node that shows so many GPUs."""
    rank = min(ranks, 4) - 1
    patches = {
        "is_available": lambda: True,
        "device_count": lambda: visible,
        "set_device": lambda device: None,
        "current_device": lambda: 0 if visible == 1 else rank,
    }
    environment = {"LOCAL_RANK": str(rank), "RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), "WORLD_SIZE": str(ranks)}
    with mock.patch.multiple(torch.cuda, **patches), mock.patch.dict("os.environ", environment):
        return device_of_rank()


def meshes_of(ranks: int, **degrees: int) -> Meshes:
    return build_meshes(resolve_degrees(MeshConfig(ranks_per_node=2, **degrees), ranks), "cpu")


def test_experts_that_all_ranks_divide_have_a_group_of_their_own() -> None:
    """Two collectives of one NCCL communicator wait for each other."""
    with fake_world(4):
        meshes = meshes_of(4, expert=4)
        assert meshes.dense.get_group("shard") is dist.group.WORLD
        assert meshes.expert.get_group() is not dist.group.WORLD
        assert dist.get_process_group_ranks(meshes.expert.get_group()) == [0, 1, 2, 3]


def groups_that_have_met() -> bool:
    meshes = meshes_of(4, replicate=2, expert=2)
    met = set()
    reduce = dist.all_reduce
    with mock.patch.object(dist, "all_reduce", lambda *args, group: (met.add(group), reduce(*args, group=group))):
        connect(meshes, torch.device("cpu"))
    views = (meshes.dense, meshes.expert, meshes.expert_fsdp)
    return met == {group for view in views for group in view.get_all_groups()}


def test_all_groups_meet_at_the_start() -> None:
    assert run_distributed(groups_that_have_met, 4) == [True] * 4


def rows_that_are_left() -> bool:
    group = dist.group.WORLD
    pending = start_all_to_all(torch.ones(4, 3), Splits([2, 2], [2, 2], group))
    rows = weakref.ref(pending)
    del pending
    gc.collect()
    assert rows() is not None, "torch keeps the rows of an exchange that nobody waits for"
    forget_step(torch.nn.Linear(1, 1))
    gc.collect()
    return rows() is None


def test_a_step_that_was_left_leaves_no_rows_under_way() -> None:
    assert run_distributed(rows_that_are_left, 2) == [True, True]


@pytest.mark.parametrize(("backend", "recorder"), [("nccl", "_dump_nccl_trace_json"), ("gloo", "_dump_fr_trace_json")])
def test_the_last_collective_is_read_from_the_backends_own_recorder(backend: str, recorder: str) -> None:
    recorded = SimpleNamespace(**{recorder: lambda *args: '{"entries": []}'})
    with (
        mock.patch.object(dist, "is_initialized", return_value=True),
        mock.patch.object(dist, "get_backend", return_value=backend),
        mock.patch.object(torch._C, "_distributed_c10d", recorded),
    ):
        assert health.last_collective() == ""
