"""The mixture of SwiGLU experts as one autograd function over the kernels of ``kernels.py``.

Kernels of the forward pass: gather, both up-projections and weighted SwiGLU in one; the down-projection; the sum over
each token's rows. Kernels of the backward pass: gather of gradients, the down-projection's gradient and SwiGLU's in
one; both weight gradients with their gathers; the tokens' gradient; its sum. Tokens, the outputs of both up-projections
and the routing are kept for backward, as in SonicMoE (arXiv 2512.14080), which also takes the gradient of the router's
weights before ``down``. The host never waits. Reference: ``ops/expert_mixture.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer, sum_by_expert
from moefoundry.ops.expert_mixture import expert_mixture_reference
from moefoundry.ops.fused_experts import kernels
from moefoundry.ops.permute import RowOrder
from moefoundry.ops.swiglu import PLAIN, Activation

CAPABILITY = (9, 0)  # tensor descriptors
ALIGNMENT = 8  # elements; a descriptor's strides are multiples of 16 bytes


class Config(NamedTuple):
    """Tiling of one kernel: rows, columns and depth of a tile, warps and pipeline stages of a program."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        """Give the arguments of a launch."""
        return {"M": self.m, "N": self.n, "K": self.k, "num_warps": self.warps, "num_stages": self.stages}


CONFIGS = {
    "up_swiglu": Config(128, 128, 64, 8, 3),
    "down": Config(128, 256, 64, 8, 3),
    "down_backward_swiglu": Config(128, 128, 64, 8, 3),
    "up_backward": Config(128, 256, 32, 8, 3),
    "weight_gradient": Config(128, 256, 64, 8, 5),
}
"""Chosen from machine code, by ``python -m benchmarks.predict``, not yet from measured times, which
``python -m benchmarks.tune_experts`` takes. All kernels over tiles of rows share ``m``."""
SUM_COLUMNS = 1024
HOST_PROGRAMS = 3
"""Programs without a GPU: few, so that in the interpreter each takes several tiles."""


def obstacle(tokens_TD: Tensor, hidden_size: int) -> str | None:
    """Say why :func:`fused_experts` cannot take these tokens; None if it can."""
    if tokens_TD.dtype not in (torch.bfloat16, torch.float16):
        return f"it multiplies bfloat16 and float16, not {tokens_TD.dtype}"
    if tokens_TD.shape[1] % ALIGNMENT or hidden_size % ALIGNMENT:
        return f"widths must be multiples of {ALIGNMENT}, not {tokens_TD.shape[1]} and {hidden_size}"
    if triton.knobs.runtime.interpret:
        return None
    if tokens_TD.device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels need an NVIDIA GPU, not {tokens_TD.device}"
    capability = torch.cuda.get_device_capability(tokens_TD.device)
    return None if capability >= CAPABILITY else f"its kernels need compute capability {CAPABILITY}, not {capability}"


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
        tokens_TD: bfloat16 or float16, for which :func:`obstacle` gives None.
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


class Tiles(NamedTuple):
    """Rows of each tile; int32 [tiles] each, on the device.

    Attributes:
        group: Expert of the tile; E for a tile without rows.
        first: First row of the tile.
        end: End of the expert's rows.
        total: How many tiles have rows, [1].
    """

    group: Tensor
    first: Tensor
    end: Tensor
    total: Tensor


def place_tiles(tokens_per_expert_E: Tensor, num_rows: int, m: int) -> Tiles:
    """Tile N rows by ``m``, each expert from a new tile; the number of tiles is an upper bound."""
    num_experts = len(tokens_per_expert_E)
    tiles = (num_rows + num_experts * (m - 1)) // m
    table = torch.empty(3, tiles, dtype=torch.int32, device=tokens_per_expert_E.device)
    placed = Tiles(table[0], table[1], table[2], table.new_empty(1))
    kernels.place_tiles[(tiles,)](
        tokens_per_expert_E, *placed, num_experts, MAX_GROUPS=triton.next_power_of_2(num_experts), M=m
    )
    return placed


def programs_at_a_time(device: torch.device) -> int:
    """Count the programs of a kernel that takes all tiles: one on each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else HOST_PROGRAMS


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
        tiles = place_tiles(order.tokens_per_expert_E, len(token_of_row_N), CONFIGS["up_swiglu"].m)
        parts = HiddenLayer(activation, gate_bias, up_bias)
        gate_up, hidden = multiply_up(tokens_TD, token_of_row_N, row_weights_N, gate, up, tiles, parts)
        out_TD = sum_rows(multiply_down(hidden, down, tiles), order)
        ctx.save_for_backward(tokens_TD, token_of_row_N, row_weights_N, gate, up, down, gate_up, *tiles)
        ctx.order, ctx.activation, ctx.slots, ctx.weights_dtype = order, activation, weights_TK.shape, weights_TK.dtype
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        tokens_TD, token_of_row_N, row_weights_N, gate, up, down, gate_up, *table = ctx.saved_tensors
        order, tiles, grad_TD = ctx.order, Tiles(*table), grad_TD.contiguous()
        ends_E = order.tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        grad_gate_up, hidden, grad_row_weights_N = multiply_down_backward(
            grad_TD, token_of_row_N, row_weights_N, down, gate_up, tiles, ctx.activation
        )
        (grad_down,) = multiply_transposed(grad_TD, hidden, token_of_row_N, ends_E, 1, gather_left=True)
        grad_gate, grad_up = multiply_transposed(grad_gate_up, tokens_TD, token_of_row_N, ends_E, 2, gather_left=False)
        grad_tokens_TD = sum_rows(multiply_up_backward(grad_gate_up, gate, up, tiles), order)
        grad_weights_TK = grad_row_weights_N.new_zeros(ctx.slots)
        grad_weights_TK.view(-1)[order.slot_of_row_N] = grad_row_weights_N
        grad_biases: tuple[Tensor | None, ...] = None, None
        if any(ctx.needs_input_grad[5:7]):
            grad_biases = sum_by_expert(grad_gate_up, order.tokens_per_expert_E).chunk(2, dim=1)
        grads = grad_tokens_TD, grad_weights_TK.to(ctx.weights_dtype), grad_gate, grad_up, grad_down, *grad_biases
        return *grads, None, None


def multiply_up(
    tokens_TD: Tensor,
    token_of_row_N: Tensor,
    row_weights_N: Tensor,
    gate: Tensor,
    up: Tensor,
    tiles: Tiles,
    parts: HiddenLayer = PLAIN_LAYER,
) -> tuple[Tensor, Tensor]:
    """Compute the outputs of gate and up with their biases, [N, 2 F], and their weighted SwiGLU, [N, F]."""
    config, rows, (experts, columns, inner) = CONFIGS["up_swiglu"], len(token_of_row_N), gate.shape
    gate_up, hidden = (tokens_TD.new_empty(rows, width) for width in (2 * columns, columns))
    biases = [None if bias is None else bias.contiguous() for bias in parts[1:]]
    kernels.up_swiglu[(len(tiles.group) * triton.cdiv(columns, config.n),)](
        tokens_TD,
        token_of_row_N,
        *(_described(weight, 1, config.n, config.k) for weight in (gate, up)),
        *biases,
        row_weights_N,
        gate_up,
        hidden,
        *tiles[:3],
        experts,
        inner,
        columns,
        EVEN=inner % config.k == 0,
        **_constants(parts.activation),
        **config.launch(),
    )
    return gate_up, hidden


def multiply_down(hidden_NF: Tensor, down: Tensor, tiles: Tiles) -> Tensor:
    """Multiply by down, [N, F] -> [N, D]."""
    config, (_, columns, inner) = CONFIGS["down"], down.shape
    out = hidden_NF.new_empty(len(hidden_NF), columns)
    kernels.down[(programs_at_a_time(out.device),)](
        _described(hidden_NF, config.m, config.k),
        _described(down, 1, config.n, config.k),
        out,
        *tiles,
        inner,
        columns,
        **config.launch(),
    )
    return out


def multiply_up_backward(grad_gate_up: Tensor, gate: Tensor, up: Tensor, tiles: Tiles) -> Tensor:
    """Multiply gradients by gate and up, and add, [N, 2 F] -> [N, D]."""
    config, (_, inner, columns) = CONFIGS["up_backward"], gate.shape
    out = grad_gate_up.new_empty(len(grad_gate_up), columns)
    kernels.up_backward[(programs_at_a_time(out.device),)](
        _described(grad_gate_up, config.m, config.k),
        *(_described(weight, 1, config.k, config.n) for weight in (gate, up)),
        out,
        *tiles,
        inner,
        columns,
        **config.launch(),
    )
    return out


def multiply_down_backward(
    grad_TD: Tensor,
    token_of_row_N: Tensor,
    row_weights_N: Tensor,
    down: Tensor,
    gate_up: Tensor,
    tiles: Tiles,
    activation: Activation = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients of gate's and up's outputs [N, 2 F], SwiGLU's output [N, F], gradients of row weights [N]."""
    config, rows = CONFIGS["down_backward_swiglu"], len(token_of_row_N)
    experts, inner, columns = down.shape
    grad_gate_up, hidden = torch.empty_like(gate_up), gate_up.new_empty(rows, columns)
    across = triton.cdiv(columns, config.n)
    parts = row_weights_N.new_empty(across, rows)
    kernels.down_backward_swiglu[(len(tiles.group) * across,)](
        grad_TD,
        token_of_row_N,
        _described(down, 1, config.k, config.n),
        gate_up,
        row_weights_N,
        grad_gate_up,
        hidden,
        parts,
        *tiles[:3],
        experts,
        rows,
        inner,
        columns,
        EVEN=inner % config.k == 0,
        **_constants(activation),
        **config.launch(),
    )
    return grad_gate_up, hidden, parts.sum(0)


def multiply_transposed(
    left: Tensor, right: Tensor, token_of_row_N: Tensor, ends_E: Tensor, outputs: int, *, gather_left: bool
) -> list[Tensor]:
    """Compute ``left``^T ``right`` of each expert's rows, [E, A, B].

    The columns of ``left`` have ``outputs`` parts, each with a result of its own. One of the operands is gathered.
    """
    config, experts = CONFIGS["weight_gradient"], len(ends_E)
    rows, columns = left.shape[1] // outputs, right.shape[1]
    grads = [left.new_empty(experts, rows, columns) for _ in range(outputs)]
    kernels.weight_gradient[(triton.cdiv(rows, config.m) * triton.cdiv(columns, config.n), outputs, experts)](
        left,
        right,
        token_of_row_N,
        ends_E,
        grads[0],
        grads[-1],
        left.shape[1],
        rows,
        columns,
        GATHER_LEFT=gather_left,
        GATHER_RIGHT=not gather_left,
        **config.launch(),
    )
    return grads


def sum_rows(rows_ND: Tensor, order: RowOrder, row_weights_N: Tensor | None = None) -> Tensor:
    """Sum each token's rows, times their fp32 weights if given, in fp32, [N, D] -> [T, D]."""
    tokens, width = len(order.first_of_token) - 1, rows_ND.shape[1]
    out = rows_ND.new_empty(tokens, width)
    columns = min(SUM_COLUMNS, triton.next_power_of_2(width))
    kernels.gather_sum[(tokens, triton.cdiv(width, columns))](
        rows_ND,
        order.row_of_kept_slot_N,
        order.first_of_token,
        row_weights_N,
        out,
        width,
        SLOTS=triton.next_power_of_2(order.top_k),
        N=columns,
        num_warps=4,
    )
    return out


def _constants(activation: Activation) -> dict[str, float | None]:
    return {"ALPHA": activation.alpha, "LIMIT": activation.limit, "OFFSET": activation.offset}


def _described(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block))
