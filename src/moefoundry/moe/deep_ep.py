"""Dispatch by DeepEP 2 (https://github.com/deepseek-ai/DeepEP): its kernels move the rows over NVLink and RDMA.

Written against the public Python interface of ``ElasticBuffer``, and tested with a stand-in that has its signatures and
exchanges by gloo; it has not run on a GPU. DeepEP finds its own way across nodes, so there is one hop. It moves BF16
rows: with FP8, ranks quantize the rows that they receive, to the values that would have been sent.

    dispatch            tokens and weights to the ranks of their experts    backward: combine of both gradients
    combine             sums of weighted results back                       backward: dispatch, by the same handle

Every call is asynchronous; events are waited for as late as in ``moe/hops.py``, whose links and order these functions
have. A buffer has room for a number of tokens that all ranks must agree on: an all-reduce of one number, and a further
wait for the host.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.config import Dispatcher, MoEConfig, UserError
from moefoundry.moe.dispatch import ChunkedExchange, Exchange, check_divides
from moefoundry.ops.permute import RowOrder, order_by_expert

KEY = "model.moe.dispatcher"
PACKAGE = "deep_ep"


def check_dispatcher(cfg: MoEConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Ask the recipe's dispatcher if it can run.

    Args:
        cfg: The recipe's ``model.moe``.
        device: Device of the tokens.
        dtype: Dtype of the tokens.

    Raises:
        UserError: It cannot.
    """
    if cfg.dispatcher == Dispatcher.deepep and (found := obstacle(device, dtype)):
        raise UserError(f"{KEY}: deepep cannot run: {found}; use {KEY}=all_to_all")


def obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Say why DeepEP cannot run; empty if it can."""
    if device.type != "cuda":
        return f"it needs NVIDIA GPUs, and the device is {device.type}"
    if dtype != torch.bfloat16:
        return f"it moves bfloat16, and tokens are {dtype}"
    if importlib.util.find_spec(PACKAGE) is None:
        return f"the package {PACKAGE} is not installed"
    try:
        _library()
    except Exception as error:  # it looks for NCCL and CUDA while it is imported
        return f"the package {PACKAGE} does not load: {type(error).__name__}: {error}"
    return ""


def _library() -> ModuleType:
    library = importlib.import_module(PACKAGE)
    if not hasattr(library, "ElasticBuffer"):
        raise ImportError("it has no ElasticBuffer, which came with DeepEP 2")
    return library


class Buffers:
    """The communication buffer of a group, for all layers; it grows when more tokens come.

    Args:
        group: The ranks of the mesh axis ``expert``.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.room = 0
        self._buffer: Any = None

    def get(self, tokens_TD: Tensor, top_k: int, chunks: int) -> Any:
        """Give a buffer with room for a chunk of the tokens of every rank; all ranks call it together."""
        most = torch.tensor(-(-len(tokens_TD) // chunks), device=tokens_TD.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, self.group)
        needed = int(most)
        if self._buffer is None or needed > self.room:
            self.room = 1 << max(needed - 1, 0).bit_length()
            self._buffer = _library().ElasticBuffer(
                self.group, num_max_tokens_per_rank=self.room, hidden=tokens_TD.shape[1], num_topk=top_k
            )
        return self._buffer


class DeepEpDispatcher:
    """Dispatcher for experts that are divided among a group, as :class:`~moefoundry.moe.dispatch.AllToAllDispatcher`.

    Args:
        num_experts: E, a multiple of the group's size.
        buffers: The buffer of the group.

    Raises:
        ValueError: The group's size does not divide E.
    """

    def __init__(self, num_experts: int, buffers: Buffers) -> None:
        check_divides(num_experts, buffers.group)
        self.num_experts, self.buffers = num_experts, buffers

    def dispatch(
        self,
        tokens_TD: Tensor,
        topk_expert_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        kept_TK: Tensor | None = None,
        chunks: int = 1,
    ) -> Exchange:
        expert_ids_TK = topk_expert_ids_TK if kept_TK is None else topk_expert_ids_TK.where(kept_TK, -1)
        buffer = self.buffers.get(tokens_TD, expert_ids_TK.shape[1], chunks)
        parts = [
            _Part(_Trip(buffer, self.buffers.room, self.num_experts), *operands)
            for operands in zip(
                tokens_TD.tensor_split(chunks),
                topk_weights_TK.float().tensor_split(chunks),
                expert_ids_TK.tensor_split(chunks),
                strict=True,
            )
        ]
        trips = tuple(part.trip for part in parts)
        return ChunkedExchange(parts, lambda: _Collect.apply(trips, *(part.links[0] for part in parts)))


class _Trip:
    """One chunk's way there and back: its handle, and the results of the call that is under way."""

    def __init__(self, buffer: Any, room: int, num_experts: int) -> None:
        self.buffer, self.room, self.num_experts = buffer, room, num_experts
        self.handle: Any = None
        self._results: tuple[Any, ...] = ()
        self._event: Any = None

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> None:
        """Start to send tokens; lands as tokens, local experts and weights."""
        *results, self.handle, self._event = self.buffer.dispatch(
            tokens.contiguous(),
            topk_idx=expert_ids.to(_library().topk_idx_t).contiguous(),
            topk_weights=weights.contiguous(),
            num_experts=self.num_experts,
            num_max_tokens_per_rank=self.room,
            async_with_compute_stream=True,
        )
        self._results = tuple(results)

    def dispatch_again(self, rows: Tensor) -> None:
        """Start to send other rows of the same tokens; lands as rows, and two values without meaning."""
        *results, _, self._event = self.buffer.dispatch(
            rows.contiguous(), handle=self.handle, num_sms=self.handle.num_sms, async_with_compute_stream=True
        )
        self._results = tuple(results)

    def combine(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Start to sum rows, and weights, where their tokens came from; lands as both."""
        *results, self._event = self.buffer.combine(
            rows.contiguous(), self.handle, topk_weights=weights, async_with_compute_stream=True
        )
        self._results = tuple(results)

    def land(self) -> tuple[Any, ...]:
        """Wait for the results of the call that was started."""
        results, event = self._results, self._event
        self._results, self._event = (), None
        event.current_stream_wait()
        return results


class _Part:
    """A :class:`~moefoundry.moe.dispatch.Chunk` of a :class:`DeepEpDispatcher`."""

    def __init__(self, trip: _Trip, tokens_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor) -> None:
        self.trip = trip
        self.links: tuple[Tensor, ...] = _Dispatch.apply(tokens_TD, weights_TK, expert_ids_TK, trip)

    def pass_on(self) -> None:
        """Do nothing: there is one hop."""

    def arrive(self) -> tuple[Tensor, Tensor, RowOrder]:
        tokens_PD, weights_PK, ids_PK = _Arrive.apply(*self.links, self.trip)
        counts = self.trip.handle.num_recv_tokens_per_expert_list
        return tokens_PD, weights_PK, order_by_expert(ids_PK, len(counts), ids_PK >= 0, sum(counts))

    def send_back(self, mixed_PD: Tensor) -> None:
        self.links = (_SendBack.apply(mixed_PD, self.trip),)

    def pass_back(self) -> None:
        """Do nothing: there is one hop."""


class _Dispatch(Function):
    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, trip: _Trip) -> tuple[Tensor, Tensor]:
        ctx.trip = trip
        trip.dispatch(tokens_TD, weights_TK, ids_TK)
        return tokens_TD.new_empty(0, tokens_TD.shape[1]), weights_TK.new_empty(0, weights_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *links: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_tokens_TD, grad_weights_TK = ctx.trip.land()
        return grad_tokens_TD, grad_weights_TK, None, None


class _Arrive(Function):
    @staticmethod
    def forward(ctx: Any, tokens_link: Tensor, weights_link: Tensor, trip: _Trip) -> tuple[Tensor, Tensor, Tensor]:
        ctx.trip = trip
        tokens_PD, ids_PK, weights_PK = trip.land()
        ids_PK = ids_PK.long()
        ctx.mark_non_differentiable(ids_PK)
        ctx.save_for_backward(tokens_link, weights_link)
        return tokens_PD, weights_PK, ids_PK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor, grad_PK: Tensor, _: None) -> tuple[Tensor, Tensor, None]:
        ctx.trip.combine(grad_PD, grad_PK.contiguous())
        return *ctx.saved_tensors, None


class _SendBack(Function):
    @staticmethod
    def forward(ctx: Any, mixed_PD: Tensor, trip: _Trip) -> Tensor:
        ctx.trip = trip
        trip.combine(mixed_PD)
        return mixed_PD.new_empty(0, mixed_PD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, link: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.land()[0], None


class _Collect(Function):
    @staticmethod
    def forward(ctx: Any, trips: Sequence[_Trip], *links: Tensor) -> Tensor:
        if len(trips) > 1:
            ctx.save_for_backward(links[0])  # see moe/hops.py
        sums = [trip.land()[0] for trip in trips]
        ctx.trips, ctx.sizes = trips, [len(each) for each in sums]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        chunks = zip(ctx.trips, grad_TD.split(ctx.sizes), strict=True)
        for trip, grad in reversed(list(chunks)):  # in the order in which they are needed
            trip.dispatch_again(grad)
        return None, *(grad_TD.new_empty(0, grad_TD.shape[1]) for _ in ctx.trips)
