"""Selective activation checkpointing: keep the results of some operators, and recompute everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

ATTENTION_OPS = frozenset(
    {
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._flash_attention_forward.default,
    }
)
"""Operators that ``scaled_dot_product_attention`` calls, and that of attention in segments."""


def keeping(ops: frozenset[Any]) -> Callable[[], tuple[TorchDispatchMode, TorchDispatchMode]]:
    """Make a ``context_fn`` for ``torch.utils.checkpoint.checkpoint`` that keeps the results of ``ops``."""

    def contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
        save, reuse = create_selective_checkpoint_contexts(list(ops))
        return _KeptOpsOnly(save, ops), _KeptOpsOnly(reuse, ops)

    return contexts


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
        if func in self.ops:
            return self.mode.__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))
