"""Which bytes fill which boxes, worked out by hand; no file is opened and no process group exists."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

from moefoundry.checkpoint.format import Box, FileRange, StoredTensor, TensorSpec
from moefoundry.checkpoint.load_plan import Need, ShardRead, first_copy, plan_load

TOP, BOTTOM = Box((0, 0), (2, 6)), Box((2, 0), (4, 6))
LEFT, RIGHT = Box((0, 0), (4, 3)), Box((0, 3), (4, 6))
WHOLE = Box((0, 0), (4, 6))


def stored(dtype: torch.dtype = torch.float32) -> StoredTensor:
    """4 x 6 values, saved by two ranks that had half the rows each."""
    places = {TOP: FileRange("a", 0, 600), BOTTOM: FileRange("b", 64, 600)}
    return StoredTensor(TensorSpec((4, 6), dtype), places)


def test_a_rank_with_the_same_shard_reads_its_own_file() -> None:
    assert not dist.is_initialized()
    plan = plan_load({"w": stored()}, {"w": {0: TOP, 1: BOTTOM}})
    (tensor,) = plan.tensors
    assert (tensor.name, tensor.dtype) == ("w", torch.float32)
    assert tensor.reads == [
        ShardRead(TOP, FileRange("a", 0, 600), [Need(0, TOP)]),
        ShardRead(BOTTOM, FileRange("b", 64, 600), [Need(1, BOTTOM)]),
    ]
    assert plan.readers == {"a": 0, "b": 1}


def test_columns_are_cut_out_of_rows() -> None:
    """Each rank needs a half of each stored shard, so each file has a reader of its own: there is as much to read."""
    plan = plan_load({"w": stored()}, {"w": {0: LEFT, 1: RIGHT}})
    needs = [read.needs for read in plan.tensors[0].reads]
    assert needs == [
        [Need(0, Box((0, 0), (2, 3))), Need(1, Box((0, 3), (2, 6)))],
        [Need(0, Box((2, 0), (4, 3))), Need(1, Box((2, 3), (4, 6)))],
    ]
    assert plan.readers == {"a": 0, "b": 1}


def test_what_nobody_wants_is_not_read() -> None:
    plan = plan_load({"w": stored(), "other": stored()}, {"w": {3: Box((3, 5), (4, 6))}})
    assert [read.place.file for tensor in plan.tensors for read in tensor.reads] == ["b"]
    assert plan.tensors[0].reads[0].needs == [Need(3, Box((3, 5), (4, 6)))]
    assert plan.readers == {"b": 3}


def test_the_rank_that_needs_most_of_a_file_reads_it_and_of_equals_the_least_busy() -> None:
    """Of file a rank 0 needs all 12 values. Of file b ranks 0 and 1 need 6 each, and rank 1 has nothing to read yet."""
    plan = plan_load({"w": stored()}, {"w": {0: Box((0, 0), (3, 6)), 1: Box((3, 0), (4, 6))}})
    assert plan.readers == {"a": 0, "b": 1}
    plan = plan_load({"w": stored()}, {"w": {0: Box((0, 0), (3, 6)), 1: Box((3, 0), (4, 5))}})
    assert plan.readers == {"a": 0, "b": 0}


def test_tensors_keep_their_order_and_scalars_have_one_box() -> None:
    step = StoredTensor(TensorSpec((), torch.float32), {Box((), ()): FileRange("c", 0, 400)})
    plan = plan_load({"step": step, "w": stored()}, {"w": {0: WHOLE}, "step": {0: Box((), ())}})
    assert [tensor.name for tensor in plan.tensors] == ["w", "step"]
    assert plan.tensors[1].reads[0].needs == [Need(0, Box((), ()))]


def test_shards_that_leave_a_hole_are_an_error() -> None:
    holed = StoredTensor(TensorSpec((4, 6), torch.float32), {TOP: FileRange("a", 0, 600)})
    assert plan_load({"w": holed}, {"w": {0: TOP}}).readers == {"a": 0}
    with pytest.raises(ValueError, match="a part of w is in no file"):
        plan_load({"w": holed}, {"w": {0: Box((1, 0), (3, 6))}})


def test_the_first_copy_is_on_the_first_ranks_of_every_copied_axis() -> None:
    """Ranks 0 and 1 have one copy of a tensor of 5 rows, ranks 2 and 3 the other."""
    ranks = torch.arange(4).view(2, 2)
    rows = {0: Box((0, 0), (3, 2)), 1: Box((3, 0), (5, 2))}
    assert first_copy((5, 2), ranks, (Replicate(), Shard(0))) == rows
    assert first_copy((5, 2), ranks, (Replicate(), Replicate())) == {0: Box((0, 0), (5, 2))}
    both = first_copy((4, 2), ranks, (Shard(0), Shard(1)))
    assert both == {r: Box((r // 2 * 2, r % 2), (r // 2 * 2 + 2, r % 2 + 1)) for r in range(4)}


def test_a_box_is_a_view() -> None:
    values = torch.arange(24.0).view(4, 6)
    inner = Box((2, 1), (3, 4))
    assert inner.of(BOTTOM.of(values, WHOLE), BOTTOM).tolist() == [[13.0, 14.0, 15.0]]
    assert (inner.sizes, inner.numel) == ((1, 3), 3)
