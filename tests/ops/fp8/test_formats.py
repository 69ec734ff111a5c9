"""Formats, scales and tiles against the definition in float64, and against values worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops.fp8 import Format, Scaling, Tile, dequantize, quantize, quantize_columns
from moefoundry.ops.fp8.e5m6 import decode_e5m6, encode_e5m6, pack_e5m6, unpack_e5m6
from moefoundry.ops.fp8.scales import scale_values, scales_of
from tests.ops.fp8.samples import sample, sqnr

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values_of(format: Format) -> Tensor:
    """All that are finite and not negative, by code, in float64."""
    values = []
    for code in range(2 ** (format.bits - 1)):
        exponent, mantissa = divmod(code, 2**format.mantissa_bits)
        fraction = mantissa / 2**format.mantissa_bits
        normal = math.ldexp(1 + fraction, exponent - format.bias)
        values.append(normal if exponent else math.ldexp(fraction, 1 - format.bias))
    return torch.tensor([value for value in values if value <= format.largest], dtype=torch.float64)


def nearest(x: Tensor, format: Format) -> Tensor:
    """``x`` rounded to the format, ties to the even code."""
    grid, magnitude = values_of(format), x.double().abs()
    upper = torch.searchsorted(grid, magnitude).clamp(1, len(grid) - 1)
    above, below = grid[upper] - magnitude, magnitude - grid[upper - 1]
    code = torch.where((above < below) | ((above == below) & (upper % 2 == 0)), upper, upper - 1)
    return grid[code].copysign(x.double())


@pytest.mark.parametrize(("format", "finite", "largest"), [(Format.E4M3, 127, 448), (Format.E5M6, 1984, 65024)])
def test_the_formats_have_the_values_that_they_claim(format: Format, finite: int, largest: int) -> None:
    grid = values_of(format)
    assert (len(grid), grid[-1]) == (finite, largest)


@pytest.mark.parametrize("format", Format)
def test_rounds_to_nearest_even_over_the_whole_range(format: Format) -> None:
    grid = values_of(format).float()
    middle = (grid[1:] + grid[:-1]) / 2
    # every value, every tie and both its neighbours; what leads each tile makes its scale 1
    points = torch.cat([grid, middle, middle.nextafter(grid[1:]), middle.nextafter(grid[:-1])])
    points = torch.cat([points, -points])
    tiles = F.pad(F.pad(points, (0, -len(points) % 127)).view(-1, 127), (1, 0), value=format.largest)
    got = dequantize(quantize(tiles, Tile.ROW, format))
    torch.testing.assert_close(got.double(), nearest(tiles, format), rtol=0, atol=0)


def test_e5m6_codes_go_round() -> None:
    codes = torch.arange(len(values_of(Format.E5M6)), dtype=torch.int16)
    codes = torch.cat([codes, codes | 0x800])
    assert torch.equal(encode_e5m6(decode_e5m6(codes)), codes)
    expected = values_of(Format.E5M6)
    torch.testing.assert_close(decode_e5m6(codes).double(), torch.cat([expected, -expected]), rtol=0, atol=0)


def test_e5m6_saturates_and_keeps_nan() -> None:
    codes = encode_e5m6(torch.tensor([1e9, -math.inf, math.nan, 65280.0, 2.0**-20, 2.0**-22]))
    assert codes.tolist() == [0x7BF, 0xFBF, 0x7E0, 0x7BF, 1, 0]
    assert decode_e5m6(codes)[2].isnan()


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 9, 128])
def test_e5m6_packs_two_codes_in_three_bytes(columns: int) -> None:
    assert pack_e5m6(torch.tensor([0xABC, 0x123], dtype=torch.int16)).tolist() == [0xBC, 0x3A, 0x12] + 9 * [0]
    codes = torch.randint(4096, (3, columns), dtype=torch.int16)
    packed = pack_e5m6(codes)
    assert packed.shape[-1] == Format.E5M6.width(columns) == 12 * -(-columns // 8)
    assert torch.equal(unpack_e5m6(packed, columns), codes)


@pytest.mark.parametrize("format", Format)
def test_power_of_two_scales_are_the_smallest_that_do_not_overflow(format: Format) -> None:
    edges = torch.tensor([format.largest * 2.0**k for k in range(-150, 111)])
    amax = torch.cat([edges, edges.nextafter(torch.tensor(math.inf)), edges.nextafter(torch.tensor(0.0))])
    amax = torch.cat([amax, torch.tensor([0.0, 1e-45, 1e-38, 1.0, 3.4028235e38])])
    scales = scale_values(scales_of(amax, format, Scaling.POWER_OF_TWO)).double()
    assert (amax.double() <= format.largest * scales).all()
    assert ((amax.double() > format.largest * scales / 2) | (scales == 2.0**-126)).all()


def test_a_tile_by_hand() -> None:
    x = torch.zeros(1, 130)
    x[0, :3] = torch.tensor([896.0, -3.3, 0.004])  # 896 = 448 * 2: scale 2
    x[0, 128:] = torch.tensor([0.1, 450.0])  # 450 needs 2 as well
    quantized = quantize(x, Tile.ROW)
    assert quantized.scales.tolist() == [[128, 128]]
    # -1.65 -> -1.625; 0.002 is nearest to one step of 2^-9; 0.05 -> 0.05078125 = 13 * 2^-8; 225 -> 224
    assert dequantize(quantized)[0, [0, 1, 2, 128, 129]].tolist() == [896.0, -3.25, 2.0**-8, 0.1015625, 448.0]
    assert dequantize(quantized).count_nonzero() == 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 128), (5, 300), (2, 3, 77), (1, 1), (0, 128), (4, 0)], ids=str)
@pytest.mark.parametrize("scaling", Scaling)
def test_any_size_goes_round(shape: tuple[int, ...], scaling: Scaling, dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    *batch, rows, columns = shape
    for format, tile, scale_rows in [
        (Format.E4M3, Tile.ROW, rows),
        (Format.E5M6, Tile.ROW, rows),
        (Format.E4M3, Tile.BLOCK, -(-rows // 128)),
    ]:
        quantized = quantize(x, tile, format, scaling)
        assert (quantized.format, quantized.tile, quantized.shape, quantized.scaling) == (format, tile, shape, scaling)
        assert quantized.values.dtype == format.dtype
        assert quantized.scales.shape == (*batch, scale_rows, -(-columns // 128))
        scale_bytes = 1 if scaling is Scaling.POWER_OF_TWO else 4
        assert quantized.nbytes == math.prod((*batch, rows)) * format.width(columns) + (
            scale_bytes * quantized.scales.numel()
        )
        step = 2.0 ** -(format.mantissa_bits + 1)  # relative; absolute where a value is subnormal in its tile
        back = dequantize(quantized, torch.float32)
        torch.testing.assert_close(back, x.float(), rtol=step, atol=2.0**-8)


@pytest.mark.parametrize(
    ("format", "scaling", "gate"),
    [
        (Format.E5M6, Scaling.POWER_OF_TWO, 49.0),
        (Format.E4M3, Scaling.POWER_OF_TWO, 31.0),
        (Format.E4M3, Scaling.FP32, 31.5),
    ],
)
def test_round_trip_of_normal_data(format: Format, scaling: Scaling, gate: float) -> None:
    x = sample("normal", 512, 512)
    assert sqnr(dequantize(quantize(x, Tile.ROW, format, scaling)), x) >= gate


@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("format", Format)
def test_zero_and_tiny_tiles(format: Format, scaling: Scaling) -> None:
    x = torch.zeros(4, 128)
    x[1, 3], x[2, :2], x[3] = 1e-45, torch.tensor([-1e-40, 1e-38]), 1e-30
    quantized = quantize(x, Tile.ROW, format, scaling)
    scales = scale_values(quantized.scales).squeeze()
    assert scales[:2].tolist() == [2.0**-126] * 2
    back = dequantize(quantized)
    assert back[0].count_nonzero() == 0
    torch.testing.assert_close(back, x, rtol=2**-4, atol=2.0**-136)  # half of the smallest value of the smallest scale


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("format", Format)
def test_a_tile_that_is_not_finite_becomes_nan_and_no_other(format: Format, scaling: Scaling, bad: float) -> None:
    x = torch.randn(3, 300)
    x[1, 130] = bad
    quantized = quantize(x, Tile.ROW, format, scaling)
    expected = torch.zeros(3, 300, dtype=torch.bool)
    expected[1, 128:256] = True
    assert torch.equal(dequantize(quantized).isnan(), expected)
    if scaling is Scaling.POWER_OF_TWO:
        assert (quantized.scales == 255).nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("scaling", Scaling)
def test_nothing_overflows(scaling: Scaling) -> None:
    """From the smallest scale to the largest; torch up to 2.12 casts what exceeds 480 to NaN."""
    exponents = torch.linspace(-117, 127, 4096)
    x = torch.rand(4096, 128).add(0.5).clamp(max=0.999).mul(exponents.exp2()[:, None])
    x[0] = 3.2e38  # from 31/32 of 2^128 on, rounding to four bits gives Inf
    back = dequantize(quantize(x, Tile.ROW, Format.E4M3, scaling))
    torch.testing.assert_close(back, x, rtol=2**-4, atol=0)


def test_blocks_scale_each_matrix_by_itself_and_transposed() -> None:
    weight = torch.stack([sample("normal", 200, 300), 1000 * sample("normal", 200, 300)])
    quantized = quantize(weight, Tile.BLOCK)
    assert quantized.scales.shape == (2, 2, 3)
    assert torch.equal(quantize(weight[1], Tile.BLOCK).scales, quantized.scales[1])
    transposed = quantize(weight.mT.contiguous(), Tile.BLOCK)
    assert torch.equal(dequantize(quantized.mT), dequantize(transposed))
    assert quantized.mT.shape == (2, 300, 200)


def test_columns_begin_anew_with_each_group() -> None:
    sizes = torch.tensor([0, 3, 129, 0, 1])
    x = torch.randn(133, 5)
    quantized = quantize_columns(x, sizes)
    assert quantized.values.shape == (5, 128 * 6)  # (133 + 5 * 127) // 128 = 6 tiles, of which 4 are used
    assert quantized.scales.shape == (6, 5)
    torch.testing.assert_close(dequantize(quantized), x, rtol=2**-4, atol=2**-8)
    stored = quantized.values.float().view(5, 6, 128)
    assert stored.count_nonzero(dim=(0, 2)).tolist() == [15, 640, 5, 5, 0, 0]
    expected = scales_of(x[3:131].abs().amax(0), Format.E4M3, Scaling.POWER_OF_TWO)
    assert torch.equal(quantized.scales[1], expected)
    x[2, 4] = math.nan
    bad = dequantize(quantize_columns(x, sizes)).isnan()
    assert torch.equal(bad.nonzero(), torch.tensor([[row, 4] for row in range(3)]))


def test_one_group_is_the_same_as_none() -> None:
    x = torch.randn(300, 7)
    one, none = quantize_columns(x, torch.tensor([300])), quantize_columns(x)
    assert torch.equal(one.values.view(torch.uint8), none.values.view(torch.uint8))
    assert torch.equal(one.scales, none.scales)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.zeros(2, 2).double(), Tile.ROW), "float64"),
        (lambda: quantize(torch.zeros(2), Tile.ROW), r"shape \(2,\)"),
        (lambda: quantize(torch.zeros(2, 2), Tile.COLUMN), "quantize_columns"),
        (lambda: quantize(torch.zeros(2, 2), Tile.BLOCK, Format.E5M6), "E5M6 is quantized in ROW tiles, not BLOCK"),
        (lambda: quantize_columns(torch.zeros(2, 2, 2)), r"shape \(2, 2, 2\)"),
        (lambda: quantize(torch.zeros(2, 2), Tile.ROW).mT, "only BLOCK tiles"),
    ],
)
def test_what_cannot_be_quantized_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
