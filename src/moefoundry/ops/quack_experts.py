"""The mixture of SwiGLU experts on QuACK's grouped GEMMs (``quack-kernels``): ``model.moe.backend: quack``.

    h, a               tokens of the rows, times gate and up; SwiGLU of h            gemm_gated
    y                  a, times down                                                 gemm
    out                each token's rows of y, times their weights                   sum_rows
    dh, w a, dw        gradients of the rows, times down; SwiGLU's; of the weights   gemm_dgated
    d down             gradients of the rows, transposed, times w a                  gemm
    d tokens           dh, times gate and up; each token's rows                      gemm, sum_rows
    d gate, d up       tokens of the rows, transposed, times dh                      gemm

Rows are gathered inside the products, which read their offsets on the device: the host never waits. Kept for backward:
the tokens, h [N, 2F] and the routing. In h, columns of gate and up take turns, as QuACK's epilogues read pairs.

The first line, the next two and the backward pass are an operator of torch each, as in
``ops/fused_experts/operators.py``; names in capitals are those registered.

QuACK takes gate and up as one tensor [E, 2F, D], gate first (``concat_layout``), and they are two parameters. Narrow
copies of them lie so. Others are copied in the forward pass, and again in the backward pass, as keeping the copy would
hold what FSDP frees. Each copy moves 8 E F D bytes; another 8 are moved when autograd makes the gradients contiguous.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moefoundry.ops.expert_mixture import expert_mixture_reference
from moefoundry.ops.permute import RowOrder
from moefoundry.ops.recompute import last_operand_is_there, unread

PACKAGE, MODULE = "quack-kernels", "quack.gemm_interface"
MAJOR = 9
"""First number of the compute capability for which the calls have been compiled."""
ALIGNMENT = 8  # elements; rows are multiples of 16 bytes
CALLS = {
    "gemm": {"cu_seqlens_m", "cu_seqlens_k", "A_idx", "concat_layout", "out", "tuned"},
    "gemm_gated": {"activation", "postact_out", "cu_seqlens_m", "A_idx", "concat_layout", "tuned"},
    "gemm_dgated": {"activation", "colvec_scale", "colvec_reduce", "cu_seqlens_m", "A_idx", "config"},
}
"""The functions, and arguments by name, that are used; other versions of QuACK may lack some."""


def obstacle(tokens_TD: Tensor, hidden_size: int) -> str:
    """Say why :func:`quack_experts` cannot take these tokens; empty if it can."""
    if tokens_TD.dtype != torch.bfloat16:
        return f"it multiplies bfloat16, not {tokens_TD.dtype}"
    if tokens_TD.shape[1] % ALIGNMENT or hidden_size % ALIGNMENT:
        return f"widths must be multiples of {ALIGNMENT}, not {tokens_TD.shape[1]} and {hidden_size}"
    return _obstacle_of(tokens_TD.device)


@torch.compiler.assume_constant_result
def _obstacle_of(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return f"its kernels need an NVIDIA GPU, not {device}"
    capability = torch.cuda.get_device_capability(device)
    return missing() if capability[0] == MAJOR else f"it is for compute capability {MAJOR}.x, not {capability}"


@cache
def missing() -> str:
    """Say why the package cannot be used; empty if it can."""
    if importlib.util.find_spec(MODULE.split(".")[0]) is None:
        return f"the package {PACKAGE} is not installed"
    try:
        library = importlib.import_module(MODULE)
        for name, arguments in CALLS.items():
            if lacking := arguments - signature(getattr(library, name)).parameters.keys():
                return f"{name} of {PACKAGE} has no {', '.join(sorted(lacking))}: another version of it is needed"
    except Exception as error:  # it looks for CUDA while it is imported
        return f"the package {PACKAGE} does not load: {type(error).__name__}: {error}"
    return ""


def quack_experts(
    tokens_TD: Tensor, weights_TK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor, order: RowOrder
) -> Tensor:
    """Compute each token's weighted sum of its experts' SwiGLU, [T, D] -> [T, D].

    Args:
        tokens_TD: bfloat16, for which :func:`obstacle` is empty.
        weights_TK: Top-k weights, any float dtype; used in fp32.
        gate_EFD: Weights of the experts, each in the layout of ``nn.Linear``, dtype of the tokens; likewise the others.
        up_EFD: [E, F, D].
        down_EDF: [E, D, F].
        order: Order of the slots that have rows.
    """
    operands = tokens_TD, weights_TK, gate_EFD, up_EFD, down_EDF, order
    if not len(order.slot_of_row_N):
        return expert_mixture_reference(*operands)
    return _QuackExperts.apply(*operands)


class _QuackExperts(Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens_TD: Tensor,
        weights_TK: Tensor,
        gate_EFD: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        order: RowOrder,
    ) -> Tensor:
        tokens_TD, down_EDF = tokens_TD.contiguous(), down_EDF.contiguous()
        token_of_row_N = order.token_of_row_N.to(torch.int32)
        row_weights_N = weights_TK.flatten()[order.slot_of_row_N].float()
        starts_E1 = F.pad(order.tokens_per_expert_E.cumsum(0), (1, 0)).to(torch.int32)
        hidden_NF = tokens_TD.new_empty(len(row_weights_N), up_EFD.shape[1])
        gate_up_N2F = UP_SWIGLU(tokens_TD, token_of_row_N, starts_E1, gate_EFD, up_EFD, hidden_NF)
        if last_operand_is_there():
            out_TD = unread(tokens_TD, *tokens_TD.shape)
        else:
            out_TD = DOWN_SUM(hidden_NF, row_weights_N, starts_E1, down_EDF, order.tensors, order.top_k)
        ctx.save_for_backward(
            tokens_TD, token_of_row_N, row_weights_N, starts_E1, gate_EFD, up_EFD, down_EDF, gate_up_N2F
        )
        ctx.order, ctx.slots, ctx.weights_dtype = order, weights_TK.shape, weights_TK.dtype
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        order = ctx.order
        grad_tokens_TD, grad_row_weights_N, grad_gate_up_E2FD, grad_down_EDF = BACKWARD(
            grad_TD.contiguous(), *ctx.saved_tensors, order.tensors, order.top_k
        )
        grad_weights_TK = grad_row_weights_N.new_zeros(ctx.slots)
        grad_weights_TK.view(-1)[order.slot_of_row_N] = grad_row_weights_N
        grads = grad_tokens_TD, grad_weights_TK.to(ctx.weights_dtype), *grad_gate_up_E2FD.chunk(2, dim=1)
        return *grads, grad_down_EDF, None


def up_swiglu(
    tokens_TD: Tensor,
    token_of_row_N: Tensor,
    starts_E1: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    hidden_NF: Tensor,
) -> Tensor:
    """Compute gate's and up's outputs [N, 2 F]; write SwiGLU to ``hidden_NF``."""
    quack: Any = importlib.import_module(MODULE)
    gate_up_N2F, _ = quack.gemm_gated(
        tokens_TD,
        stacked(gate_EFD, up_EFD).mT,
        activation="swiglu",
        postact_out=hidden_NF,
        cu_seqlens_m=starts_E1,
        A_idx=token_of_row_N,
        concat_layout=("B",),
        tuned=False,  # tuning depends on the number of rows, which changes from batch to batch
    )
    return gate_up_N2F


def down_sum(
    hidden_NF: Tensor, row_weights_N: Tensor, starts_E1: Tensor, down_EDF: Tensor, order: list[Tensor], top_k: int
) -> Tensor:
    """Multiply rows by down, and sum those of each token, times their weights, [N, F] -> [T, D]."""
    from moefoundry.ops.fused_experts import launches

    quack: Any = importlib.import_module(MODULE)
    out_ND = quack.gemm(hidden_NF, down_EDF.mT, cu_seqlens_m=starts_E1, tuned=False)
    return launches.sum_rows(out_ND, RowOrder.from_tensors(order, top_k), row_weights_N)


def backward(
    grad_TD: Tensor,
    tokens_TD: Tensor,
    token_of_row_N: Tensor,
    row_weights_N: Tensor,
    starts_E1: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    gate_up_N2F: Tensor,
    order: list[Tensor],
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of tokens, row weights, gate and up in one [E, 2 F, D], and down."""
    from moefoundry.ops.fused_experts import launches

    quack: Any = importlib.import_module(MODULE)
    grad_gate_up_N2F, hidden_NF, grad_row_weights_N = quack.gemm_dgated(
        grad_TD,
        down_EDF,
        gate_up_N2F,
        activation="swiglu",
        colvec_scale=row_weights_N,
        colvec_reduce=True,
        cu_seqlens_m=starts_E1,
        A_idx=token_of_row_N,
        dynamic_scheduler=False,
        config=_tiling(),
    )
    grad_down_EDF = torch.empty_like(down_EDF)
    of_rows = {"cu_seqlens_k": starts_E1, "A_idx": token_of_row_N, "tuned": False}
    quack.gemm(grad_TD.T, hidden_NF, out=grad_down_EDF, **of_rows)
    del hidden_NF
    gate_up_E2FD = stacked(gate_EFD, up_EFD)
    layout = {"cu_seqlens_m": starts_E1, "concat_layout": ("B",), "tuned": False}
    rows_ND = quack.gemm(grad_gate_up_N2F, gate_up_E2FD, **layout)
    grad_tokens_TD = launches.sum_rows(rows_ND, RowOrder.from_tensors(order, top_k))
    del rows_ND
    grad_gate_up_E2FD = torch.empty_like(gate_up_E2FD)
    del gate_up_E2FD
    quack.gemm(tokens_TD.T, grad_gate_up_N2F, out=grad_gate_up_E2FD.mT, concat_layout=("out",), **of_rows)
    return grad_tokens_TD, grad_row_weights_N, grad_gate_up_E2FD, grad_down_EDF


UP_SWIGLU = torch.library.custom_op("moefoundry::quack_up_swiglu", up_swiglu, mutates_args={"hidden_NF"})
DOWN_SUM = torch.library.custom_op("moefoundry::quack_down_sum", down_sum, mutates_args=())
BACKWARD = torch.library.custom_op("moefoundry::quack_experts_backward", backward, mutates_args=())
MIXTURE_OPS = frozenset(
    {torch.ops.moefoundry.quack_up_swiglu.default, torch.ops.moefoundry.quack_down_sum.default},
)
"""The operators of the forward pass, for selective activation checkpointing, which has to keep both or none."""


@UP_SWIGLU.register_fake
def _(tokens_TD: Tensor, token_of_row_N: Tensor, starts_E1: Tensor, gate_EFD: Tensor, *others: object) -> Tensor:
    return tokens_TD.new_empty(len(token_of_row_N), 2 * gate_EFD.shape[1])


@DOWN_SUM.register_fake
def _(
    hidden_NF: Tensor, row_weights_N: Tensor, starts_E1: Tensor, down_EDF: Tensor, order: list[Tensor], top_k: int
) -> Tensor:
    return hidden_NF.new_empty(len(RowOrder.from_tensors(order, top_k).first_of_token) - 1, down_EDF.shape[1])


@BACKWARD.register_fake
def _(
    grad_TD: Tensor,
    tokens_TD: Tensor,
    token_of_row_N: Tensor,
    row_weights_N: Tensor,
    starts_E1: Tensor,
    gate_EFD: Tensor,
    up_EFD: Tensor,
    down_EDF: Tensor,
    *others: object,
) -> tuple[Tensor, ...]:
    experts, hidden, width = gate_EFD.shape
    stacked_E2FD = gate_EFD.new_empty(experts, 2 * hidden, width)
    return torch.empty_like(tokens_TD), torch.empty_like(row_weights_N), stacked_E2FD, torch.empty_like(down_EDF)


def stacked(gate_EFD: Tensor, up_EFD: Tensor) -> Tensor:
    """Give gate and up as one tensor [E, 2F, D]: a view, if they lie as its halves, else a copy."""
    experts, hidden, width = gate_EFD.shape
    stride, start = (2 * hidden * width, width, 1), gate_EFD.storage_offset()
    halves = gate_EFD.stride() == up_EFD.stride() == stride and up_EFD.storage_offset() == start + hidden * width
    if halves and gate_EFD.untyped_storage().data_ptr() == up_EFD.untyped_storage().data_ptr():
        return gate_EFD.as_strided((experts, 2 * hidden, width), stride, start)
    return torch.cat([gate_EFD, up_EFD], dim=1)


def _tiling() -> Any:
    """Tile ``gemm_dgated`` by 128 x 128; with its default, 128 x 192, the compiler spills registers."""
    config = importlib.import_module("quack.gemm_config").GemmConfig
    return config(tile_m=128, tile_n=128, is_dynamic_persistent=False)
