"""The gate's product: fp32 whatever comes, and nothing kept that is wider than what came."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops.fp8 import Tile, dequantize, fp8_kept_linear, quantize
from moefoundry.ops.wide_linear import wide_linear


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(9, 160).to(dtype).requires_grad_(), torch.randn(4, 160).requires_grad_(), torch.randn(9, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_product_and_gradients_are_those_of_a_wide_copy(dtype: torch.dtype) -> None:
    x, weight, grad = case(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    out, expected = wide_linear(x, weight), F.linear(x.to(wide), weight.to(wide))
    assert torch.equal(out, expected)
    assert out.dtype == wide
    got = torch.autograd.grad(out, (x, weight), grad.to(wide))
    for ours, theirs in zip(got, torch.autograd.grad(expected, (x, weight), grad.to(wide)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_narrow_input_is_kept_as_it_came() -> None:
    x, weight, _ = case(torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        wide_linear(x, weight)
    assert {tensor.data_ptr() for tensor in kept} == {x.data_ptr(), weight.data_ptr()}


def test_with_fp8_rows_only_the_weights_gradient_sees_the_rounding() -> None:
    x, weight, grad = case(torch.bfloat16)
    out, exact = fp8_kept_linear(x, weight), wide_linear(x, weight)
    assert torch.equal(out, exact)
    got, expected = (torch.autograd.grad(y, (x, weight), grad) for y in (out, exact))
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], grad.T @ dequantize(quantize(x.detach(), Tile.ROW)), rtol=1e-6, atol=1e-6)
    assert not torch.equal(got[1], expected[1])
