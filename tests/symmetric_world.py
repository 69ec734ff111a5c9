"""One rank among many that are all alike, in one process: collectives of the fake backend, with results.

PyTorch's fake process group lets any number of ranks be one process, and leaves the results of collectives as memory
was. If every rank has the same tokens and the same shards, what another rank sends to this one is what this one sends
to itself. So a step of 64 ranks can be taken here, with its real groups, splits and sizes. Only what other ranks'
experts would compute is not known: results that return have the values of this rank's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

c10d, functional = torch.ops.c10d, torch.ops._c10d_functional


class SymmetricWorld(TorchDispatchMode):
    """Gives collectives the results that they have among ranks with equal tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is functional.all_to_all_single:
            rows, receive, send, name = args
            return from_each(rows.split(send)[_resolve_process_group(name).rank()], receive)
        if packet is functional.all_gather_into_tensor:
            return args[0].repeat(args[1], *[1] * (args[0].dim() - 1))
        result = func(*args, **(kwargs or {}))
        if packet is c10d._allgather_base_:
            whole, shard = args[:2]
            whole.copy_(shard.repeat(whole.numel() // shard.numel()).view_as(whole))
        elif packet is c10d._reduce_scatter_base_:
            shard, whole = args[:2]
            shard.copy_(whole.flatten()[: shard.numel()].view_as(shard))
        return result


def from_each(own: Tensor, receive: list[int]) -> Tensor:
    """Rows as from each rank: this rank's own, in turn."""
    if not len(own):
        return own.new_zeros(sum(receive), *own.shape[1:])
    return own[torch.cat([torch.arange(rows) % len(own) for rows in receive])]
