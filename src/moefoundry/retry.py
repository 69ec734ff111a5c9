"""Leave a step on all ranks together when memory ends on one of them, so that they can repeat it.

A rank whose memory ends leaves its forward or backward pass at once, and the others would wait for it in their next
collective until the time-out. So, while a size is on trial, every rank asks the others before each collective whether
all are still in the step: a small all-reduce on the CPU, in a group of its own. All ranks have the same collectives in
the same order, so the n-th question of one is the n-th of all; a rank without memory answers there that it has left,
and all leave at that point. No collective has begun that some rank does not join, so the groups stay usable, with NCCL
and with gloo. Nothing is allocated between the answer and the collective.

The question costs the host a message to all ranks for each collective: training asks it for some batches, not always.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from moefoundry.fp8_gather import held_by_fsdp
from moefoundry.ops.all_to_all import wait_for_all

NAMESPACES = ("c10d", "_c10d_functional")


class MemoryEndedError(Exception):
    """Memory ended on a rank in this step; every rank has left it, and none waits for another."""


class _AskBeforeCollectives(TorchDispatchMode):
    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled parts stay compiled: there are no collectives inside them."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # it comes again with what it is made of
        if getattr(func, "namespace", "") in NAMESPACES and "wait" not in func.__name__:
            room = _room_for_result(func, args)
            tell(self.group, ended=False)
            del room
        return func(*args, **(kwargs or {}))


def _room_for_result(func: Any, args: Any) -> Tensor | None:
    """Allocate as much as a functional collective will: the allocator then has it at hand."""
    if func is torch.ops._c10d_functional.all_to_all_single.default:
        rows, receive = args[0], args[1]
        return rows.new_empty((sum(receive), *rows.shape[1:]))
    if func is torch.ops._c10d_functional.all_gather_into_tensor.default:
        return args[0].new_empty((args[1], *args[0].shape))
    return None


def tell(group: dist.ProcessGroup, ended: bool) -> None:
    """Tell all ranks whether memory has ended on this one, and hear it of them. A collective.

    Raises:
        MemoryEndedError: It has, on some rank.
    """
    answer = torch.tensor(int(ended))
    dist.all_reduce(answer, dist.ReduceOp.MAX, group)
    if answer:
        raise MemoryEndedError


@contextmanager
def left_together(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Run a part of a step that all ranks end, or leave, together.

    Args:
        group: All ranks, by a backend for the CPU; None in a world of one rank.

    Raises:
        MemoryEndedError: In place of ``torch.OutOfMemoryError``, on every rank; without words on those that had memory.
    """
    try:
        if group is None:
            yield
            return
        with _AskBeforeCollectives(group):
            yield
        tell(group, ended=False)
    except torch.OutOfMemoryError as error:
        if group is not None:
            with suppress(MemoryEndedError):
                tell(group, ended=True)
        raise MemoryEndedError(str(error) or "out of memory") from None


def can_forget() -> bool:
    """Tell if this torch can bring FSDP back from the middle of a step."""
    return hasattr(FSDPModule, "reset_iter_state")  # since torch 2.13


def forget_step(model: nn.Module, release: bool = True) -> None:
    """Bring a model that has left a step back to where it was before.

    Gradients are dropped, whole and in shards, and FSDP's state of the step.

    Args:
        model: The model.
        release: Give the memory of the step back to the device, which waits for it: for steps that all ranks have left.
    """
    for _ in range(2):  # a unit shows its whole parameters before FSDP is reset, and its shards after that
        for parameter in model.parameters():
            parameter.grad = None
        root = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
        if root is not None and can_forget():
            root.reset_iter_state()
        for parameter in held_by_fsdp(model):
            parameter.unsharded_accumulated_grad = None  # of micro-batches that reduce nothing
            if (unsharded := getattr(parameter, "_unsharded_param", None)) is not None:
                unsharded.grad = None
    if release:
        wait_for_all()
    gc.collect()
    if release and torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def generator_states() -> list[Tensor]:
    """Copy the states of torch's generators, which forward and backward passes draw from."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]


def restore_generators(states: list[Tensor]) -> None:
    """Put back what :func:`generator_states` has copied."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
