"""Recompute all but what some operations gave: torch's selective activation checkpointing, which sees nothing else."""

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
    }
)
"""The kernels of ``scaled_dot_product_attention``."""


def keeping(ops: frozenset[Any]) -> Callable[[], tuple[TorchDispatchMode, TorchDispatchMode]]:
    """``context_fn`` for ``torch.utils.checkpoint.checkpoint`` that keeps the results of ``ops``."""

    def contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
        save, reuse = create_selective_checkpoint_contexts(list(ops))
        return _KeptOpsOnly(save, ops), _KeptOpsOnly(reuse, ops)

    return contexts


class _KeptOpsOnly(TorchDispatchMode):
    """Hides all other operations from torch's selective checkpointing, which wants every one of them to run as often in
    the recomputation as in the forward pass. Those of FSDP do not: experts are a unit inside a checkpointed block, and
    their parameters may be there already, gathered ahead."""

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
