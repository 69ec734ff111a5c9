"""Adapters of linear layers and of stacked experts.

Shapes: O and I are a weight's output and input width, R the rank, E experts, N rows.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefoundry.moe.experts import GroupedExperts, local_experts
from moefoundry.ops.expert_bias import add_bias
from moefoundry.ops.grouped_linear import GroupedLinear
from moefoundry.ops.permute import RowOrder, permute, permute_slots, sum_rows
from moefoundry.ops.swiglu import swiglu


class Adapter(nn.Module):
    """Factors of a low-rank update.

    Attributes:
        a: [R, I], or [E, R, I].
        b: [O, R], or [E, O, R]; zero at the beginning, so that training begins with the base's model.
        scale: Factor of the update.
        dropout: Applied to the input of ``a`` in training.
    """

    def __init__(self, weight_shape: torch.Size, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        *experts, out_width, in_width = weight_shape
        self.a = nn.Parameter(torch.empty(*experts, rank, in_width))
        self.b = nn.Parameter(torch.empty(*experts, out_width, rank))
        self.scale = scale
        self.dropout = nn.Dropout(dropout)


class Magnitude(nn.Module):
    """Lengths that the rows of an adapted weight are given (DoRA); a module, so that FSDP can leave it in fp32.

    Attributes:
        weight: [O].
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, lengths_O: Tensor) -> Tensor:
        """Compute the factor of each row of a weight whose rows have these lengths, [O]."""
        return self.weight / lengths_O


class LinearAdapter(Adapter):
    """Adapter of an ``nn.Linear``.

    Attributes:
        magnitude: Magnitudes (DoRA); None for plain LoRA.
        product: Product with a factor, as ``F.linear``; a precision policy may set another.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float, dora: bool) -> None:
        super().__init__(linear.weight.shape, rank, scale, dropout)
        self.magnitude = Magnitude(linear.out_features) if dora else None
        self.product = F.linear

    def forward(self, x: Tensor) -> Tensor:
        """Compute the update's part of the output, [..., I] -> [..., O]."""
        return self.product(self.product(self.dropout(x), self.a) * self.scale, self.b)


def add_adapter(linear: nn.Linear, inputs: tuple[Tensor], out: Tensor) -> Tensor:
    """Add the adapter's part to the output of a linear layer: a forward hook, whatever computes the layer itself.

    With DoRA the sum is multiplied by ``magnitude / |W + scale * B A|``, row by row. As in its paper (section 4.3), the
    length is a constant to the gradient.
    """
    adapter, bias = cast(LinearAdapter, linear.lora), cast(Tensor | None, linear.bias)
    update = adapter(inputs[0])
    if adapter.magnitude is None:
        return out + update
    weight = linear.weight.detach().float() + adapter.scale * (adapter.b.detach().float() @ adapter.a.detach().float())
    factor_O = adapter.magnitude(torch.linalg.vector_norm(weight, dim=1))
    if bias is None:
        return (factor_O * (out + update)).to(out.dtype)
    return (factor_O * (out - bias + update) + bias).to(out.dtype)


class ExpertAdapter(Adapter):
    """Adapter of stacked weights [E, O, I]: two small grouped products beside the frozen one.

    Attributes:
        product: Grouped product with a factor; a precision policy may set another.
    """

    def __init__(
        self, weight_shape: torch.Size, rank: int, scale: float, dropout: float, product: GroupedLinear
    ) -> None:
        super().__init__(weight_shape, rank, scale, dropout)
        self.product = product

    def forward(self, rows_NI: Tensor, counts_E: Tensor) -> Tensor:
        """Compute the update's part of the output, [N, I] -> [N, O], of rows in the order of their experts."""
        narrow_NR = self.product(self.dropout(rows_NI), local_experts(self.a), counts_E)
        return self.product(narrow_NR * self.scale, local_experts(self.b), counts_E)


class AdaptedExperts(GroupedExperts):
    """Experts with adapters: the mixture by rows, with an adapter's products beside a frozen one.

    Attributes:
        lora: Adapters by the name of their weight.
    """

    lora: nn.ModuleDict

    def mix(self, tokens_PD: Tensor, weights_PK: Tensor, order: RowOrder) -> Tensor:
        rows_ND, counts_E, hidden = permute(tokens_PD, order), order.tokens_per_expert_E, self.hidden_layer()
        gate_NF = add_bias(self._project("gate_proj", rows_ND, counts_E), hidden.gate_bias_EF, counts_E)
        up_NF = add_bias(self._project("up_proj", rows_ND, counts_E), hidden.up_bias_EF, counts_E)
        hidden_NF = swiglu(gate_NF, up_NF, permute_slots(weights_PK, order), hidden.activation)
        return sum_rows(self._project("down_proj", hidden_NF, counts_E), order)

    def _project(self, name: str, rows_NI: Tensor, counts_E: Tensor) -> Tensor:
        out_NO = self.frozen_product(name, rows_NI, counts_E)
        return out_NO + self.lora[name](rows_NI, counts_E) if name in self.lora else out_NO

    def frozen_product(self, name: str, rows_NI: Tensor, counts_E: Tensor) -> Tensor:
        """Multiply rows by the frozen weight ``name``, [N, I] -> [N, O]; precision policies override it."""
        return self.product(rows_NI, local_experts(getattr(self, name)), counts_E)
