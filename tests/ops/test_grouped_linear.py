"""The grouped product against one product per expert in float64, at the edges that routing reaches."""

import re

import pytest
import torch
from torch import Tensor

from moefoundry.ops.grouped_linear import GroupedLinear, grouped_linear, grouped_linear_loop, zero_empty_groups

COUNTS = {
    "uneven": [3, 1, 7, 5],
    "balanced": [4, 4, 4, 4],
    "empty_first": [0, 5, 2, 3],
    "empty_last": [5, 2, 3, 0],
    "empty_middle": [2, 0, 0, 9],
    "all_on_first": [11, 0, 0, 0],
    "all_on_middle": [0, 0, 11, 0],
    "all_on_last": [0, 0, 0, 11],
    "one_row": [0, 1, 0, 0],
    "no_rows": [0, 0, 0, 0],
}
IN, OUT = 16, 24
FP32_ROUNDING = {"rtol": 0, "atol": 2e-5}  # sums of at most 24 products of standard normal values

counts_param = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())


def case(counts: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, weights, incoming gradient, counts."""
    torch.manual_seed(len(counts) + sum(counts))
    rows, weight, incoming = (torch.randn(shape) for shape in ((sum(counts), IN), (4, OUT, IN), (sum(counts), OUT)))
    return rows.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), incoming.to(dtype), torch.tensor(counts)


def oracle(rows: Tensor, weight: Tensor, incoming: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, dX and dW in float64, row by row, without autograd."""
    rows, weight, incoming = (x.detach().double() for x in (rows, weight, incoming))
    out, grad_rows, grad_weight = incoming.clone(), torch.zeros_like(rows), torch.zeros_like(weight)
    expert_of_row = [expert for expert, count in enumerate(counts.tolist()) for _ in range(count)]
    for row, expert in enumerate(expert_of_row):
        out[row] = weight[expert] @ rows[row]
        grad_rows[row] = incoming[row] @ weight[expert]
        grad_weight[expert] += torch.outer(incoming[row], rows[row])
    return out, grad_rows, grad_weight


def run(product, rows: Tensor, weight: Tensor, incoming: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = product(rows, weight, counts)
    return out, *torch.autograd.grad(out, (rows, weight), incoming)


@counts_param
@pytest.mark.parametrize("product", [grouped_linear, grouped_linear_loop])
def test_backends_equal_float64_to_fp32_rounding(product: GroupedLinear, counts: list[int]) -> None:
    inputs = case(counts)
    for got, expected in zip(run(product, *inputs), oracle(*inputs), strict=True):
        torch.testing.assert_close(got.double(), expected, **FP32_ROUNDING)


@counts_param
def test_loop_equals_the_oracle_in_float64(counts: list[int]) -> None:
    inputs = case(counts, torch.float64)
    for got, expected in zip(run(grouped_linear_loop, *inputs), oracle(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@counts_param
def test_grouped_equals_loop_to_fp32_rounding(counts: list[int]) -> None:
    inputs = case(counts)
    for got, expected in zip(run(grouped_linear, *inputs), run(grouped_linear_loop, *inputs), strict=True):
        torch.testing.assert_close(got, expected, **FP32_ROUNDING)


@counts_param
@pytest.mark.parametrize("product", [grouped_linear, grouped_linear_loop])
def test_experts_without_rows_get_a_gradient_of_exactly_zero(product: GroupedLinear, counts: list[int]) -> None:
    _, _, grad_weight = run(product, *case(counts))
    for expert, count in enumerate(counts):
        assert (grad_weight[expert].count_nonzero() == 0) == (count == 0)


@counts_param
def test_bfloat16_products_are_rounded_once(counts: list[int]) -> None:
    inputs = case(counts, torch.bfloat16)
    for got, expected in zip(run(grouped_linear, *inputs), oracle(*inputs), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-3)


@counts_param
def test_expanded_gradient_is_taken(counts: list[int]) -> None:
    rows, weight, incoming, counts_E = case(counts)
    grouped_linear(rows, weight, counts_E).sum().backward()
    _, grad_rows, grad_weight = oracle(rows, weight, torch.ones_like(incoming), counts_E)
    torch.testing.assert_close(rows.grad.double(), grad_rows, **FP32_ROUNDING)
    torch.testing.assert_close(weight.grad.double(), grad_weight, **FP32_ROUNDING)


@pytest.mark.parametrize("counts", [[3, 1, 7, 5], [0, 1, 0, 0]], ids=["uneven", "one_row"])
def test_transposed_gradient_is_taken(counts: list[int]) -> None:
    rows, weight, incoming, counts_E = case(counts)
    column_major = incoming.T.contiguous().T
    for got, expected in zip(
        run(grouped_linear, rows, weight, column_major, counts_E), oracle(rows, weight, incoming, counts_E), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, **FP32_ROUNDING)


def test_two_runs_give_the_same_bits() -> None:
    inputs = case(COUNTS["uneven"])
    for first, second in zip(run(grouped_linear, *inputs), run(grouped_linear, *inputs), strict=True):
        assert torch.equal(first, second)


def test_float64_is_refused_with_the_backend_that_takes_it() -> None:
    rows, weight, _, counts = case([1, 1, 1, 1], torch.float64)
    with pytest.raises(ValueError, match=r"^backend grouped_mm does not take torch.float64; use backend loop$"):
        grouped_linear(rows, weight, counts)


@pytest.mark.parametrize(
    ("width_in", "width_out", "dtype"),
    [(6, 8, torch.float32), (8, 6, torch.float32), (12, 8, torch.bfloat16), (8, 4, torch.bfloat16)],
)
def test_unaligned_widths_are_refused_with_their_values(width_in: int, width_out: int, dtype: torch.dtype) -> None:
    rows, weight = torch.randn(3, width_in, dtype=dtype), torch.randn(2, width_out, width_in, dtype=dtype)
    message = f"widths of a multiple of 16 bytes, got ({width_out}, {width_in}) of {dtype}; use backend loop"
    with pytest.raises(ValueError, match=re.escape(message)):
        grouped_linear(rows, weight, torch.tensor([1, 2]))
    assert grouped_linear_loop(rows, weight, torch.tensor([1, 2])).shape == (3, width_out)


@counts_param
def test_what_is_left_of_experts_without_rows_becomes_zero(counts: list[int]) -> None:
    left = torch.full((4, OUT, IN), torch.nan, dtype=torch.bfloat16)
    filled = torch.tensor(counts) > 0
    left[filled] = 1.0
    zero_empty_groups(left, torch.tensor(counts).cumsum(0, dtype=torch.int32))
    assert torch.equal(left, filled[:, None, None].to(left.dtype).expand_as(left))
