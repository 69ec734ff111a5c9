"""The gate's product: fp32 whatever comes, and nothing kept that is wider than what came."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moefoundry.ops.fp8 import Tile, dequantize, fp8_kept_linear, quantize
from moefoundry.ops.recompute import keeping
from moefoundry.ops.wide_linear import multiply_parts, wide_linear
from moefoundry.parallel import KEPT_OPS


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(9, 160).to(dtype).requires_grad_(), torch.randn(4, 160).requires_grad_(), torch.randn(9, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_product_and_gradients_are_those_of_a_wide_copy(dtype: torch.dtype) -> None:
    x, weight, grad = case(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    (out, again), expected = wide_linear(x, weight), F.linear(x.to(wide), weight.to(wide))
    assert again is x
    assert torch.equal(out, expected)
    assert out.dtype == wide
    got = torch.autograd.grad(out, (x, weight), grad.to(wide))
    for ours, theirs in zip(got, torch.autograd.grad(expected, (x, weight), grad.to(wide)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_parts_keep_24_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU multiplies; the input's gradient is exact to bfloat16's rounding."""
    monkeypatch.setattr("moefoundry.ops.wide_linear._by_parts", lambda x_TD, weight_ED: True)
    x, weight, grad = case(torch.bfloat16)
    out, _ = wide_linear(x, weight)
    exact = x.double() @ weight.double().T
    got, expected = torch.autograd.grad(out, (x, weight), grad), torch.autograd.grad(exact, (x, weight), grad.double())
    for ours, theirs, bits in ((out, exact, 21), (got[0], expected[0], 8), (got[1], expected[1], 21)):
        assert (ours.double() - theirs).norm() < 2**-bits * theirs.norm()
    rounded = expected[0].float().bfloat16()
    assert (got[0] != rounded).float().mean() < 0.01  # of values between two, 16 bits are not always enough


def test_a_narrow_input_is_kept_as_it_came() -> None:
    x, weight, _ = case(torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        wide_linear(x, weight)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("product", [wide_linear, fp8_kept_linear])
def test_selective_checkpointing_keeps_the_product_by_parts(
    product: Callable[..., tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moefoundry.ops.wide_linear._by_parts", lambda x_TD, weight_ED: True)
    calls = []

    def counting(*operands: Tensor) -> Tensor:
        calls.append(operands)
        return multiply_parts(*operands)

    monkeypatch.setattr("moefoundry.ops.wide_linear.multiply_parts", counting)
    x, weight, grad = case(torch.bfloat16)
    expected = torch.autograd.grad(product(x, weight)[0].softmax(1), (x, weight), grad)
    plain, calls[:] = len(calls), []
    out = checkpoint(lambda x: product(x, weight)[0].softmax(1), x, use_reentrant=False, context_fn=keeping(KEPT_OPS))
    got = torch.autograd.grad(out, (x, weight), grad)
    assert len(calls) == plain == 3
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_with_fp8_rows_only_the_weights_gradient_sees_the_rounding() -> None:
    x, weight, grad = case(torch.bfloat16)
    (out, again), (exact, _) = fp8_kept_linear(x, weight), wide_linear(x, weight)
    assert again is x
    assert torch.equal(out, exact)
    got, expected = (torch.autograd.grad(y, (x, weight), grad) for y in (out, exact))
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], grad.T @ dequantize(quantize(x.detach(), Tile.ROW)), rtol=1e-6, atol=1e-6)
    assert not torch.equal(got[1], expected[1])
