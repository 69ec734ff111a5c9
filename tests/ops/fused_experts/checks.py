"""The checks of ``test_fused_experts.py``: run in Triton's interpreter by a process of its own, or on a GPU here."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer
from moefoundry.ops.expert_mixture import expert_mixture_reference
from moefoundry.ops.fused_experts import fused_experts, launches
from moefoundry.ops.permute import RowOrder, order_by_expert, sum_rows_reference
from moefoundry.ops.swiglu import Activation

SMALL = {name: launches.Config(16, 32, 16, 4, 2) for name in launches.CONFIGS}
CLAMPED = Activation(alpha=1.702, limit=1.5, offset=1.0)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def routed(tokens: int, experts: int, top_k: int, skew: float = 0.0) -> Tensor:
    """int64 [T, K] distinct experts; with ``skew`` the first come often and the last never."""
    scores = torch.rand(tokens, experts) - skew * torch.arange(experts) / experts
    if skew:
        scores[:, -1] = -torch.inf
    return scores.topk(top_k, dim=1).indices


def check_equal_to_float64(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    skew: float,
    keep: float,
    biased: bool = False,
    mix: Any = fused_experts,
) -> None:
    """Output and all gradients, ``shape`` T, D, F, E, K; a share ``keep`` of the slots has rows. With ``biased``, there
    are biases of gate and up, and a clamped activation."""
    torch.manual_seed(1)
    tokens, width, hidden, experts, top_k = shape
    ids = routed(tokens, experts, top_k, skew)
    kept = torch.rand(ids.shape) < keep
    order = order_by_expert(ids.to(device), experts, None if keep == 1 else kept.to(device))
    operands = [
        torch.randn(tokens, width),
        torch.rand(tokens, top_k),
        torch.randn(experts, hidden, width) * width**-0.5,
        torch.randn(experts, hidden, width) * width**-0.5,
        torch.randn(experts, width, hidden) * hidden**-0.5,
    ]
    if biased:
        operands += [torch.randn(experts, hidden), torch.randn(experts, hidden)]
    ours = [operand.to(device, dtype if index != 1 else torch.float32) for index, operand in enumerate(operands)]
    got = with_gradients(mix, ours, order, dtype, device)
    exact = [operand.double() for operand in ours]
    expected = with_gradients(expert_mixture_reference, exact, order, torch.float64, device)
    names = ("out", "x", "weights", "gate", "up", "down", "bias of gate", "bias of up")
    for name, mine, other in zip(names, got, expected, strict=False):
        error = (mine.double() - other).norm() / other.norm().clamp(min=1e-9)
        # What is kept of gate and up is rounded, and may so lie beyond the limit, where the gradient is 0.
        assert error < TOLERANCE[dtype] * (2 if biased else 1), f"{name}: {error:.1e}"
        assert mine.dtype == (torch.float32 if name == "weights" else dtype) or mine.dtype == torch.float64


def with_gradients(
    mix: Any, operands: list[Tensor], order: RowOrder, dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    """The output and the gradients of its operands, for the same incoming gradient each time."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    out = mix(*leaves[:5], order, HiddenLayer(CLAMPED, *leaves[5:]) if leaves[5:] else PLAIN_LAYER)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    return (out, *torch.autograd.grad(out, leaves, incoming))


def check_small_tiles(device: str, dtype: torch.dtype, *case: Any) -> None:
    """The same with tiles so small that every kernel has several in each direction."""
    with mock.patch.dict(launches.CONFIGS, SMALL):
        check_equal_to_float64(device, dtype, *case)


def check_no_rows(device: str, mix: Any = fused_experts) -> None:
    """No tokens at all."""
    leaves = [torch.zeros(*shape, device=device, dtype=torch.float16) for shape in ((0, 16), (0, 2), *[(4, 8, 16)] * 2)]
    leaves.append(torch.zeros(4, 16, 8, device=device, dtype=torch.float16))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    order = order_by_expert(torch.zeros(0, 2, dtype=torch.int64, device=device), 4)
    out = mix(*leaves, order)
    assert out.shape == (0, 16)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def check_weighted_sum(device: str, tokens: int, width: int, top_k: int, keep: float) -> None:
    """Rows of each token, times weights that the rows' dtype does not hold."""
    torch.manual_seed(3)
    kept = torch.rand(tokens, top_k) < keep
    order = order_by_expert(routed(tokens, 5, top_k).to(device), 5, kept.to(device))
    rows = torch.randn(len(order.slot_of_row_N), width, device=device, dtype=torch.float16)
    weights = torch.rand(len(rows), device=device)
    expected = sum_rows_reference(rows.double() * weights.double().unsqueeze(1), order)
    torch.testing.assert_close(launches.sum_rows(rows, order, weights), expected.half(), rtol=2e-3, atol=1e-6)


def check_weights_anywhere(device: str) -> None:
    """Gate and up may lie in any order, and so far apart that no descriptor has both."""
    torch.manual_seed(4)
    weights, x = torch.randn(2, 3, 24, 16).to(device, torch.float16), torch.randn(20, 16).to(device, torch.float16)
    order = order_by_expert(routed(20, 3, 2).to(device), 3)
    with mock.patch.dict(launches.CONFIGS, SMALL):
        tiles = launches.place_tiles(order.tokens_per_expert_E, 40, SMALL["up_swiglu"].m)
        gather = x, order.token_of_row_N.to(torch.int32), torch.ones(40, device=device)
        first, swapped = (launches.multiply_up(*gather, *pair, tiles)[0] for pair in (weights, weights.flip(0)))
        lower, higher = weights.unbind()
        behind, _ = launches.multiply_up(*gather, higher, lower, tiles)
        with mock.patch.object(launches, "MAX_STRIDE", 0):
            apart, _ = launches.multiply_up(*gather, lower, higher, tiles)
    exact = torch.cat([(x[gather[1].long()].double() @ half.double().mT) for half in weights.flatten(1, 2)], 1)
    assert torch.equal(first, apart)
    assert torch.equal(swapped, behind)
    assert torch.equal(first, swapped.roll(24, 1))
    experts = torch.arange(3, device=device).repeat_interleave(order.tokens_per_expert_E)
    exact = exact.view(40, 2, 3, 24)[torch.arange(40), :, experts].flatten(1)
    torch.testing.assert_close(first.double(), exact, rtol=2e-3, atol=2e-3)
