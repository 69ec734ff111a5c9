"""Stand-in for MegaBlocks' CUDA extension, the module ``megablocks_ops``, in plain torch.

Its seven functions with their names and arguments, on any device, without a wait for the host. MegaBlocks calls them in
``megablocks/ops/{cumsum,histogram,replicate,sort,topology}.py`` only.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_INDEX = torch.iinfo(torch.int16).max


def histogram(x: Tensor, num_bins: int) -> Tensor:
    """Count the values 0 ... num_bins - 1 along the last dimension; other values are not counted.

    Args:
        x: Integers, [N] or [B, N].
        num_bins: Number of values.

    Returns:
        int32 [num_bins] or [B, num_bins].
    """
    rows = (x.unsqueeze(0) if x.dim() == 1 else x).long()
    inside = rows.where((rows >= 0) & (rows < num_bins), num_bins)
    counts = torch.zeros(len(rows), num_bins + 1, dtype=torch.int32, device=x.device)
    counts.scatter_add_(1, inside, torch.ones_like(inside, dtype=torch.int32))
    return counts[:, :num_bins].reshape(*x.shape[:-1], num_bins)


def inclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Write the sums of the elements up to each one, itself included, to ``out``."""
    out.copy_(x.cumsum(dim, dtype=x.dtype))


def exclusive_cumsum(x: Tensor, dim: int, out: Tensor) -> None:
    """Write the sums of the elements before each one to ``out``."""
    out.copy_(x.cumsum(dim, dtype=x.dtype) - x)


def sort(x: Tensor, end_bit: int, x_out: Tensor, iota_out: Tensor) -> None:
    """Sort stably by the lowest ``end_bit`` bits.

    Args:
        x: int16, int32 or int64 [N].
        end_bit: Number of bits; with all of them the order is that of the signed integers.
        x_out: The sorted values are written here.
        iota_out: Their places in ``x`` are written here.
    """
    keys = x if end_bit >= torch.iinfo(x.dtype).bits else x & ((1 << end_bit) - 1)
    order = torch.sort(keys, stable=True).indices
    x_out.copy_(x[order])
    iota_out.copy_(order)


def indices(
    padded_bins: Tensor, block_size: int, output_block_rows: int, output_block_columns: int, out: Tensor
) -> None:
    """Write the block columns of each block row: all those of the expert that the rows belong to.

    Args:
        padded_bins: int32 [E]; ends of the experts' rows.
        block_size: Rows of a block.
        output_block_rows: Number of block rows.
        output_block_columns: Block columns of one expert.
        out: int16 [output_block_rows * output_block_columns].

    Raises:
        ValueError: More block rows or columns than int16 counts.
    """
    for what, count in (("rows", output_block_rows), ("columns", len(padded_bins) * output_block_columns)):
        if count > MAX_INDEX:
            raise ValueError(
                f"megablocks keeps places of blocks in int16: {count} blocks of {what} are more than {MAX_INDEX}; "
                "use smaller micro-batches, or mlp_impl grouped"
            )
    starts = torch.arange(output_block_rows, device=out.device, dtype=padded_bins.dtype) * block_size
    first = torch.searchsorted(padded_bins, starts, right=True) * output_block_columns
    out.copy_((first[:, None] + torch.arange(output_block_columns, device=out.device)).flatten())


def replicate_forward(x: Tensor, bins: Tensor, out: Tensor) -> None:
    """Repeat each bin's value over its places.

    Args:
        x: [B, number of bins].
        bins: int32; ends of the bins.
        out: [B, number of places], dtype as ``x``.
    """
    out.copy_(x.index_select(1, _bin_of_place(out.shape[1], bins).clamp_(max=x.shape[1] - 1)))


def replicate_backward(grad: Tensor, bins: Tensor, out: Tensor) -> None:
    """Sum over each bin's places, in fp32: the transpose of :func:`replicate_forward`."""
    total = torch.zeros(len(out), out.shape[1] + 1, device=out.device)
    total.index_add_(1, _bin_of_place(grad.shape[1], bins), grad.float())
    out.copy_(total[:, :-1])


def _bin_of_place(places: int, bins: Tensor) -> Tensor:
    return torch.searchsorted(bins.contiguous(), torch.arange(places, device=bins.device, dtype=bins.dtype), right=True)
