"""Activation checkpointing: keep the results of some operators, and recompute of the others what is read again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from moefoundry.ops.cpu_attention import OPERATOR as CPU_ATTENTION

ATTENTION_OPS = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._flash_attention_forward.default,
        CPU_ATTENTION,
    }
)
"""Operators that ``scaled_dot_product_attention`` calls, that of attention in segments, and ours for CPUs."""


_aten = torch.ops.aten
_PRODUCTS = frozenset({_aten.mm.default, _aten._grouped_mm.default})


class _Place(threading.local):
    """Place of this thread in a checkpointed block.

    Attributes:
        again: It recomputes the block.
        ends_block: It is in the block's last part, and what follows that saves no tensor for the backward pass.
        past_last_operand: It has all operands that the block saves.
        open: Closed at the end of the last part.
        noted: What the host has read in each checkpointed region that it is in.
        known: The same for the one that is recomputed, from where it is now; None outside of one.
    """

    again = ends_block = past_last_operand = False
    known: Iterator[Any] | None = None

    def __init__(self) -> None:
        self.open = ExitStack()
        self.noted: tuple[list[Any], ...] = ()


_place = _Place()


@contextmanager
def ending_the_block(ends: bool) -> Iterator[None]:
    """Run the last part of a block in here; if ``ends``, what follows it saves no tensor for the backward pass."""
    with _place.open:
        _place.ends_block = ends
        try:
            yield
        finally:
            _place.ends_block = _place.past_last_operand = False


def last_operand_is_there() -> bool:
    """Tell that the part computes its last product next; its operands are the last tensors that the block saves.

    The recomputation of a block ends when it has saved them. So results from here on are not kept, and the product is
    not computed again: in its place are NaNs, which nothing reads.

    Returns:
        True in the recomputation, for operators of which this file does not know: :func:`unread` is for their results.
    """
    if not _place.ends_block:
        return False
    if _place.again and not _place.past_last_operand:
        _place.open.enter_context(_Unread())
    _place.past_last_operand = True
    return _place.again


def unread(like: Tensor, *shape: int) -> Tensor:
    """Make a tensor of NaNs in the memory of one element, for a result that nothing reads."""
    return like.new_full((1,), torch.nan).expand(shape)


class _Unread(TorchDispatchMode):
    """Has NaNs, in the memory of one element, in place of products."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        left, right = args[:2]
        return unread(left, len(left), right.shape[-1])


def on_the_host(sizes: Tensor) -> Any:
    """Give a tensor's values as lists, for which the host waits; a recomputation has them from the forward pass.

    A recomputation that comes to other values fails, without a wait: tensors of the old sizes would have wrong rows.
    """
    if _place.known is None:
        found = sizes, sizes.tolist()
    else:
        found = next(_place.known)
        torch._assert_async((sizes == found[0]).all(), "a recomputed block routes its tokens otherwise than before")
    for noted in _place.noted:
        noted.append(found)
    return found[1]


def keeping(ops: frozenset[Any]) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]:
    """Make a ``context_fn`` for ``torch.utils.checkpoint.checkpoint`` that keeps the results of ``ops``."""

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        save, reuse = create_selective_checkpoint_contexts(list(ops))
        noted: list[Any] = []
        return _computing(_KeptOpsOnly(save, ops), noted), _recomputing(_KeptOpsOnly(reuse, ops), noted)

    return contexts


def keeping_nothing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Serve as a ``context_fn`` that recomputes all that the backward pass reads."""
    noted: list[Any] = []
    return _computing(nullcontext(), noted), _recomputing(nullcontext(), noted)


@contextmanager
def _computing(context: AbstractContextManager[Any], noted: list[Any]) -> Iterator[None]:
    before, _place.noted = _place.noted, (*_place.noted, noted)
    try:
        with context:
            yield
    finally:
        _place.noted = before


@contextmanager
def _recomputing(context: AbstractContextManager[Any], noted: list[Any]) -> Iterator[None]:
    before = _place.again, _place.known, _place.noted
    _place.again, _place.known, _place.noted = True, iter(noted), ()
    try:
        with context:
            yield
    finally:
        _place.again, _place.known, _place.noted = before


class _KeptOpsOnly(TorchDispatchMode):
    """Shows only some operators to torch's selective checkpointing.

    Torch requires that every operator it sees runs as often in the recomputation as in the forward pass. Those of FSDP
    do not: experts are a unit inside a checkpointed block, and their parameters may have been gathered before.
    """

    def __init__(self, mode: TorchDispatchMode, ops: frozenset[Any]) -> None:
        super().__init__()
        self.mode, self.ops = mode, ops

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in self.ops and not _place.past_last_operand:
            return self.mode.__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))
