"""Rows in blocks of 128, each of one expert, and the block-sparse matrix that they make.

R blocks of rows times the E * C blocks of columns of all experts' hidden units (C = F / 128): a block of rows has the
C blocks of its expert. Experts' rows are filled up to whole blocks. How many blocks that takes only the device knows;
R is a bound that the host knows too, so that nothing waits: blocks past the real ones belong to no expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moefoundry.ops.block_sparse.kernels import BLOCK
from moefoundry.ops.permute import RowOrder


class Topology(NamedTuple):
    """Places of the R * C blocks, by row and by column; int32.

    Attributes:
        offsets: [R + 1]; first block of each block row. Rows of no expert have none.
        row_indices, column_indices: [R * C]; place of each block.
        offsets_t: [E * C + 1]; first entry of each block column in the next two.
        row_indices_t: [R * C]; block rows, by column.
        blocks_t: [R * C]; the blocks in that order.
    """

    offsets: Tensor
    row_indices: Tensor
    column_indices: Tensor
    offsets_t: Tensor
    row_indices_t: Tensor
    blocks_t: Tensor


def find_topology(padded: RowOrder, columns: int) -> Topology:
    """Place the blocks.

    Args:
        padded: From :func:`~moefoundry.ops.permute.pad_order`, in blocks of 128 rows.
        columns: C, block columns of each expert.
    """
    blocks_E = padded.tokens_per_expert_E // BLOCK
    experts, rows, device = len(blocks_E), len(padded.slot_of_row_N) // BLOCK, blocks_E.device
    ends_E = blocks_E.cumsum(0)
    starts_E = ends_E - blocks_E
    row_R = torch.arange(rows, device=device)
    expert_R = torch.searchsorted(ends_E, row_R, right=True).clamp_(max=max(experts - 1, 0))
    column_C = torch.arange(columns, device=device)
    block_RC = torch.arange(rows * columns, device=device).view(rows, columns)
    first_EC = starts_E[:, None] * columns + column_C * blocks_E[:, None]
    among_R = row_R - starts_E[expert_R]
    real_R1 = (row_R < ends_E[-1]).unsqueeze(1)
    place_RC = torch.where(real_R1, first_EC[expert_R] + among_R[:, None], block_RC).flatten()
    row_RC = row_R[:, None].expand(rows, columns).flatten()
    end = ends_E[-1:] * columns
    tensors = (
        torch.arange(0, rows * columns + 1, columns, device=device).minimum(end),
        row_RC,
        (expert_R[:, None] * columns + column_C).flatten(),
        torch.cat([first_EC.flatten(), end]),
        torch.empty_like(row_RC).index_copy_(0, place_RC, row_RC),
        torch.empty_like(row_RC).index_copy_(0, place_RC, block_RC.flatten()),
    )
    return Topology(*(tensor.to(torch.int32) for tensor in tensors))
