"""Each kernel against its reference on one device; for a GPU, and for a process in which Triton interprets.

The interpreter knows no subnormal BF16, and cuts where a GPU rounds: what needs neither is compared there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moefoundry.ops.fp8 import (
    Backend,
    Format,
    QuantizedTensor,
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
from moefoundry.ops.fp8.quantization import quantize_transposed
from moefoundry.ops.fp8.swiglu import swiglu_backward_in_tiles, swiglu_forward
from tests.ops.fp8.samples import sample

BACKENDS = (Backend.TRITON, Backend.REFERENCE)
SHAPES = ((5, 300), (2, 3, 77), (1, 128), (0, 5))
FP32_SUMS = 2e-6  # of the largest: K is summed in another order


def check_rows(device: str, format: Format, scaling: Scaling) -> None:
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = extremes(shape, smallest=1e-38 if dtype == torch.float32 else 1e-20).to(dtype).to(device)
            expected = both(lambda backend, x=x: quantize(x, Tile.ROW, format, scaling, backend))
            check_dequantize(expected, device)


def check_blocks(device: str, scaling: Scaling) -> None:
    for shape in SHAPES:
        x = extremes(shape).to(device)
        check_dequantize(both(lambda backend, x=x: quantize(x, Tile.BLOCK, Format.E4M3, scaling, backend)), device)
        both(lambda backend, x=x: quantize_transposed(x, scaling, backend))


def check_dequantize(x: QuantizedTensor, device: str) -> None:
    exact_in_bf16 = x.scaling is Scaling.POWER_OF_TWO
    for dtype in (torch.float32, torch.bfloat16) if exact_in_bf16 or device == "cuda" else (torch.float32,):
        got, expected = (dequantize(x, dtype, backend) for backend in (Backend.TRITON, Backend.REFERENCE))
        if dtype == torch.bfloat16 and device == "cpu":
            subnormal = expected.abs() < torch.finfo(dtype).tiny
            got, expected = got.masked_fill(subnormal, 0), expected.masked_fill(subnormal, 0)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def check_columns(device: str, scaling: Scaling, retiled: Format | None) -> None:
    """Quantized from numbers, or from rows in the format ``retiled``."""
    for sizes in (None, [0, 1, 200, 0]):
        rows = 40 if sizes is None else sum(sizes)
        sizes_E = None if sizes is None else torch.tensor(sizes, device=device)
        for columns in (1, 136):
            x = extremes((rows, columns)).to(device)
            if retiled is None:
                both(lambda backend, x=x, sizes_E=sizes_E: quantize_columns(x, sizes_E, scaling, backend))
            else:
                kept = quantize(x, Tile.ROW, retiled, scaling)
                both(lambda backend, kept=kept, sizes_E=sizes_E: retile(kept, sizes_E, scaling, backend))


def ways_to_multiply() -> list[Any]:
    """A configuration of each way to take steps of K: in pairs, and one by one."""
    from moefoundry.ops.fp8.triton_gemm import CONFIGS

    return list({config.kwargs["PAIRS"]: config for config in CONFIGS}.values())


def check_products(device: str, scaling: Scaling, sizes: list[int] | None, inner: int, columns: int) -> None:
    """fp32 and BF16 results; the latter only where they are rounded as PyTorch does."""
    rows = 70 if sizes is None else sum(sizes)
    sizes_E = None if sizes is None else torch.tensor(sizes, device=device)
    weight = sample("normal", *(() if sizes is None else (len(sizes),)), columns, inner).to(device)
    x, grad = sample("student_t", rows, inner).to(device), sample("outliers", rows, columns).to(device)
    x_fp8, grad_fp8 = quantize(x, Tile.ROW, scaling=scaling), quantize(grad, Tile.ROW, scaling=scaling)
    weight_fp8 = quantize(weight, Tile.BLOCK, scaling=scaling)
    x_columns, grad_columns = retile(x_fp8, sizes_E, scaling), quantize_columns(grad, sizes_E, scaling)
    products: list[Callable[[torch.dtype, Backend], Tensor]] = [
        lambda dtype, backend: fprop(x_fp8, weight_fp8, sizes_E, dtype, backend),
        lambda dtype, backend: dgrad(grad_fp8, weight_fp8, sizes_E, dtype, backend),
        lambda dtype, backend: wgrad(grad_columns, x_columns, dtype, backend),
    ]
    for product, config in itertools.product(products, ways_to_multiply()):
        expected = product(torch.float32, Backend.REFERENCE)
        # on a GPU the tensor cores' accumulator is short within 128 of K: their error, not the kernel's
        tolerance = (2.0**-11 if device == "cuda" else FP32_SUMS) * max(expected.abs().flatten().tolist(), default=0)
        with mock.patch("moefoundry.ops.fp8.triton_gemm._multiply.configs", [config]):
            torch.testing.assert_close(product(torch.float32, Backend.TRITON), expected, rtol=0, atol=tolerance)
            if device == "cuda":
                got = product(torch.bfloat16, Backend.TRITON)
                torch.testing.assert_close(got.float(), expected, rtol=2**-8, atol=tolerance)
    if sizes is not None and 0 in sizes:
        assert wgrad(grad_columns, x_columns, backend=Backend.TRITON)[sizes.index(0)].count_nonzero() == 0


def check_swiglu(device: str, weighted: bool, sizes: list[int] | None, columns: int, dtype: torch.dtype) -> None:
    """The interpreter rounds to float16 as a GPU does, but not to BF16, which takes its place on a GPU."""
    dtype = torch.bfloat16 if (device, dtype) == ("cuda", torch.float16) else dtype
    rows = 70 if sizes is None else sum(sizes)
    sizes_E = None if sizes is None else torch.tensor(sizes, device=device)
    row_weights = torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(device) if weighted else None
    gate, up, grad = (sample(kind, rows, columns).to(dtype).to(device) for kind in ("normal", "student_t", "outliers"))
    got, expected = (swiglu_forward(gate, up, row_weights, backend=backend) for backend in BACKENDS)
    near([got.hidden], [expected.hidden])
    for one, other in zip(got.kept, expected.kept, strict=True):
        assert torch.equal(one.values.view(torch.uint8), other.values.view(torch.uint8))
        assert torch.equal(one.scales, other.scales)
    alone = swiglu_forward(gate, up, row_weights, keep=False, backend=Backend.TRITON)
    assert alone.kept == ()
    assert torch.equal(dequantize(alone.hidden), dequantize(got.hidden))
    back, defined = (
        swiglu_backward_in_tiles(grad, expected.kept, row_weights, sizes_E, backend=backend) for backend in BACKENDS
    )
    near([back.hidden, *back.rows, *back.columns], [defined.hidden, *defined.rows, *defined.columns])
    if weighted:
        error = 2e-6 if dtype == torch.float32 else 2e-3
        torch.testing.assert_close(back.row_weights, defined.row_weights, rtol=error, atol=error * columns**0.5)
    else:
        assert back.row_weights is defined.row_weights is None


def near(got: list[QuantizedTensor], expected: list[QuantizedTensor]) -> None:
    """Compare tensors that differ by the last bit of an exponential: few roundings go the other way, by one step."""
    for one, other in zip(got, expected, strict=True):
        assert (one.tile, one.shape, one.format) == (other.tile, other.shape, other.format)
        assert torch.equal(one.scales, other.scales)
        codes, defined = (x.values.view(torch.uint8).int() for x in (one, other))
        assert codes.shape == defined.shape
        steps = (codes - defined).abs()[(codes | defined) & 0x7F > 0]  # a sign of zero is no step
        assert steps.le(1).all()
        assert steps.count_nonzero() <= 0.01 * max(steps.numel(), 100)


def check_tiles_that_are_not_finite(device: str) -> None:
    x = torch.randn(140, 136)
    for place, bad in (((3, 5), torch.nan), ((70, 130), torch.inf), ((130, 0), -torch.nan)):
        x[place] = bad
    x = x.to(device)
    for scaling in Scaling:
        for format in Format:
            kept = both(lambda backend, f=format, s=scaling: quantize(x, Tile.ROW, f, s, backend))
            check_dequantize(kept, device)
            both(lambda backend, kept=kept, s=scaling: retile(kept, None, s, backend))
        both(lambda backend, s=scaling: quantize_columns(x, None, s, backend))
        weight = both(lambda backend, s=scaling: quantize(x.T, Tile.BLOCK, Format.E4M3, s, backend))
        rows = quantize(x, Tile.ROW, scaling=scaling)
        pair = Backend.REFERENCE, Backend.TRITON
        got, expected = (dgrad(rows, weight.mT.mT, None, torch.float32, backend).isnan() for backend in pair)
        assert torch.equal(got, expected)


def extremes(shape: tuple[int, ...], smallest: float = 1e-38) -> Tensor:
    """Normal numbers over many orders of magnitude, so that tiles have subnormal values; zeros; a row that is tiny."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, orders = (torch.randn(shape, generator=generator) for _ in range(2))
    x *= (3 * orders).exp()
    x[..., ::11] = 0
    if x.numel():
        x.view(-1)[-1] = 1e-3 * smallest
        x[(0,) * (x.dim() - 1)] *= smallest
    return x


def both(quantizer: Callable[[Backend], QuantizedTensor]) -> QuantizedTensor:
    """What the reference gives, once the kernel has given the same bits."""
    got, expected = quantizer(Backend.TRITON), quantizer(Backend.REFERENCE)
    assert (got.tile, got.shape, got.format) == (expected.tile, expected.shape, expected.format)
    for one, other in ((got.values, expected.values), (got.scales, expected.scales)):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        one, other = (tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor for tensor in (one, other))
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    return expected
