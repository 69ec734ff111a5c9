"""The feed-forward networks: one dense SwiGLU, and E of them with stacked weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefoundry.config import MoEConfig
from moefoundry.moe.dispatch import Mix
from moefoundry.moe.mixture import Mixture, RowMixture, build_mixture
from moefoundry.ops.expert_bias import HiddenLayer, weighted_biases
from moefoundry.ops.grouped_linear import GroupedLinear, grouped_linear
from moefoundry.ops.permute import RowOrder
from moefoundry.ops.swiglu import PLAIN, Activation, swiglu


class FeedForward(nn.Module):
    """Dense SwiGLU: the FFN of dense layers, and the shared experts of MoE layers."""

    def __init__(self, d_model: int, hidden_size: int, activation: Activation = PLAIN) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(d_model, hidden_size, bias=False)
        self.up_proj = nn.Linear(d_model, hidden_size, bias=False)
        self.down_proj = nn.Linear(hidden_size, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., D] -> [..., D]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), None, self.activation))


class TokenGate(nn.Linear):
    """Sigmoid of a linear map of each token to one number (Qwen2-MoE); no precision policy narrows it."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., D] -> [..., 1]."""
        return torch.sigmoid(super().forward(x))


class GroupedExperts(nn.Module):
    """E SwiGLU experts with stacked weights, each in the layout of ``nn.Linear``.

    Attributes:
        gate_proj, up_proj: [E, F, D].
        down_proj: [E, D, F].
        gate_proj_bias, up_proj_bias, down_proj_bias: [E, F], [E, F] and [E, D]; None without ``projection_bias``.
        mixture: The backend that computes them; a precision policy may set another.
        adjacent: Names of weights whose narrow copies it wants in one tensor [E, 2F, D] (``narrow_copies.py``).
    """

    gate_proj_bias: nn.Parameter | None
    up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(self, d_model: int, cfg: MoEConfig, activation: Activation = PLAIN) -> None:
        super().__init__()
        num_experts, hidden_size = cfg.num_experts, cfg.expert_hidden_size
        self.gate_proj = nn.Parameter(torch.empty(num_experts, hidden_size, d_model))
        self.up_proj = nn.Parameter(torch.empty(num_experts, hidden_size, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, hidden_size))
        for name, width in (("gate", hidden_size), ("up", hidden_size), ("down", d_model)):
            bias = nn.Parameter(torch.empty(num_experts, width)) if cfg.projection_bias else None
            self.register_parameter(f"{name}_proj_bias", bias)
        self.activation = activation
        self.mixture: Mixture = build_mixture(cfg, activation)
        self.adjacent = ("gate_proj", "up_proj") if getattr(self.mixture, "stacks", False) else ()

    def forward(self, tokens_PD: Tensor, weights_PK: Tensor, order: RowOrder) -> Tensor:
        """Mix each token's experts on this rank, [P, D] -> [P, D]; arguments as in :class:`Mixture`."""
        if self.down_proj_bias is None:
            return self.mix(tokens_PD, weights_PK, order)
        biases_PD = weighted_biases(weights_PK, local_experts(self.down_proj_bias), order)
        return self.mix(tokens_PD, weights_PK, order) + biases_PD

    def in_chunks(self, links: Any, schedule: Callable[[Any, Mix], Any]) -> Any:
        """Mix chunks of tokens one after the other, in one pass through this module for FSDP.

        See :class:`~moefoundry.moe.dispatch.Experts`.
        """
        return schedule(links, self.forward)

    def mix(self, tokens_PD: Tensor, weights_PK: Tensor, order: RowOrder) -> Tensor:
        """Compute :meth:`forward` without the biases of ``down``."""
        operands = tokens_PD, weights_PK, *self.local_weights(), order
        hidden = self.hidden_layer()
        return self.mixture(*operands) if hidden.plain else self.mixture(*operands, hidden)

    def hidden_layer(self) -> HiddenLayer:
        """Give the activation, and the biases of this rank's experts."""
        if self.gate_proj_bias is None or self.up_proj_bias is None:
            return HiddenLayer(self.activation)
        return HiddenLayer(self.activation, local_experts(self.gate_proj_bias), local_experts(self.up_proj_bias))

    @property
    def product(self) -> GroupedLinear:
        """The grouped product with which a precision policy computes the experts by rows."""
        return self.mixture.product if isinstance(self.mixture, RowMixture) else grouped_linear

    def local_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down of this rank's experts."""
        return local_experts(self.gate_proj), local_experts(self.up_proj), local_experts(self.down_proj)


def local_experts(weight: Tensor) -> Tensor:
    """Take this rank's experts of a stacked weight or bias."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
