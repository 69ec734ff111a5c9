"""The feed-forward networks: one dense SwiGLU, and E of them with stacked weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefoundry.config import ExpertBackend
from moefoundry.moe.mixture import PRODUCTS, Mixture, choose_mixture
from moefoundry.ops.gradient_scale import scale_gradient
from moefoundry.ops.grouped_linear import GroupedLinear
from moefoundry.ops.permute import RowOrder, permute, permute_slots, sum_rows
from moefoundry.ops.swiglu import swiglu


class FeedForward(nn.Module):
    """Dense SwiGLU: the FFN of dense layers, and the shared experts of MoE layers."""

    def __init__(self, d_model: int, hidden_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, hidden_size, bias=False)
        self.up_proj = nn.Linear(d_model, hidden_size, bias=False)
        self.down_proj = nn.Linear(hidden_size, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class GroupedExperts(nn.Module):
    """E SwiGLU experts with stacked weights, each in the layout of ``nn.Linear``.

    Attributes:
        gate_proj, up_proj: [E, F, D].
        down_proj: [E, D, F].
        backend: What mixes them.
        grouped_linear: The product of the plain way; a precision policy may wrap it.
    """

    def __init__(self, num_experts: int, d_model: int, hidden_size: int, backend: ExpertBackend) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(num_experts, hidden_size, d_model))
        self.up_proj = nn.Parameter(torch.empty(num_experts, hidden_size, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, hidden_size))
        self.backend = backend
        self.grouped_linear: GroupedLinear = PRODUCTS[backend]

    def forward(self, tokens_PD: Tensor, weights_PK: Tensor, order: RowOrder) -> Tensor:
        """Mix each token's experts that are here, [P, D] -> [P, D].

        Args:
            tokens_PD: Tokens that have experts here.
            weights_PK: What each slot counts.
            order: Of the slots that are for experts here.
        """
        mixture = self._mixture(tokens_PD, len(order.slot_of_row_N))
        if mixture is not None:
            return mixture(tokens_PD, weights_PK, *self.local_weights(), order)
        rows_RD = self.multiply(permute(tokens_PD, order), order.tokens_per_expert_E, permute_slots(weights_PK, order))
        return sum_rows(rows_RD, order)

    def multiply(self, rows_RD: Tensor, tokens_per_expert_E: Tensor, row_weights_R: Tensor | None = None) -> Tensor:
        """[R, D] rows in the order of this rank's experts -> [R, D], times their weights."""
        gate, up, down = self.local_weights()
        gate_RF = self.grouped_linear(rows_RD, gate, tokens_per_expert_E)
        up_RF = self.grouped_linear(rows_RD, up, tokens_per_expert_E)
        return self.grouped_linear(swiglu(gate_RF, up_RF, row_weights_R), down, tokens_per_expert_E)

    def _mixture(self, tokens_PD: Tensor, num_rows: int) -> Mixture | None:
        """What mixes at once, where products are as they are."""
        if self.grouped_linear is not PRODUCTS[self.backend]:
            return None
        return choose_mixture(self.backend, tokens_PD, num_rows, self.down_proj.shape[-1])

    def local_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down of this rank's experts."""
        return self._local(self.gate_proj), self._local(self.up_proj), self._local(self.down_proj)

    def _local(self, weight: Tensor) -> Tensor:
        """This rank's experts. Where they are divided among G ranks they see the tokens of all G, so their gradient is
        a sum where every other gradient is a mean over ranks: it is divided by G."""
        if not isinstance(weight, DTensor):
            return weight
        return scale_gradient(weight.to_local(), 1 / weight.device_mesh.size())
