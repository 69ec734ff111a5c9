"""The checks of ``test_quack_experts.py`` on a stand-in, run in Triton's interpreter by a process of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moefoundry.ops.permute import order_by_expert
from moefoundry.ops.quack_experts import quack_experts
from tests.ops.fused_experts import checks
from tests.ops.quack_experts import stand_in


def mix(*operands: Any) -> Tensor:
    """Call it without the last argument, the hidden layer, which is the plain one."""
    stand_in.install()
    return quack_experts(*operands[:-1])


def check_equal_to_float64(dtype: torch.dtype, shape: tuple[int, int, int, int, int], skew: float, keep: float) -> None:
    checks.check_equal_to_float64("cpu", dtype, shape, skew, keep, mix=mix)


def bytes_kept(tokens: int, width: int, hidden: int, experts: int, top_k: int) -> int:
    """Bytes that a call in BF16 keeps for backward, without its operands."""
    stand_in.install()
    order = order_by_expert(checks.routed(tokens, experts, top_k), experts)
    shapes = (tokens, width), (tokens, top_k), *[(experts, hidden, width)] * 2, (experts, width, hidden)
    operands = [torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quack_experts(*operands, order)
    for operand in operands:
        kept.pop(operand.untyped_storage().data_ptr(), None)
    return sum(kept.values())
