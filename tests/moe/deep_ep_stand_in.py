"""A stand-in for the package ``deep_ep``: the documented signatures and demands of DeepEP 2.1, exchanges by gloo.

Results are NaN, or -2, until their event has been waited for, and the arguments are what the kernels would read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64


@dataclass
class EPHandle:
    """The documented attributes that a caller may read, and the way of each row."""

    num_experts: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens_per_expert_list: list[int]
    token_of_sent: Tensor
    send: list[int]
    receive: list[int]


class EventOverlap:
    """Runs ``finish`` when the stream waits for it."""

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self.event = finish

    def current_stream_wait(self, release_handle: bool = False) -> None:
        assert self.event is not None, "an event is there with async_with_compute_stream only"
        self.event()


class ElasticBuffer:
    """All ranks of the group make it together."""

    made = 0

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        **configs: Any,
    ) -> None:
        assert num_max_tokens_per_rank > 0, "a buffer without room"
        assert hidden > 0
        rooms = [None] * group.size()
        dist.all_gather_object(rooms, num_max_tokens_per_rank, group)
        assert len(set(rooms)) == 1, "all ranks must hold the same value"
        self.group, self.num_max_tokens_per_rank, self.hidden = group, num_max_tokens_per_rank, hidden
        ElasticBuffer.made += 1

    def get_theoretical_num_sms(self, num_experts: int, num_topk: int) -> int:
        return 2 * (num_experts // num_experts + num_topk // num_topk)

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        cached = handle is not None
        num_sms = num_sms or self.get_theoretical_num_sms(num_experts, topk_idx.shape[1])
        self._check_rows(x)
        if handle is None:
            assert topk_idx.dtype == topk_idx_t
            assert topk_idx.is_contiguous()
            handle = self._plan(topk_idx, num_experts, num_max_tokens_per_rank, num_sms)
            assert len(x) == len(topk_idx) <= handle.num_max_tokens_per_rank == self.num_max_tokens_per_rank
            assert topk_weights.dtype == torch.float32
            assert topk_weights.is_contiguous()
        else:
            assert topk_idx is None
            assert num_sms == handle.num_sms
        came, wait_for_rows = self._exchange(x[handle.token_of_sent], handle.send, handle.receive)
        if cached:
            return came, None, None, handle, EventOverlap(wait_for_rows)
        ids, wait_for_ids = self._exchange(topk_idx[handle.token_of_sent], handle.send, handle.receive)
        weights, wait_for_weights = self._exchange(topk_weights[handle.token_of_sent], handle.send, handle.receive)
        local_experts = handle.num_experts // self.group.size()

        def finish() -> None:
            wait_for_rows(), wait_for_ids(), wait_for_weights()
            ids.sub_(self.group.rank() * local_experts)
            ids.masked_fill_((ids < 0) | (ids >= local_experts), -1)

        return came, ids, weights, handle, EventOverlap(finish)

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        self._check_rows(x)
        assert len(x) == sum(handle.receive)
        num_tokens = len(handle.topk_idx)
        summed, finish_rows = self._sum(x, handle, num_tokens)
        if topk_weights is None:
            return summed, None, EventOverlap(finish_rows)
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        weights, finish_weights = self._sum(topk_weights, handle, num_tokens)
        return summed, weights, EventOverlap(lambda: (finish_rows(), finish_weights()))

    def _check_rows(self, x: Tensor) -> None:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.shape[1] == self.hidden
        assert x.shape[1] * x.element_size() % 16 == 0

    def _plan(self, topk_idx: Tensor, num_experts: int, room: int, num_sms: int) -> EPHandle:
        ranks, local_experts = self.group.size(), num_experts // self.group.size()
        rank_of_slot = torch.where(topk_idx >= 0, topk_idx // local_experts, -1)
        tokens = [(rank_of_slot == rank).any(dim=1).nonzero().flatten() for rank in range(ranks)]
        counts = torch.tensor([[len(sent), 0] for sent in tokens])
        counts[:, 1] = room
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        assert (received[:, 1] == room).all(), "all ranks must hold the same value"
        slots = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        dist.all_reduce(slots, group=self.group)
        mine = slots.view(ranks, local_experts)[self.group.rank()].tolist()
        sizes = counts[:, 0].tolist(), received[:, 0].tolist()
        return EPHandle(num_experts, room, num_sms, topk_idx.clone(), mine, torch.cat(tokens), *sizes)

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int]) -> tuple[Tensor, Callable[[], None]]:
        came = torch.empty(sum(receive), *rows.shape[1:], dtype=rows.dtype)
        work = dist.all_to_all_single(came, rows, receive, send, self.group, async_op=True)
        out = torch.full_like(came, torch.nan if rows.is_floating_point() else -2)

        def finish() -> None:
            work.wait()
            out.copy_(came)

        return out, finish

    def _sum(self, rows: Tensor, handle: EPHandle, num_tokens: int) -> tuple[Tensor, Callable[[], None]]:
        returned, wait = self._exchange(rows, handle.receive, handle.send)
        out = torch.full((num_tokens, rows.shape[1]), torch.nan, dtype=rows.dtype)

        def finish() -> None:
            wait()
            sums = torch.zeros(out.shape).index_add(0, handle.token_of_sent, returned.float())
            out.copy_(sums)

        return out, finish


def install() -> None:
    """Let ``import deep_ep`` find this module's classes in this process."""
    module = ModuleType("deep_ep")
    module.ElasticBuffer, module.EPHandle, module.EventOverlap = ElasticBuffer, EPHandle, EventOverlap
    module.topk_idx_t = topk_idx_t
    sys.modules["deep_ep"] = module
