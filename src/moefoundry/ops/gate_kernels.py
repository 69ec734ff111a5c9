"""The gate's products as two Triton kernels, for ``ops/wide_linear.py``.

Each adds what would take a pass of its own: the products of the weight's three parts, and the gradient that the tokens
have from elsewhere. T tokens, D model width, E experts; sums are fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# a kernel's arguments have types of Triton's own, those of its launch

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moefoundry.ops.fused_experts.kernels import halves

LOGITS = {"M": 128, "K": 64, "PROMOTED": 4, "num_warps": 8, "num_stages": 4}
"""Tiling of the logits, whose columns are at most ``MAX_COLUMNS`` experts, and steps between promotions."""
GRADIENT = {"M": 128, "N": 128, "K": 64, "num_warps": 8, "num_stages": 3}
MAX_COLUMNS, MIN_COLUMNS = 64, 16
MIN_STEPS = 8
"""Least steps of a program that shares a tile of the logits with others."""
MULTIPROCESSORS = 132
"""Multiprocessors of the GPU that is not there, where kernels are interpreted or only compiled."""


def fits(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Tell whether the kernels can take these: T > 0, E and D divisible by 8, the tokens' memory by 16 bytes."""
    experts, width = weight_ED.shape
    one_after_the_other = x_TD.stride() == (width, 1)  # is_contiguous() allows any stride of a single row
    return len(x_TD) > 0 and experts % 8 == width % 8 == 0 and one_after_the_other and x_TD.data_ptr() % 16 == 0


def multiply_gate(x_TD: Tensor, parts: Tensor) -> Tensor:
    """Multiply bfloat16 [T, D] by the three parts of the gate's weight, [3 E, D], and add them, the first two first.

    Where tiles are fewer than multiprocessors, several share one, each a part of D.
    """
    (tokens, width), experts = x_TD.shape, len(parts) // 3
    columns = min(MAX_COLUMNS, max(MIN_COLUMNS, triton.next_power_of_2(experts)))
    tiles = triton.cdiv(experts, columns), triton.cdiv(tokens, LOGITS["M"])
    steps = triton.cdiv(width, LOGITS["K"])
    shares = max(1, min(steps // MIN_STEPS, _multiprocessors(x_TD) // (tiles[0] * tiles[1])))
    out = x_TD.new_empty(shares, tokens, experts, dtype=torch.float32)
    gate_logits[(*tiles, shares)](
        _described(x_TD, LOGITS["M"], LOGITS["K"]),
        *(_described(parts.view(3, experts, width), number, columns, LOGITS["K"]) for number in (2, 1)),
        out,
        tokens,
        experts,
        width,
        triton.cdiv(steps, shares),
        N=columns,
        **LOGITS,
    )
    return out[0] if shares == 1 else out.sum(0)


def multiply_and_add(grads_TR: Tensor, weights_RD: Tensor, other_TD: Tensor) -> Tensor:
    """Compute ``other + grads @ weights``, [T, D], of bfloat16; it is rounded once."""
    out_TD, (tokens, width) = torch.empty_like(other_TD), other_TD.shape
    gate_gradient[(triton.cdiv(width, GRADIENT["N"]), triton.cdiv(tokens, GRADIENT["M"]))](
        _described(grads_TR, GRADIENT["M"], GRADIENT["K"]),
        _described(weights_RD, GRADIENT["K"], GRADIENT["N"]),
        other_TD,
        out_TD,
        tokens,
        width,
        len(weights_RD),
        **GRADIENT,
    )
    return out_TD


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else MULTIPROCESSORS


def _described(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block))


@triton.jit
def gate_logits(
    tokens,
    two_parts,
    part,
    out,
    num_tokens,
    experts,
    width,
    steps,
    PROMOTED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """Sum ``steps`` steps of D of the logits of a tile; ``out`` is [shares, T, E].

    ``two_parts`` and ``part`` describe the same tensor, the parts [3, E, D], in blocks of two and of one of them.
    """
    across, down, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # a sum of each part: products into one sum would wait for each other
    rest_and_low = tl.zeros([M, 2 * N], tl.float32)
    high = tl.zeros([M, N], tl.float32)
    # Tensor cores cut off what does not fit into a sum (Fasi et al. 2021, PeerJ Computer Science 7:e330), so that many
    # additions make it smaller. The large part's are therefore few; FADD adds their sums.
    promoted = tl.zeros([M, N], tl.float32)
    first = share * steps
    for step in range(first, tl.minimum(first + steps, tl.cdiv(width, K))):
        start = step * K
        x = tokens.load([down * M, start])
        rest_and_low = tl.dot(x, two_parts.load([0, across * N, start]).reshape(2 * N, K).T, rest_and_low)
        high = tl.dot(x, part.load([2, across * N, start]).reshape(N, K).T, high)
        if step % PROMOTED == PROMOTED - 1:
            promoted += high
            high = tl.zeros([M, N], tl.float32)
    rest, low = halves(rest_and_low, M, 2 * N)
    row, column, keep = place_of(down, across, num_tokens, experts, M, N)
    place = out + (share.to(tl.int64) * num_tokens + row) * experts + column
    tl.store(place, rest + low + high + promoted, mask=keep)


@triton.jit
def gate_gradient(
    grads, weights, other, out, num_tokens, width, inner, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """Add the product [T, R] x [R, D] to a tile of ``other``."""
    width = width // 8 * 8  # so that the compiler knows it, and copies 16 bytes at a time
    across, down = tl.program_id(0), tl.program_id(1)
    row, column, keep = place_of(down, across, num_tokens, width, M, N)
    total = tl.load(other + row * width + column, mask=keep, other=0.0).to(tl.float32)
    for start in range(0, inner, K):
        total = tl.dot(grads.load([down * M, start]), weights.load([start, across * N]), total)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=keep)


@triton.jit
def place_of(down, across, rows, columns, M: tl.constexpr, N: tl.constexpr):
    """Give the rows, int64 [M, 1], and columns [1, N] of a tile, and which of them exist."""
    row = down.to(tl.int64) * M + tl.arange(0, M)[:, None]
    column = across * N + tl.arange(0, N)[None, :]
    return row, column, (row < rows) & (column < columns)
