"""Count what ranks send to each other, from the operations themselves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode

_functional = torch.ops._c10d_functional


class CrossingBytes(TorchDispatchMode):
    """Bytes that this rank sends in exchanges of rows and counts, while it is active (forward and backward on a CPU).

    Attributes:
        calls: How often each collective ran.
        sent: Bytes to other ranks.
        crossing: Those of them that go to ranks of another node.
    """

    def __init__(self, ranks_per_node: int) -> None:
        super().__init__()
        self.ranks_per_node = ranks_per_node
        self.calls: Counter[str] = Counter()
        self.sent = self.crossing = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is _functional.all_to_all_single.default:
            rows, _, send, group = args
            row_bytes = rows.element_size() * rows[0].numel() if len(rows) else 0
            self._count("all_to_all", group, [count * row_bytes for count in send])
        elif func is _functional.all_gather_into_tensor.default:
            tensor, size, group = args
            self._count("all_gather", group, [tensor.nbytes] * size)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, group: str, sizes: list[int]) -> None:
        self.calls[name] += 1
        own = dist.get_rank()
        for rank, size in zip(dist.get_process_group_ranks(_resolve_process_group(group)), sizes, strict=True):
            self.sent += size * (rank != own)
            self.crossing += size * (rank // self.ranks_per_node != own // self.ranks_per_node)
