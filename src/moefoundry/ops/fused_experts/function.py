"""The mixture of SwiGLU experts as one autograd function over the operators of ``operators.py``.

Kernels of the forward pass: gather, both up-projections and weighted SwiGLU in one; the down-projection; the sum over
each token's rows. Kernels of the backward pass: gather of gradients, the down-projection's gradient and SwiGLU's in
one; both weight gradients with their gathers; the tokens' gradient; its sum. Tokens, the outputs of both up-projections
and the routing are kept for backward, as in SonicMoE (arXiv 2512.14080), which also takes the gradient of the router's
weights before ``down``. The host never waits. Reference: ``ops/expert_mixture.py``.

Torch's compiler takes the operators as they are, and selective activation checkpointing keeps their results: the
up-projections, the table of tiles, and the sums if they are read again. Then no kernel runs twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer
from moefoundry.ops.expert_mixture import expert_mixture_reference
from moefoundry.ops.fused_experts.operators import BACKWARD, DOWN_SUM, UP_SWIGLU
from moefoundry.ops.permute import RowOrder
from moefoundry.ops.recompute import last_operand_is_there, unread
from moefoundry.ops.swiglu import Activation

CAPABILITY = (9, 0)  # tensor descriptors
SHARED_BYTES = 213_560  # of the gradients of weights; not there on GPUs for desks (compute capability 12)
ALIGNMENT = 8  # elements; a descriptor's strides are multiples of 16 bytes


def obstacle(tokens_TD: Tensor, hidden_size: int) -> str:
    """Say why :func:`fused_experts` cannot take these tokens; empty if it can."""
    if tokens_TD.dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies bfloat16 and float16, not {tokens_TD.dtype}"
    if tokens_TD.shape[1] % ALIGNMENT or hidden_size % ALIGNMENT:
        return f"widths must be multiples of {ALIGNMENT}, not {tokens_TD.shape[1]} and {hidden_size}"
    return _obstacle_of(tokens_TD.device)


@torch.compiler.assume_constant_result
def _obstacle_of(device: torch.device) -> str:
    import triton

    if triton.knobs.runtime.interpret:
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels need an NVIDIA GPU, not {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"its kernels need compute capability {CAPABILITY}, not {capability}"
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the next one
    shared = properties.shared_memory_per_block_optin
    return "" if shared >= SHARED_BYTES else f"its kernels need {SHARED_BYTES} bytes of shared memory, not {shared}"


def fused_experts(
    tokens_TD: Tensor,
    weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    order: RowOrder,
    hidden: HiddenLayer = PLAIN_LAYER,
) -> Tensor:
    """Compute each token's weighted sum of its experts' SwiGLU, [T, D] -> [T, D].

    Args:
        tokens_TD: bfloat16 or float16, for which :func:`obstacle` is empty.
        weights_TK: Top-k weights, any float dtype; used in fp32.
        gate_EFD: Weights of the experts, each in the layout of ``nn.Linear``, dtype of the tokens; likewise the others.
        up_EFD: [E, F, D].
        down_EDF: [E, D, F].
        order: Order of the slots that have rows.
        hidden: Activation, and biases of gate and up.
    """
    operands = tokens_TD, weights_TK, gate_EFD, up_EFD, down_EDF
    if not len(order.slot_of_row_N):
        return expert_mixture_reference(*operands, order, hidden)  # a descriptor must not be empty
    return _FusedExperts.apply(*operands, *hidden[1:], order, hidden.activation)


class _FusedExperts(Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens_TD: Tensor,
        weights_TK: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        order: RowOrder,
        activation: Activation,
    ) -> Tensor:
        tokens_TD, gate, up, down = (tensor.contiguous() for tensor in (tokens_TD, gate, up, down))
        token_of_row_N = order.token_of_row_N.to(torch.int32)
        row_weights_N = weights_TK.flatten()[order.slot_of_row_N].float()
        gather = tokens_TD, token_of_row_N, row_weights_N
        hidden_NF = tokens_TD.new_empty(len(row_weights_N), up.shape[1])
        biases = (None if bias is None else bias.contiguous() for bias in (gate_bias, up_bias))
        gate_up, *tiles = UP_SWIGLU(*gather, gate, up, *biases, hidden_NF, order.tokens_per_expert_E, *activation)
        if last_operand_is_there():
            out_TD = unread(tokens_TD, *tokens_TD.shape)
        else:
            out_TD = DOWN_SUM(hidden_NF, down, tiles, order.tensors, order.top_k)
        ctx.save_for_backward(*gather, gate, up, down, gate_up, *tiles)
        ctx.order, ctx.activation, ctx.slots, ctx.weights_dtype = order, activation, weights_TK.shape, weights_TK.dtype
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        order, biased = ctx.order, any(ctx.needs_input_grad[5:7])
        *operands, group, first, end, total = ctx.saved_tensors
        grad_tokens_TD, grad_row_weights_N, *grads = BACKWARD(
            grad_TD.contiguous(),
            *operands,
            [group, first, end, total],
            order.tensors,
            order.top_k,
            *ctx.activation,
            biased,
        )
        grad_weights_TK = grad_row_weights_N.new_zeros(ctx.slots)
        grad_weights_TK.view(-1)[order.slot_of_row_N] = grad_row_weights_N
        grad_biases = grads.pop().chunk(2, dim=1) if biased else (None, None)
        return grad_tokens_TD, grad_weights_TK.to(ctx.weights_dtype), *grads, *grad_biases, None, None
