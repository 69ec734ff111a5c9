"""Triton kernels of MegaBlocks and stk for tensors on the CPU, in plain torch.

Each function has the name and the arguments of the one that it stands for, in ``megablocks.backend.kernels`` or
``stk.backend.triton_kernels``. It is called for tensors on the CPU only: on a GPU, and in Triton's interpreter, the
kernels run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor


def stand_in(module: ModuleType, functions: dict[str, Callable[..., Any]]) -> None:
    """Let ``functions`` take the place of those of ``module`` for tensors on the CPU."""
    if not triton.knobs.runtime.interpret:
        for name, function in functions.items():
            setattr(module, name, _by_device(getattr(module, name), function))


def _by_device(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def call(*args: Any) -> Any:
        on_cpu = next(arg.device.type == "cpu" for arg in args if isinstance(arg, Tensor) and not arg.is_meta)
        return (plain if on_cpu else kernel)(*args)

    return call


# -------------------------------------------------------------------------- rows of experts, megablocks.backend.kernels


def padded_gather(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, padded_bins: Tensor, top_k: int
) -> Tensor:
    """[T, D] -> [P, D]: a copy of each token for each of its slots, at the slot's place; zeros elsewhere."""
    out = x.new_zeros(int(padded_bins[-1]), x.shape[1])
    out[_places(indices, bin_ids, bins, padded_bins)] = _weighted(x[indices.long() // top_k], weights, indices)
    return out


def padded_scatter(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, padded_bins: Tensor, top_k: int
) -> Tensor:
    """[P, D] -> [T, D]: each token's sum over its slots."""
    out = x.new_empty(len(indices), x.shape[1])
    out[indices.long()] = _weighted(x[_places(indices, bin_ids, bins, padded_bins)], weights, indices)
    return out.view(-1, top_k, x.shape[1]).sum(1)


def padded_scatter_wgrad(
    x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, padded_bins: Tensor, top_k: int
) -> Tensor:
    """[P, D], [T, D] -> [T * K]: the gradient of each slot's weight."""
    rows = x[_places(indices, bin_ids, bins, padded_bins)].float() * grad[indices.long() // top_k].float()
    out = x.new_empty(len(indices))
    out[indices.long()] = rows.sum(-1).to(x.dtype)
    return out


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """:func:`padded_gather` without padding."""
    return padded_gather(x, indices, bin_ids, weights, bins, bins, top_k)


def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """:func:`padded_scatter` without padding."""
    return padded_scatter(x, indices, bin_ids, weights, bins, bins, top_k)


def scatter_wgrad(x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """:func:`padded_scatter_wgrad` without padding."""
    return padded_scatter_wgrad(x, grad, indices, bin_ids, bins, bins, top_k)


def binned_gather(
    x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, expert_capacity: int, top_k: int
) -> Tensor:
    """[T, D] -> [E, capacity, D]: the first tokens of each expert; zeros elsewhere."""
    slots, place = _within_capacity(indices, bins, expert_capacity)
    out = x.new_zeros(len(bins) * expert_capacity, x.shape[1])
    return out.index_copy_(0, place, _weighted(x[slots // top_k], weights, slots)).view(len(bins), expert_capacity, -1)


def binned_scatter(x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """[E, capacity, D] -> [T, D]: each token's sum over its slots that had a place."""
    slots, place = _within_capacity(indices, bins, x.shape[1])
    rows = _weighted(x.flatten(0, 1)[place], weights, slots)
    return x.new_zeros(len(indices), x.shape[2]).index_copy_(0, slots, rows).view(-1, top_k, x.shape[2]).sum(1)


def binned_scatter_wgrad(x: Tensor, grad: Tensor, indices: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """[E, capacity, D], [T, D] -> [T * K]: the gradient of each slot's weight; 0 where it had no place."""
    slots, place = _within_capacity(indices, bins, x.shape[1])
    rows = x.flatten(0, 1)[place].float() * grad[slots // top_k].float()
    return x.new_zeros(len(indices)).index_copy_(0, slots, rows.sum(-1).to(x.dtype))


OF_MEGABLOCKS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        *(padded_gather, padded_scatter, padded_scatter_wgrad),
        *(gather, scatter, scatter_wgrad),
        *(binned_gather, binned_scatter, binned_scatter_wgrad),
    )
}


def _weighted(rows: Tensor, weights: Tensor | None, slots: Tensor) -> Tensor:
    return rows if weights is None else (rows.float() * weights[slots.long()].float().unsqueeze(1)).to(rows.dtype)


def _places(indices: Tensor, bin_ids: Tensor, bins: Tensor, padded_bins: Tensor) -> Tensor:
    """Row of each sorted slot among the padded rows."""
    expert = bin_ids.long()
    starts, padded_starts = (torch.cat([ends.new_zeros(1), ends])[expert] for ends in (bins, padded_bins))
    return torch.arange(len(indices)) - starts.long() + padded_starts.long()


def _within_capacity(indices: Tensor, bins: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Slots that their experts take, and their places among E * capacity."""
    sorted_slot = torch.arange(len(indices))
    expert = torch.searchsorted(bins.contiguous(), sorted_slot.to(bins.dtype), right=True).clamp_(max=len(bins) - 1)
    among = sorted_slot - torch.cat([bins.new_zeros(1), bins])[expert].long()
    taken = among < capacity
    return indices[taken].long(), (expert * capacity + among)[taken]


# --------------------------------------------------------------- block-sparse products, stk.backend.triton_kernels


def row_indices(shape: Any, data: Tensor, offsets: Tensor, column_indices: Tensor, out: Tensor) -> None:
    """Write each block's row to ``out``."""
    counts = offsets.diff()
    out.copy_(torch.arange(len(counts)).repeat_interleave(counts))


def sdd(
    lhs: Tensor, rhs: Tensor, shape: Any, out: Tensor, offsets: Tensor, row_indices: Tensor, column_indices: Tensor
) -> None:
    """Write the blocks of the product of two dense matrices to ``out``."""
    size = out.shape[-1]
    left, right = lhs.unflatten(0, (-1, size)), rhs.T.unflatten(0, (-1, size))
    for block, row, column in zip(out, row_indices.tolist(), column_indices.tolist(), strict=True):
        block.copy_(left[row] @ right[column].T)


def dsd(
    shape: Any,
    data: Tensor,
    offsets: Tensor,
    row_indices: Tensor,
    column_indices: Tensor,
    offsets_t: Tensor,
    column_indices_t: Tensor,
    block_offsets_t: Tensor,
    transpose_a: bool,
    rhs: Tensor,
    out: Tensor,
) -> None:
    """Write the product of a sparse and a dense matrix to ``out``."""
    out.copy_(_dense(shape, data, row_indices, column_indices, transpose_a) @ rhs)


def dds(
    lhs: Tensor,
    shape: Any,
    data: Tensor,
    offsets: Tensor,
    row_indices: Tensor,
    column_indices: Tensor,
    offsets_t: Tensor,
    column_indices_t: Tensor,
    block_offsets_t: Tensor,
    transpose_b: bool,
    out: Tensor,
) -> None:
    """Write the product of a dense and a sparse matrix to ``out``."""
    out.copy_(lhs @ _dense(shape, data, row_indices, column_indices, transpose_b))


OF_STK: dict[str, Callable[..., Any]] = {function.__name__: function for function in (row_indices, sdd, dsd, dds)}


def _dense(shape: Any, data: Tensor, rows: Tensor, columns: Tensor, transposed: bool) -> Tensor:
    """Write a sparse matrix out with its zeros, or its transpose; ``shape`` is that of what is returned."""
    size, (height, width) = data.shape[-1], reversed(shape) if transposed else shape
    dense = data.new_zeros(height // size, width // size, size, size)
    dense[rows.long(), columns.long()] = data
    dense = dense.transpose(1, 2).reshape(height, width)
    return dense.T if transposed else dense
