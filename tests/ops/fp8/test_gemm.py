"""The three products against fp32 on operands that were never rounded, and the accumulator of tensor cores.

DeepGEMM's gate, ``1 - 2<x, y> / (|x|^2 + |y|^2) < 1e-3``, is half of the noise over the signal: 27 dB.
"""

import pytest
import torch
from torch import Tensor

from moefoundry.ops.fp8 import (
    Format,
    Scaling,
    Tile,
    dequantize,
    dgrad,
    fprop,
    quantize,
    quantize_columns,
    retile,
    wgrad,
)
from moefoundry.ops.fp8.gemm_reference import multiply_reference, wgrad_reference
from moefoundry.ops.fp8.tensor_cores import TensorCores
from tests.ops.fp8.samples import GROUP_SIZES, KINDS, sample, sqnr

GATE = 27.0
IN, OUT = 384, 200  # not a multiple of 128, so that Dgrad has a short last step


def exact(x: Tensor, weight: Tensor, grad: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, dX and dW of groups in fp32."""
    groups = list(zip(x.split(sizes), weight, grad.split(sizes), strict=True))
    out, grad_x = torch.cat([x @ w.T for x, w, _ in groups]), torch.cat([grad @ w for _, w, grad in groups])
    return out, grad_x, torch.stack([grad.T @ x for x, _, grad in groups])


def fp8(x: Tensor, weight: Tensor, grad: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same as training does it: Wgrad's X is what Fprop kept."""
    kept, weight_fp8 = quantize(x, Tile.ROW), quantize(weight, Tile.BLOCK)
    out = fprop(kept, weight_fp8, sizes, torch.float32)
    grad_x = dgrad(quantize(grad, Tile.ROW), weight_fp8, sizes, torch.float32)
    return out, grad_x, wgrad(quantize_columns(grad, sizes), retile(kept, sizes))


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_products_pass_the_gate(kind: str) -> None:
    sizes, rows = torch.tensor(GROUP_SIZES), sum(GROUP_SIZES)
    tensors = sample(kind, rows, IN), sample(kind, len(sizes), OUT, IN), sample(kind, rows, OUT)
    got = fp8(*tensors, sizes)
    for pair in zip(got, exact(*tensors, list(GROUP_SIZES)), strict=True):
        assert sqnr(*pair) >= GATE
    assert got[2][0].count_nonzero() == 0, "a group without rows has a gradient of exactly zero"


@pytest.mark.parametrize("kind", KINDS)
def test_dense_products_pass_the_gate_and_are_those_of_one_group(kind: str) -> None:
    x, weight, grad = sample(kind, 500, IN), sample(kind, OUT, IN), sample(kind, 500, OUT)
    got = fp8(x, weight, grad, None)
    expected = x @ weight.T, grad @ weight, grad.T @ x
    for pair in zip(got, expected, strict=True):
        assert sqnr(*pair) >= GATE
    out, grad_x, grad_weight = fp8(x, weight[None], grad, torch.tensor([500]))
    for one, none in zip((out, grad_x, grad_weight[0]), got, strict=True):
        assert torch.equal(one, none)


def test_no_rows_at_all() -> None:
    sizes = torch.zeros(3, dtype=torch.int64)
    out, grad_x, grad_weight = fp8(torch.empty(0, IN), torch.randn(3, OUT, IN), torch.empty(0, OUT), sizes)
    assert (out.shape, grad_x.shape) == ((0, OUT), (0, IN))
    assert grad_weight.shape == (3, OUT, IN)
    assert grad_weight.count_nonzero() == 0


@pytest.mark.parametrize("format", Format)
def test_retiling_costs_next_to_nothing_with_power_of_two_scales(format: Format) -> None:
    x, grad = sample("normal", 1024, 256), sample("normal", 1024, 128)
    exact = grad.T @ x
    columns = quantize_columns(grad)
    direct = sqnr(wgrad(columns, quantize_columns(x)), exact)
    retiled = sqnr(wgrad(columns, retile(quantize(x, Tile.ROW, format))), exact)
    assert retiled >= 28
    assert retiled > direct - 0.15
    if format is Format.E4M3:  # why what is kept has power-of-two scales
        fp32 = retile(quantize(x, Tile.ROW, format, Scaling.FP32), scaling=Scaling.FP32)
        assert sqnr(wgrad(quantize_columns(grad, scaling=Scaling.FP32), fp32), exact) < retiled - 1


def test_products_are_those_of_the_dequantized_operands() -> None:
    x, weight = quantize(sample("normal", 60, 300), Tile.ROW), quantize(sample("normal", 200, 300), Tile.BLOCK)
    expected = dequantize(x).double() @ dequantize(weight).double().T
    got = fprop(x, weight, dtype=torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)  # fp32 sums of 300 products
    assert torch.equal(fprop(x, weight), got.bfloat16())


def test_an_expert_that_is_not_finite_spoils_no_other() -> None:
    sizes = torch.tensor([5, 6, 7])
    x, weight, grad = torch.randn(18, IN), torch.randn(3, OUT, IN), torch.randn(18, OUT)
    x[6, 3] = torch.inf
    out, _, grad_weight = fp8(x, weight, grad, sizes)
    assert out.isnan().any(1).nonzero().flatten().tolist() == [6]
    assert grad_weight.isnan().any(2).any(1).tolist() == [False, True, False]


def test_promotion_saves_long_sums() -> None:
    """Same-sign data: every cut goes the same way. Without promotion the error grows with K."""
    x, weight = (quantize(sample("normal", 48, 8192).abs(), tile) for tile in (Tile.ROW, Tile.BLOCK))
    exact = multiply_reference(x, weight, None, torch.float32)

    def error(promote_every: int) -> float:
        got = multiply_reference(x, weight, None, torch.float32, TensorCores(promote_every=promote_every))
        return float(((got - exact) / exact).abs().max())

    tolerance = 1e-3
    assert error(128) < tolerance / 4
    assert error(8192) > 4 * tolerance
    assert error(128) < error(512) < error(2048) < error(8192)


def test_promotion_saves_wgrad_over_many_tokens() -> None:
    grad, x = (quantize_columns(sample("normal", 8192, width).abs()) for width in (40, 24))
    exact = wgrad_reference(grad, x, torch.float32)
    for promote_every, passes in ((128, True), (8192, False)):
        got = wgrad_reference(grad, x, torch.float32, TensorCores(promote_every=promote_every))
        assert (float(((got - exact) / exact).abs().max()) < 1e-3) == passes


def test_the_accumulator_by_hand() -> None:
    """With 3 bits, the last worth 1: 4 + 1.5 is 5, and 5 + 0.75 stays 5. Promoted each time, all is kept."""
    a = torch.zeros(1, 96)
    a[0, [0, 32, 64]] = torch.tensor([4.0, 1.5, 0.75])
    ones = torch.ones(1, 96)
    assert TensorCores(bits=3, promote_every=96).multiply(a, ones).item() == 5.0
    assert TensorCores(bits=3, promote_every=32).multiply(a, ones).item() == 6.25
    assert TensorCores(bits=3, promote_every=96).multiply(-a, ones).item() == -5.0
    with pytest.raises(ValueError, match="multiple of 32, got 100"):
        TensorCores(promote_every=100)


ROW, BLOCK = quantize(torch.zeros(4, 8), Tile.ROW), quantize(torch.zeros(6, 8), Tile.BLOCK)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fprop(BLOCK, BLOCK), "expected E4M3 in ROW tiles"),
        (lambda: fprop(ROW, ROW), "expected E4M3 in BLOCK tiles"),
        (lambda: fprop(quantize(torch.zeros(4, 8), Tile.ROW, Format.E5M6), BLOCK), "got E5M6"),
        (lambda: fprop(ROW, BLOCK, torch.tensor([2, 2])), r"do not fit with groups \(2,\)"),
        (lambda: dgrad(ROW, BLOCK), r"x \(4, 8\) and weight \(8, 6\) do not fit"),
        (lambda: wgrad(ROW, ROW), "expected E4M3 in COLUMN tiles"),
        (
            lambda: wgrad(quantize_columns(torch.zeros(4, 8)), quantize_columns(torch.zeros(5, 8))),
            "differ in their rows",
        ),
        (lambda: retile(BLOCK), "BLOCK tiles"),
    ],
)
def test_operands_that_do_not_fit_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
