"""The mixture of SwiGLU experts as products of block-sparse matrices (MegaBlocks, arXiv 2211.15841).

The hidden units of all rows and experts make one sparse matrix of 128 x 128 blocks. The two up-projections fill it, the
down-projection reads it; experts without rows have no blocks, and no row is dropped. Kept for backward: padded rows,
both up-projections' outputs, routing. Nothing waits for the host. Reference: ``ops/expert_mixture.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.block_sparse.kernels import BLOCK, missing, widened
from moefoundry.ops.block_sparse.layout import Topology, find_topology
from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer
from moefoundry.ops.permute import RowOrder, pad_order, permute, permute_slots, sum_rows
from moefoundry.ops.swiglu import Activation, swiglu, swiglu_backward

CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(tokens_TD: Tensor, hidden_size: int) -> str:
    """Say why :func:`block_sparse_experts` cannot take these tokens; empty if it can."""
    if found := missing():
        return found
    if tokens_TD.dtype not in DTYPES:
        return f"it multiplies float32, bfloat16 and float16, not {tokens_TD.dtype}"
    for key, width in (("model.d_model", tokens_TD.shape[1]), ("model.moe.expert_hidden_size", hidden_size)):
        if width % BLOCK:
            return f"{key} must be a multiple of {BLOCK}, not {width}"
    if triton.knobs.runtime.interpret:
        return ""
    if tokens_TD.device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels need an NVIDIA GPU, not {tokens_TD.device}"
    capability = torch.cuda.get_device_capability(tokens_TD.device)
    return "" if capability >= CAPABILITY else f"its kernels need compute capability {CAPABILITY}, not {capability}"


def block_sparse_experts(
    tokens_TD: Tensor,
    weights_TK: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    order: RowOrder,
    hidden: HiddenLayer = PLAIN_LAYER,
) -> Tensor:
    """[T, D] -> [T, D]: each token's weighted sum of its experts' SwiGLU.

    Args:
        tokens_TD: float32, bfloat16 or float16, on a GPU that :func:`obstacle` finds none for.
        weights_TK: Top-k weights, any float dtype.
        gate_EFD: Experts' weights, each in the layout of ``nn.Linear``, dtype as the tokens; likewise the next two.
        up_EFD: [E, F, D].
        down_EDF: [E, D, F].
        order: Order of the slots that have rows.
        hidden: Activation, and biases of gate and up.
    """
    padded = pad_order(order, len(tokens_TD), BLOCK)
    topology = find_topology(padded, gate_EFD.shape[1] // BLOCK)
    rows_PD = permute(F.pad(tokens_TD, (0, 0, 0, 1)), padded)
    weights_P = permute_slots(F.pad(weights_TK, (0, 0, 0, 1)), padded)
    rows_PD = _BlockSparseSwiGLU.apply(rows_PD, weights_P, gate_EFD, up_EFD, down_EDF, *hidden[1:], topology, hidden[0])
    return sum_rows(rows_PD, padded)[:-1]


class _BlockSparseSwiGLU(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_PD: Tensor,
        weights_P: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        gate_bias_EF: Tensor | None,
        up_bias_EF: Tensor | None,
        topology: Topology,
        activation: Activation,
    ) -> Tensor:
        gate, up, down = (weight.contiguous() for weight in (gate, up, down))
        gate_out, up_out = (multiply_into_blocks(rows_PD, weight.flatten(0, 1).T, topology) for weight in (gate, up))
        for out, bias_EF in ((gate_out, gate_bias_EF), (up_out, up_bias_EF)):
            if bias_EF is not None:
                out += bias_EF.reshape(-1, 1, BLOCK).index_select(0, topology.column_indices)
        hidden = swiglu(gate_out, up_out, _by_block(weights_P, gate), activation)
        ctx.save_for_backward(rows_PD, weights_P, gate, up, down, gate_out, up_out, *topology)
        ctx.activation = activation
        return multiply_blocks(hidden, _hidden_by_width(down), topology)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        rows_PD, weights_P, gate, up, down, gate_out, up_out, *rest = ctx.saved_tensors
        topology, grad_PD = Topology(*rest), grad_PD.contiguous()
        weights = _by_block(weights_P, gate)
        grad_hidden = multiply_into_blocks(grad_PD, _hidden_by_width(down).T, topology)
        grad_gate_out, grad_up_out, grad_weights = swiglu_backward(
            grad_hidden, gate_out, up_out, weights, ctx.activation
        )
        assert grad_weights is not None
        grad_rows_PD = multiply_blocks(grad_gate_out, gate.flatten(0, 1), topology)
        grad_rows_PD += multiply_blocks(grad_up_out, up.flatten(0, 1), topology)
        grad_gate, grad_up = (
            multiply_blocks(grad, rows_PD, topology, transposed=True).view(weight.shape)
            for grad, weight in ((grad_gate_out, gate), (grad_up_out, up))
        )
        grad_biases = [
            _sum_by_expert(grad, topology, gate.shape[1]) if needed else None
            for grad, needed in zip((grad_gate_out, grad_up_out), ctx.needs_input_grad[5:7], strict=True)
        ]
        hidden = swiglu(gate_out, up_out, weights, ctx.activation)
        grad_down = multiply_blocks(hidden, grad_PD, topology, transposed=True).view(gate.shape).mT.contiguous()
        return (
            grad_rows_PD,
            grad_weights.view(-1, gate.shape[1] // BLOCK, BLOCK).sum(1).flatten(),
            grad_gate,
            grad_up,
            grad_down,
            *grad_biases,
            None,
            None,
        )


def multiply_into_blocks(left_PD: Tensor, right: Tensor, topology: Topology) -> Tensor:
    """[P, D] x [D, E * F] -> [R * C, 128, 128], the blocks of the product that ``topology`` has."""
    blocks = left_PD.new_empty(len(topology.row_indices), BLOCK, BLOCK)
    shape = len(left_PD), right.shape[1]
    widened().sdd(left_PD, right, shape, blocks, topology.offsets, topology.row_indices, topology.column_indices)
    return blocks


def multiply_blocks(blocks: Tensor, right: Tensor, topology: Topology, *, transposed: bool = False) -> Tensor:
    """Blocks x [E * F, D] -> [P, D]; or blocks' transpose x [P, D] -> [E * F, D].

    Args:
        blocks: [R * C, 128, 128].
        right: The dense matrix.
        topology: Places of the blocks.
        transposed: Which of the two.
    """
    rows, columns = len(topology.offsets) - 1, len(topology.offsets_t) - 1
    shape = (columns * BLOCK, rows * BLOCK) if transposed else (rows * BLOCK, columns * BLOCK)
    out = right.new_empty(shape[0], right.shape[1])
    widened().dsd(
        shape,
        blocks,
        topology.offsets,
        topology.row_indices,
        topology.column_indices,
        topology.offsets_t,
        topology.row_indices_t,
        topology.blocks_t,
        transposed,
        right,
        out,
    )
    return out


def _hidden_by_width(down_EDF: Tensor) -> Tensor:
    """[E, D, F] -> [E * F, D], a copy. It is made again in backward: keeping it would hold what FSDP frees."""
    return down_EDF.mT.flatten(0, 1)


def _sum_by_expert(blocks: Tensor, topology: Topology, hidden_size: int) -> Tensor:
    """[R * C, 128, 128] -> [E, F], sums over each expert's rows; block rows of no expert make one bag more."""
    columns = hidden_size // BLOCK
    starts = topology.offsets_t[::columns] // columns
    if not len(blocks):
        return blocks.new_zeros(len(starts) - 1, hidden_size)
    rows_RF = blocks.view(-1, columns, BLOCK, BLOCK).sum(2).flatten(1)
    rows = torch.arange(len(rows_RF), device=starts.device, dtype=starts.dtype)
    bags = F.pad(starts, (0, 1), value=len(rows_RF))
    return F.embedding_bag(rows, rows_RF, bags, mode="sum", include_last_offset=True)[:-1]


def _by_block(weights_P: Tensor, gate_EFD: Tensor) -> Tensor:
    """[P] -> [R * C, 128]: each block's rows' weights."""
    return weights_P.view(-1, 1, BLOCK).expand(-1, gate_EFD.shape[1] // BLOCK, -1).flatten(0, 1)
