"""All-to-all of rows with uneven splits, and its gradient: the same exchange the other way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def all_to_all_rows(
    rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Send the first ``send_counts[0]`` rows to rank 0 of ``group``, the next to rank 1, ...

    Args:
        rows: [sum(send_counts), ...]; any dtype that the backend moves.
        send_counts: Rows for each rank; 0 is fine.
        receive_counts: Rows from each rank: what that rank's ``send_counts`` says of this one.
        group: All of its ranks call this, also those that have nothing to send or to receive.

    Returns:
        [sum(receive_counts), ...], rows of rank 0 first.
    """
    return _AllToAllRows.apply(rows, list(send_counts), list(receive_counts), group)


class _AllToAllRows(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.reverse = (receive_counts, send_counts, group)
        return _exchange(rows, send_counts, receive_counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, *ctx.reverse), None, None, None


def _exchange(rows: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
    dist.all_to_all_single(received, rows.contiguous(), receive_counts, send_counts, group=group)
    return received
