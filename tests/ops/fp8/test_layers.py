"""FP8 layers with autograd: the products they are made of, what they keep for backward, how near they are to fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer
from moefoundry.ops.fp8 import (
    Format,
    Granularity,
    QuantizedTensor,
    Tile,
    coarse_linear,
    dequantize,
    dgrad,
    fp8_feed_forward,
    fp8_linear,
    fprop,
    quantize,
    quantize_columns,
    quantize_rows_once,
    retile,
    wgrad,
)
from moefoundry.ops.grouped_linear import grouped_linear_loop
from moefoundry.ops.swiglu import Activation, swiglu_reference
from tests.ops.fp8.samples import KINDS, sample, sqnr

SIZES = torch.tensor([130, 0, 70])
ROWS, WIDTH, HIDDEN = 200, 384, 160  # HIDDEN is no multiple of a tile
TWO_PRODUCTS = 20.0  # dB that are left where the noise of several products adds up, each of about 28


def leaf(kind: str, *shape: int, scale: float = 1.0) -> Tensor:
    return (sample(kind, *shape) * scale).requires_grad_()


class Kept:
    """What autograd keeps while this is entered, each storage once, and without ``parameters``."""

    def __init__(self, *parameters: Tensor) -> None:
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.storages: dict[int, tuple[int, torch.dtype]] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes(), tensor.dtype
        return tensor

    def __enter__(self) -> Kept:
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self.hooks.__exit__(*args)

    @property
    def nbytes(self) -> int:
        return sum(nbytes for nbytes, _ in self.storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", list(Format))
def test_linear_is_the_three_products_of_what_it_quantizes(kept: Format, dtype: torch.dtype) -> None:
    x, weight, grad = (
        sample("normal", *shape).to(dtype) for shape in ((2, 100, WIDTH), (HIDDEN, WIDTH), (2, 100, HIDDEN))
    )
    x.requires_grad_()
    weight.requires_grad_()
    out = fp8_linear(x, weight, kept)
    grad_x, grad_weight = torch.autograd.grad(out, (x, weight), grad)
    rows, grad_rows, blocks = x.detach().flatten(0, 1), grad.flatten(0, 1), quantize(weight.detach(), Tile.BLOCK)
    assert torch.equal(out.flatten(0, 1), fprop(quantize(rows, Tile.ROW), blocks, dtype=dtype))
    assert torch.equal(grad_x.flatten(0, 1), dgrad(quantize(grad_rows, Tile.ROW), blocks, dtype=dtype))
    columns = retile(quantize(rows, Tile.ROW, kept))
    assert torch.equal(grad_weight, wgrad(quantize_columns(grad_rows), columns, dtype))
    assert out.dtype == grad_x.dtype == grad_weight.dtype == dtype


@pytest.mark.parametrize(("kept", "bytes_a_value"), [(Format.E4M3, 129 / 128), (Format.E5M6, 193 / 128)])
def test_linear_keeps_its_input_in_small_floats_and_nothing_else(kept: Format, bytes_a_value: float) -> None:
    x, weight = leaf("normal", ROWS, WIDTH), leaf("normal", HIDDEN, WIDTH)
    with Kept(weight) as saved:
        fp8_linear(x, weight, kept)
    assert saved.nbytes == x.numel() * bytes_a_value
    with Kept(weight) as saved:
        fp8_linear(x, weight.detach())
    assert saved.nbytes == 0, "without a gradient of the weight the input is not needed"


def test_layers_with_the_same_input_keep_it_once() -> None:
    x, weights = leaf("normal", ROWS, WIDTH), [leaf("normal", HIDDEN, WIDTH) for _ in range(3)]
    with Kept(*weights) as saved:
        outs = [fp8_linear(x, weight) for weight in weights]
    assert saved.nbytes == x.numel() * 129 / 128
    assert outs[0].shape == (ROWS, HIDDEN)


def test_rows_are_quantized_anew_after_a_change_in_place() -> None:
    x = sample("normal", 4, WIDTH)
    first = quantize_rows_once(x)
    assert quantize_rows_once(x) is first
    x.mul_(4)
    assert torch.equal(dequantize(quantize_rows_once(x)), 4 * dequantize(first))


def test_rows_are_found_on_views_of_the_same_rows_only() -> None:
    x = sample("normal", WIDTH, WIDTH)
    rows = quantize_rows_once(x)
    assert quantize_rows_once(x.view_as(x)) is rows
    assert quantize_rows_once(x.view(2, -1, WIDTH)) is rows
    for other in (x.mT, x[1:], x.view(-1, WIDTH // 2)):
        expected = quantize(other.reshape(-1, other.shape[-1]), Tile.ROW)
        assert torch.equal(dequantize(quantize_rows_once(other)), dequantize(expected))


def test_inference_mode_gives_the_same_bits() -> None:
    x, weight = sample("normal", 4, WIDTH), sample("normal", HIDDEN, WIDTH)
    with torch.inference_mode():
        assert torch.equal(fp8_linear(x.clone(), weight), fp8_linear(x, weight))


@pytest.mark.parametrize("linear", [fp8_linear, lambda x, weight: coarse_linear(x, weight, Granularity.ROW)])
def test_a_batch_without_rows_has_a_gradient_of_zero(linear: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, weight = leaf("normal", 0, WIDTH), leaf("normal", HIDDEN, WIDTH)
    out = linear(x, weight)
    assert out.shape == (0, HIDDEN)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any()


def test_without_gradients_nothing_is_quantized_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    formats: list[Format] = []

    def counting(x: Tensor, tile: Tile, format: Format = Format.E4M3, **options: Any) -> QuantizedTensor:
        formats.append(format)
        return quantize(x, tile, format, **options)

    for layer in ("linear", "swiglu", "weights"):
        monkeypatch.setattr(f"moefoundry.ops.fp8.{layer}.quantize", counting)
    x, weights = leaf("normal", ROWS, WIDTH), expert_weights()
    with torch.no_grad():
        fp8_linear(x, weights[0][0], Format.E5M6)
        fp8_feed_forward(x, *weights, SIZES)
    assert formats == [Format.E4M3] * (1 + 4), "the weights, and SwiGLU's product"


def reference_feed_forward(
    x: Tensor, weights: list[Tensor], row_weights: Tensor, hidden: HiddenLayer = PLAIN_LAYER
) -> Tensor:
    """In fp32, every expert's output weighted at the end."""
    gate, up = (grouped_linear_loop(x, weight, SIZES) for weight in weights[:2])
    if hidden.gate_bias_EF is not None:
        gate, up = (out + bias.repeat_interleave(SIZES, 0) for out, bias in zip((gate, up), hidden[1:], strict=True))
    out = grouped_linear_loop(swiglu_reference(gate, up, None, hidden.activation), weights[2], SIZES)
    return out * row_weights.unsqueeze(1)


def expert_weights() -> list[Tensor]:
    shapes = [(len(SIZES), HIDDEN, WIDTH)] * 2 + [(len(SIZES), WIDTH, HIDDEN)]
    return [leaf("normal", *shape, scale=0.05) for shape in shapes]


@pytest.mark.parametrize("kind", KINDS)
def test_feed_forward_and_all_its_gradients_are_near_fp32(kind: str) -> None:
    x, weights, row_weights = leaf(kind, ROWS, WIDTH), expert_weights(), torch.rand(ROWS).requires_grad_()
    grad, inputs = sample("normal", ROWS, WIDTH), [x, row_weights, *weights]
    out = fp8_feed_forward(x, *weights, SIZES, row_weights)
    expected = reference_feed_forward(x, weights, row_weights)
    pairs = zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    for got, exact in [(out.detach(), expected.detach()), *pairs]:
        assert got.shape == exact.shape
        assert sqnr(got, exact) >= TWO_PRODUCTS


def test_biases_and_a_clamped_activation_are_near_fp32() -> None:
    x, weights, row_weights = leaf("normal", ROWS, WIDTH), expert_weights(), torch.rand(ROWS).requires_grad_()
    biases = [leaf("normal", len(SIZES), HIDDEN, scale=0.5) for _ in range(2)]
    hidden = HiddenLayer(Activation(alpha=1.702, limit=3.0, offset=1.0), *biases)
    grad, inputs = sample("normal", ROWS, WIDTH), [x, row_weights, *weights, *biases]
    out = fp8_feed_forward(x, *weights, SIZES, row_weights, hidden)
    expected = reference_feed_forward(x, weights, row_weights, hidden)
    pairs = zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    for got, exact in [(out.detach(), expected.detach()), *pairs]:
        assert got.shape == exact.shape
        assert sqnr(got, exact) >= TWO_PRODUCTS - 7  # a gate that rounds across the limit loses its whole gradient


def test_feed_forward_without_groups_is_that_of_one_group() -> None:
    x, weights = (
        leaf("normal", 2, 50, WIDTH),
        [leaf("normal", *shape) for shape in ((HIDDEN, WIDTH),) * 2 + ((WIDTH, HIDDEN),)],
    )
    grad = sample("normal", 2, 50, WIDTH)
    dense = fp8_feed_forward(x, *weights)
    one = fp8_feed_forward(x.flatten(0, 1), *(weight.unsqueeze(0) for weight in weights), torch.tensor([100]))
    assert torch.equal(dense.flatten(0, 1), one)
    of_dense = torch.autograd.grad(dense, [x, *weights], grad)
    of_one = torch.autograd.grad(one, [x, *weights], grad.flatten(0, 1))
    assert all(torch.equal(*pair) for pair in zip(of_dense, of_one, strict=True))


def test_an_expert_without_rows_gets_a_gradient_of_exactly_zero() -> None:
    weights = expert_weights()
    fp8_feed_forward(leaf("normal", ROWS, WIDTH), *weights, SIZES).sum().backward()
    for weight in weights:
        assert [bool(grad.any()) for grad in weight.grad] == [True, False, True]


def test_feed_forward_keeps_its_input_and_those_of_swiglu_in_fp8() -> None:
    width, hidden = 7 * 128, 2 * 128  # D : F of DeepSeek-V3
    x, row_weights = leaf("normal", ROWS, width), torch.rand(ROWS).requires_grad_()
    weights = [leaf("normal", 3, *shape) for shape in ((hidden, width), (hidden, width), (width, hidden))]
    with Kept(*weights, row_weights, SIZES) as saved:
        fp8_feed_forward(x, *weights, SIZES, row_weights)
    values = ROWS * (width + 2 * hidden)
    assert saved.nbytes == values * 129 / 128
    assert {dtype for _, dtype in saved.storages.values()} == {torch.float8_e4m3fn, torch.uint8}
    with Kept(*weights) as saved, torch.no_grad():
        fp8_feed_forward(x, *weights, SIZES, row_weights)
    assert saved.nbytes == 0


@pytest.mark.parametrize("granularity", list(Granularity))
def test_coarse_products_are_torchs_scaled_products(granularity: Granularity) -> None:
    if granularity is not Granularity.TENSOR and torch.__version__ < "2.12":
        pytest.skip(f"torch {torch.__version__} has no product with a scale a row for CPUs")
    x, weight, grad = leaf("normal", 48, 64), leaf("normal", 32, 64), sample("normal", 48, 32)
    out = coarse_linear(x, weight, granularity)
    got = [out, *torch.autograd.grad(out, (x, weight), grad)]
    operands = [(x, weight), (grad, weight.mT), (grad.mT, x.mT)]
    for result, pair in zip(got, operands, strict=True):
        torch.testing.assert_close(result, scaled_product(*pair, granularity), rtol=1e-6, atol=1e-5)


def scaled_product(a_MK: Tensor, b_NK: Tensor, granularity: Granularity) -> Tensor:
    """``a @ b.T`` by torch's own FP8 product."""
    dims = (0, 1) if granularity is Granularity.TENSOR else (1,)
    operands, scales = [], []
    for x in (a_MK.detach(), b_NK.detach()):
        scale = x.abs().amax(dims, keepdim=True) / 448
        operands.append((x / scale).contiguous().to(torch.float8_e4m3fn))
        scales.append(scale.reshape(()) if granularity is Granularity.TENSOR else scale)
    return torch._scaled_mm(operands[0], operands[1].T, scales[0], scales[1].t(), out_dtype=torch.float32)


@pytest.mark.parametrize("granularity", list(Granularity))
def test_coarse_groups_have_weights_of_their_own(granularity: Granularity) -> None:
    x, grad = leaf("outliers", ROWS, WIDTH), sample("normal", ROWS, HIDDEN)
    weight = leaf("normal", len(SIZES), HIDDEN, WIDTH)
    out, expected = coarse_linear(x, weight, granularity, SIZES), grouped_linear_loop(x, weight, SIZES)
    pairs = zip(
        [out, *torch.autograd.grad(out, (x, weight), grad)],
        [expected, *torch.autograd.grad(expected, (x, weight), grad)],
        strict=True,
    )
    for got, exact in pairs:
        assert sqnr(got.detach(), exact.detach()) >= 24
    assert not torch.autograd.grad(coarse_linear(x, weight, granularity, SIZES).sum(), weight)[0][1].any()
