"""The order of the rows by a counting sort in three Triton kernels, for ``ops/permute.py``.

Slots are cut into blocks. The first kernel counts each expert's slots in each block; the second sums the counts of the
blocks before; the third adds a slot's rank among those of its block, which gives its row. Nothing waits for the host,
and whatever runs first, the order is the same: stable, as a sort's.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# a kernel's arguments have types of Triton's own, those of its launch

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
"""Slots of a block; each is compared with all of them."""
PART = 1024
"""Blocks whose counts are summed at a time."""


def order_slots(ids_S: Tensor, num_experts: int, top_k: int, kept_S: Tensor | None, num_rows: int) -> list[Tensor]:
    """Compute the tensors of a :class:`~moefoundry.ops.permute.RowOrder`.

    Args:
        ids_S: Integer [T * K], T > 0; those that are kept in [0, num_experts).
        num_experts: E, at most 1024.
        top_k: K.
        kept_S: bool [T * K], slots that get a row; None keeps all.
        num_rows: N, the number of kept slots.
    """
    slots, blocks = len(ids_S), triton.cdiv(len(ids_S), BLOCK)
    ids_S, kept_S = ids_S.contiguous(), None if kept_S is None else kept_S.contiguous()
    counts = ids_S.new_empty(blocks, num_experts, dtype=torch.int32)
    sizes = num_rows, num_rows, slots // top_k + 1, num_experts
    *order, totals_E = (ids_S.new_empty(size, dtype=torch.int64) for size in sizes)
    constants = {"E": triton.next_power_of_2(num_experts), "BLOCK": BLOCK, "num_warps": 4}
    count_slots[(blocks,)](ids_S, kept_S, counts, slots, num_experts, **constants)
    sum_blocks[(num_experts,)](counts, totals_E, blocks, num_experts, PART=PART, num_warps=4)
    place_slots[(blocks,)](ids_S, kept_S, counts, totals_E, *order, slots, num_rows, num_experts, top_k, **constants)
    return [*order, totals_E]


@triton.jit
def experts_of(slot, ids, kept, slots):
    """Load the experts of slots; -1 for a slot that has no row."""
    inside = slot < slots
    if kept is not None:
        inside = inside & (tl.load(kept + slot, mask=inside, other=0) != 0)
    return tl.load(ids + slot, mask=inside, other=-1).to(tl.int32)


@triton.jit
def count_slots(ids, kept, counts, slots, experts, E: tl.constexpr, BLOCK: tl.constexpr):
    """Count each expert's slots in one block."""
    block, one = tl.program_id(0), tl.arange(0, E)
    expert = experts_of(block * BLOCK + tl.arange(0, BLOCK), ids, kept, slots)
    found = tl.histogram(tl.maximum(expert, 0), E, mask=expert >= 0)
    tl.store(counts + block.to(tl.int64) * experts + one, found, mask=one < experts)


@triton.jit
def sum_blocks(counts, totals, blocks, experts, PART: tl.constexpr):
    """Replace one expert's count in each block by the sum of those before, and write its total."""
    expert, total = tl.program_id(0), tl.zeros([], tl.int32)
    for first in range(0, blocks, PART):
        block = first + tl.arange(0, PART)
        place = counts + block.to(tl.int64) * experts + expert
        count = tl.load(place, mask=block < blocks, other=0)
        tl.store(place, total + tl.cumsum(count, 0) - count, mask=block < blocks)
        total += tl.sum(count, 0)
    tl.store(totals + expert, total.to(tl.int64))


@triton.jit
def place_slots(
    ids,
    kept,
    counts,
    totals,
    slot_of_row,
    row_of_kept_slot,
    first_of_token,
    slots,
    rows,
    experts,
    top_k,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the rows of one block's slots, in both directions, and the first of each token; none from ``rows`` on."""
    block, one = tl.program_id(0), tl.arange(0, E)
    real = one < experts
    before = tl.load(counts + block.to(tl.int64) * experts + one, mask=real, other=0)
    total = tl.load(totals + one, mask=real, other=0).to(tl.int32)
    start = tl.cumsum(total, 0) - total + before
    lane = tl.arange(0, BLOCK)
    slot = block * BLOCK + lane
    expert, others = experts_of(slot, ids, kept, slots), experts_of(slot, ids, kept, slots)[:, None]
    earlier = lane[:, None] < lane[None, :]
    rank = tl.sum((earlier & (others == expert[None, :])).to(tl.int32), 0)
    row = tl.gather(start, tl.maximum(expert, 0), 0) + rank
    number = slot
    if kept is not None:
        number = tl.sum(before, 0) + tl.sum((earlier & (others >= 0)).to(tl.int32), 0)
    tl.store(slot_of_row + row, slot.to(tl.int64), mask=(expert >= 0) & (row < rows))
    tl.store(row_of_kept_slot + number, row.to(tl.int64), mask=(expert >= 0) & (number < rows))
    tl.store(first_of_token + slot // top_k, number.to(tl.int64), mask=(slot < slots) & (slot % top_k == 0))
    last = (number + (expert >= 0)).to(tl.int64)
    tl.store(first_of_token + slots // top_k + 0 * lane, last, mask=slot == slots - 1)
