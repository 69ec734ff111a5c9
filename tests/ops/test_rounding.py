"""Rounded operands: which values they take, and that all three products of a linear map see them."""

import pytest
import torch
from torch import Tensor

from moefoundry.ops.rounding import round_gradient, round_operand


def bf16_nearest_even(x: Tensor) -> Tensor:
    """BF16 rounding on the bits of fp32, without a cast: add half an ulp (ties to even), drop the low 16 bits."""
    bits = x.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def sample() -> Tensor:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    return torch.cat([x, x * 1e-20, x * 1e20, torch.tensor([0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])])


def test_values_are_those_of_bfloat16_to_nearest_even() -> None:
    assert torch.equal(round_operand(sample(), torch.bfloat16), bf16_nearest_even(sample()))


@pytest.mark.parametrize("outer", [torch.float32, torch.float64])
@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_rounding_twice_changes_nothing(inner: torch.dtype, outer: torch.dtype) -> None:
    rounded = round_operand(sample()[:4096].to(outer), inner)
    assert rounded.dtype == outer
    assert torch.equal(rounded, rounded.to(inner).to(outer))
    assert torch.equal(rounded, round_operand(rounded, inner))


def test_operand_passes_its_gradient_unrounded() -> None:
    x = sample().requires_grad_()
    incoming = sample().flip(0)
    round_operand(x, torch.bfloat16).backward(incoming)
    assert torch.equal(x.grad, incoming)


def test_round_gradient_passes_the_value_and_rounds_the_gradient() -> None:
    x = sample().requires_grad_()
    incoming = sample().flip(0)
    out = round_gradient(x, torch.bfloat16)
    out.backward(incoming)
    assert torch.equal(out, x)
    assert torch.equal(x.grad, bf16_nearest_even(incoming))


def test_all_three_products_of_a_linear_map_take_rounded_operands() -> None:
    torch.manual_seed(1)
    x, weight, incoming = (
        torch.randn(6, 8, requires_grad=True),
        torch.randn(5, 8, requires_grad=True),
        torch.randn(6, 5),
    )
    product = round_operand(x, torch.bfloat16) @ round_operand(weight, torch.bfloat16).T
    round_gradient(product, torch.bfloat16).backward(incoming)
    x_, weight_, incoming_ = (bf16_nearest_even(t.detach()) for t in (x, weight, incoming))
    for got, expected in (
        (product, x_ @ weight_.T),
        (x.grad, incoming_ @ weight_),
        (weight.grad, incoming_.T @ x_),
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(product, x @ weight.T, rtol=0, atol=1e-4)
