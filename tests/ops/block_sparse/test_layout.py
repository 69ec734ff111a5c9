"""Rows in blocks, and the places of blocks, against lists made one block at a time."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from moefoundry.ops.block_sparse import block_sparse_experts, function
from moefoundry.ops.block_sparse.layout import find_topology
from moefoundry.ops.permute import RowOrder, order_by_expert, pad_order

COUNTS = [[130, 0, 128, 1, 0], [0, 0, 300], [5], [1, 1, 1], [0, 256, 256, 0], [0, 0]]


def order_with(counts: list[int]) -> RowOrder:
    """Top-1 of tokens in random order."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return order_by_expert(ids[torch.randperm(len(ids))].unsqueeze(1), len(counts))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_rows_fill_whole_blocks(counts: list[int]) -> None:
    torch.manual_seed(0)
    order = order_with(counts)
    padded, slots, expected = pad_order(order, sum(counts), 128), order.slot_of_row_N.tolist(), []
    for count in counts:
        taken, slots = slots[:count], slots[count:]
        expected += taken + [sum(counts)] * (-count % 128)
    got = padded.slot_of_row_N.tolist()
    assert got[: len(expected)] == expected
    assert set(got[len(expected) :]) <= {sum(counts)}
    assert len(got) % 128 == 0
    assert [got[place] for place in padded.row_of_kept_slot_N.tolist()] == list(range(sum(counts)))
    assert padded.first_of_token.tolist() == [*range(sum(counts) + 1), sum(counts)]


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_blocks_are_where_experts_are(counts: list[int], columns: int) -> None:
    padded = pad_order(order_with(counts), sum(counts), 128)
    topology, rows = find_topology(padded, columns), len(padded.slot_of_row_N) // 128
    experts = [expert for expert, count in enumerate(counts) for _ in range(-(-count // 128))]
    real = [(row, expert * columns + c) for row, expert in enumerate(experts) for c in range(columns)]
    places = list(zip(topology.row_indices.tolist(), topology.column_indices.tolist(), strict=True))
    assert places[: len(real)] == real
    assert all(column < len(counts) * columns for _, column in places)  # those past the real ones are multiplied too
    assert topology.offsets.tolist() == [min(row * columns, len(real)) for row in range(rows + 1)]
    by_column = sorted(range(len(real)), key=lambda block: (real[block][1], real[block][0]))
    assert topology.blocks_t.tolist()[: len(real)] == by_column
    assert topology.row_indices_t.tolist()[: len(real)] == [real[block][0] for block in by_column]
    starts = [sum(column < c for _, column in real) for c in range(len(counts) * columns + 1)]
    assert topology.offsets_t.tolist() == starts


def test_nothing_waits_for_the_host() -> None:
    """Tensors on meta have no values: whatever asks for one raises."""

    def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    indices = {"slot_of_row_N": 60, "row_of_kept_slot_N": 60, "first_of_token": 31, "tokens_per_expert_E": 4}
    order = RowOrder(**{name: on_meta(size, dtype=torch.int64) for name, size in indices.items()}, top_k=2)
    leaves = on_meta(30, 128), on_meta(30, 2), on_meta(4, 256, 128), on_meta(4, 256, 128), on_meta(4, 128, 256)
    with mock.patch.object(function, "widened"):
        out = block_sparse_experts(*leaves, order)
        grads = torch.autograd.grad(out.sum(), leaves)
    assert out.shape == (30, 128)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
