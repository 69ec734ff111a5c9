"""Precision as a transform of a built model.

Master weights, gradients that are reduced, and optimizer state are fp32 always; ``precision.compute`` says what the
matrix products take. Kept in fp32 whatever it says: the router's gate, norms, softmax and the loss.

    fp32            nothing to do
    bf16            FSDP casts parameters and inputs to BF16 (the gate stays fp32)
    bf16_emulated   the operands of every Linear, of the experts and of the output head are rounded to BF16 and
                    multiplied in fp32: BF16's rounding on CPUs that multiply BF16 slowly or not at all. The embedding
                    and the inside of attention stay fp32.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from moefoundry.config import Compute, PrecisionConfig
from moefoundry.model.transformer import OutputHead
from moefoundry.moe.experts import GroupedExperts
from moefoundry.moe.router import Router
from moefoundry.ops.grouped_linear import GroupedLinear
from moefoundry.ops.rounding import round_gradient, round_operand


def apply_precision(model: nn.Module, cfg: PrecisionConfig) -> None:
    """Change the products of ``model`` in place; parameters keep their names, dtypes and values."""
    if cfg.compute == Compute.bf16_emulated:
        _emulate(model, torch.bfloat16)


def mixed_precision(cfg: PrecisionConfig) -> MixedPrecisionPolicy:
    """What FSDP computes in; gradients are reduced in fp32."""
    if cfg.compute == Compute.bf16:
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def full_precision_modules(model: nn.Module, cfg: PrecisionConfig) -> list[nn.Module]:
    """Modules whose parameters must not be cast: each becomes an FSDP unit of its own that stays fp32."""
    if cfg.compute != Compute.bf16:
        return []
    return [module for module in model.modules() if isinstance(module, Router)]


class EmulatedLinear(nn.Linear):
    """``nn.Linear`` whose three products take operands rounded to ``operand_dtype``."""

    operand_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(
            round_operand(input, self.operand_dtype), round_operand(self.weight, self.operand_dtype), self.bias
        )
        return round_gradient(out, self.operand_dtype)


def _emulate(model: nn.Module, dtype: torch.dtype) -> None:
    gates = {id(module.gate) for module in model.modules() if isinstance(module, Router)}
    for module in model.modules():
        if isinstance(module, GroupedExperts):
            module.grouped_linear = _emulated(module.grouped_linear, dtype)
        elif isinstance(module, OutputHead):
            module.operand_dtype = dtype
        elif type(module) is nn.Linear and id(module) not in gates:
            module.__class__ = EmulatedLinear
            cast(EmulatedLinear, module).operand_dtype = dtype


def _emulated(grouped_linear: GroupedLinear, dtype: torch.dtype) -> GroupedLinear:
    def rounded(rows_RI: Tensor, weight_EOI: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        out = grouped_linear(round_operand(rows_RI, dtype), round_operand(weight_EOI, dtype), tokens_per_expert_E)
        return round_gradient(out, dtype)

    return rounded
