"""Rows of groups, each of which begins on a new tile."""

from __future__ import annotations

import torch
from torch import Tensor

from moefoundry.ops.sizes import TILE


def padded_rows(group_sizes_E: Tensor, num_rows: int) -> Tensor:
    """Compute the index of each row after every group is padded to whole tiles, int64 [R]; the host does not wait.

    Args:
        group_sizes_E: int64 [E]; sums to R.
        num_rows: R.
    """
    padded_E = (group_sizes_E + TILE - 1) // TILE * TILE
    ends_E = group_sizes_E.cumsum(0)
    shift_E = (padded_E.cumsum(0) - padded_E) - (ends_E - group_sizes_E)
    row_R = torch.arange(num_rows, device=group_sizes_E.device)
    return row_R + shift_E[torch.searchsorted(ends_E, row_R, right=True)]


def all_rows(num_rows: int, device: torch.device) -> Tensor:
    """Give the sizes of one group that has every row, int64 [1]."""
    return torch.full((1,), num_rows, dtype=torch.int64, device=device)
