"""The fused experts as operators of torch: compilers and checkpointing take each as one, and look at no launch.

Each function launches kernels; its name in capitals is the same function, registered. Triton is imported by the first
call. Operands are contiguous; the tokens of rows are int32, their weights fp32. ``order`` has the tensors of a
:class:`~moefoundry.ops.permute.RowOrder`, and constants are those of :class:`~moefoundry.ops.swiglu.Activation`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefoundry.ops.expert_bias import HiddenLayer, sum_by_expert
from moefoundry.ops.permute import RowOrder
from moefoundry.ops.swiglu import Activation


def up_swiglu(
    tokens_TD: Tensor,
    token_of_row_N: Tensor,
    row_weights_N: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    hidden_NF: Tensor,
    tokens_per_expert_E: Tensor,
    alpha: float,
    limit: float | None,
    offset: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute gate's and up's outputs [N, 2 F], and the ``Tiles``; write weighted SwiGLU to ``hidden_NF``.

    Selective activation checkpointing keeps results, and so none of ``hidden_NF``: it is read by :func:`down` alone.
    """
    from moefoundry.ops.fused_experts import launches

    tiles = launches.place_tiles(tokens_per_expert_E, len(token_of_row_N), launches.CONFIGS["up_swiglu"].m)
    hidden_layer = HiddenLayer(Activation(alpha, limit, offset), gate_bias, up_bias)
    operands = tokens_TD, token_of_row_N, row_weights_N, gate, up, tiles
    gate_up, _ = launches.multiply_up(*operands, hidden_layer, hidden_NF)
    return gate_up, *tiles


def down_sum(hidden_NF: Tensor, down: Tensor, tiles: list[Tensor], order: list[Tensor], top_k: int) -> Tensor:
    """Multiply rows by down, and sum those of each token, [N, F] -> [T, D]."""
    from moefoundry.ops.fused_experts import launches

    rows_ND = launches.multiply_down(hidden_NF, down, launches.Tiles(*tiles))
    return launches.sum_rows(rows_ND, RowOrder.from_tensors(order, top_k))


def backward(
    grad_TD: Tensor,
    tokens_TD: Tensor,
    token_of_row_N: Tensor,
    row_weights_N: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_up: Tensor,
    tiles: list[Tensor],
    order: list[Tensor],
    top_k: int,
    alpha: float,
    limit: float | None,
    offset: float,
    biased: bool,
) -> list[Tensor]:
    """Compute the gradients of tokens, row weights, gate, up and down; if ``biased``, those of biases, [E, 2 F]."""
    from moefoundry.ops.fused_experts import launches

    rows, placed = RowOrder.from_tensors(order, top_k), launches.Tiles(*tiles)
    ends_E = rows.tokens_per_expert_E.cumsum(0, dtype=torch.int32)
    grad_gate_up, hidden, grad_row_weights_N = launches.multiply_down_backward(
        grad_TD, token_of_row_N, row_weights_N, down, gate_up, placed, Activation(alpha, limit, offset)
    )
    transposed = launches.multiply_transposed
    grad_down = transposed(grad_TD, hidden, token_of_row_N, ends_E, 1, gather_left=True)
    grads_up = transposed(grad_gate_up, tokens_TD, token_of_row_N, ends_E, 2, gather_left=False)
    grad_tokens_TD = launches.sum_rows(launches.multiply_up_backward(grad_gate_up, gate, up, placed), rows)
    grad_biases = [sum_by_expert(grad_gate_up, rows.tokens_per_expert_E)] if biased else []
    return [grad_tokens_TD, grad_row_weights_N, *grads_up, *grad_down, *grad_biases]


UP_SWIGLU = torch.library.custom_op("moefoundry::fused_up_swiglu", up_swiglu, mutates_args={"hidden_NF"})
DOWN_SUM = torch.library.custom_op("moefoundry::fused_down_sum", down_sum, mutates_args=())
BACKWARD = torch.library.custom_op("moefoundry::fused_experts_backward", backward, mutates_args=())
MIXTURE_OPS = frozenset(
    {torch.ops.moefoundry.fused_up_swiglu.default, torch.ops.moefoundry.fused_down_sum.default},
)
"""The operators of the forward pass, for selective activation checkpointing, which has to keep both or none: where
``up_swiglu`` does not run again, nothing is in ``hidden_NF``."""


@UP_SWIGLU.register_fake
def _(
    tokens_TD: Tensor, token_of_row_N: Tensor, row_weights_N: Tensor, gate: Tensor, *others: object
) -> tuple[Tensor, ...]:
    from moefoundry.ops.fused_experts import launches

    rows, m = len(token_of_row_N), launches.CONFIGS["up_swiglu"].m
    return tokens_TD.new_empty(rows, 2 * gate.shape[1]), *launches.empty_tiles(len(gate), rows, m, gate.device)


@DOWN_SUM.register_fake
def _(hidden_NF: Tensor, down: Tensor, tiles: list[Tensor], order: list[Tensor], top_k: int) -> Tensor:
    return hidden_NF.new_empty(len(RowOrder.from_tensors(order, top_k).first_of_token) - 1, down.shape[1])


@BACKWARD.register_fake
def _(
    grad_TD: Tensor,
    tokens_TD: Tensor,
    token_of_row_N: Tensor,
    row_weights_N: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_up: Tensor,
    *others: object,
) -> list[Tensor]:
    grads = [torch.empty_like(each) for each in (tokens_TD, row_weights_N, gate, up, down)]
    return [*grads, gate_up.new_empty(len(gate), gate_up.shape[1])] if others[-1] else grads
