"""Device functions that the Triton kernels share: scales, rounding, and the rows of a tile.

From compute capability 8.9 on, the hardware converts to and from E4M3 as ``formats.py`` says: to nearest, ties to even,
saturating; NaN is 0x7F. Elsewhere, for E5M6, and in Triton's interpreter, whose own cast rounds otherwise, values are
rounded by their bits, in about ten integer operations. Both give the bits of the reference. ``FORMAT`` is a member of
``Format``.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# a kernel's arguments have types of Triton's own, those of its launch

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq
from triton.runtime.jit import constexpr_function

from moefoundry.ops import sizes
from moefoundry.ops.fp8 import formats, scales

TILE = tl.constexpr(sizes.TILE)
PACKED = tl.constexpr(formats.PACKED)
SMALLEST_SCALE = tl.constexpr(scales.SMALLEST_SCALE)
INF_BITS = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SIGN = tl.constexpr(-0x80000000)


@constexpr_function
def converts(format: formats.Format) -> bool:
    """Tell if the GPU that a kernel is compiled for converts ``format``."""
    interpreted = triton.knobs.runtime.interpret
    return bool(format is formats.Format.E4M3 and not interpreted and cuda_capability_geq(8, 9))


@triton.jit
def magnitude(x):
    """Bits of |x|; as integers they are ordered as the numbers are, with Inf and NaN above all (tl.max drops NaN)."""
    return x.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def power_of_two_codes(amax_bits, FORMAT: tl.constexpr):
    """Compute E8M0 codes, int32, from the bits of absolute maxima, as ``scales.scales_of``."""
    exponent = (amax_bits >> 23) - FORMAT.exponent
    codes = exponent + tl.where((amax_bits & 0x7FFFFF) > FORMAT.float_mantissa, 1, 0)
    return tl.where(amax_bits >= INF_BITS, 255, tl.maximum(codes, 1))


@triton.jit
def power_of_two(codes):
    """Compute 2^(codes - 127) in float32; codes in 1..254."""
    return (codes << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_scales(pointers, mask):
    """Load stored scales, exponents or float32, as float32."""
    scales = tl.load(pointers, mask=mask, other=0)
    if pointers.dtype.element_ty == tl.uint8:
        codes = scales.to(tl.int32)
        scales = tl.where(codes == 255, float("nan"), power_of_two(codes))
    return scales


@triton.jit
def quantize(x, amax_bits, FORMAT: tl.constexpr, FP32_SCALES: tl.constexpr):
    """Compute codes of ``x``, uint8 or (E5M6) int32, and stored scales; ``amax_bits`` broadcasts against ``x``."""
    bad = amax_bits >= INF_BITS
    if FP32_SCALES:
        amax = tl.maximum(amax_bits.to(tl.float32, bitcast=True), SMALLEST_SCALE * FORMAT.largest)
        scales = tl.where(bad, float("nan"), tl.div_rn(amax, FORMAT.largest))
        scaled = tl.div_rn(x, scales)
    else:
        scales = power_of_two_codes(amax_bits, FORMAT)
        scaled = x * tl.where(bad, float("nan"), power_of_two(254 - scales))
    if converts(FORMAT):
        codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # NaN, if the scale is
    else:
        codes = tl.where(bad, FORMAT.nan_code, encode(scaled, FORMAT))
        if FORMAT.mantissa_bits == 3:
            codes = codes.to(tl.uint8)
    return codes, scales


@triton.jit
def encode(x, FORMAT: tl.constexpr):
    """Round float32 to codes (int32), to nearest, ties to even; saturates. NaN gives no NaN."""
    SHIFT: tl.constexpr = 23 - FORMAT.mantissa_bits
    LARGEST: tl.constexpr = (FORMAT.exponent + 127) << 23 | FORMAT.float_mantissa
    MAGIC: tl.constexpr = 127 + 23 + 1 - FORMAT.bias - FORMAT.mantissa_bits
    bits = tl.minimum(magnitude(x), LARGEST)
    normal = (bits + (1 << (SHIFT - 1)) - 1 + ((bits >> SHIFT) & 1)) >> SHIFT
    normal -= (127 - FORMAT.bias) << FORMAT.mantissa_bits
    # the sum with 2^23 times the smallest subnormal has multiples of that, rounded, in its last bits
    sum = bits.to(tl.float32, bitcast=True) + power_of_two(tl.full(x.shape, MAGIC, tl.int32))
    subnormal = sum.to(tl.int32, bitcast=True) - (MAGIC << 23)
    codes = tl.where(bits < ((128 - FORMAT.bias) << 23), subnormal, normal)
    return codes | tl.where(x.to(tl.int32, bitcast=True) < 0, FORMAT.sign_code, 0)


@triton.jit
def decode(codes, FORMAT: tl.constexpr):
    """Decode codes, uint8 or (E5M6) int32, to float32."""
    if converts(FORMAT):
        x = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        codes = codes.to(tl.int32)
        bits = codes & (FORMAT.sign_code - 1)
        x = (bits << (23 - FORMAT.mantissa_bits)).to(tl.float32, bitcast=True) * 2.0 ** (127 - FORMAT.bias)
        x = tl.where(bits >= FORMAT.nan_code, float("nan"), x)
        sign = tl.where(codes >= FORMAT.sign_code, SIGN, 0)  # by its bit: a negated 0 is +0 in Triton 3.6
        x = (x.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return x


@triton.jit
def load_codes(values, row, row_inside, width, first, columns, SIZE: tl.constexpr, FORMAT: tl.constexpr):
    """Load codes, uint8 or (E5M6) int32, [rows, SIZE] of the columns from ``first`` on; zero outside.

    Args:
        values: Pointer to E4M3 codes as uint8, or to packed E5M6 as int32.
        row: Indices of the rows, [rows, 1].
        row_inside: Mask of the rows that exist, [rows, 1].
        width: Elements in a row of ``values``.
        first: First column, a multiple of 8.
        columns: Columns of the whole tensor.
        SIZE: Number of columns to load.
        FORMAT: Format of the codes.
    """
    if FORMAT.mantissa_bits == 3:
        column = first + tl.arange(0, SIZE)[None, :]
        codes = tl.load(values + row * width + column, mask=row_inside & (column < columns), other=0)
    else:
        word = first // PACKED * 3 + 3 * tl.arange(0, SIZE // PACKED)[None, :]
        place, inside = values + row * width + word, row_inside & (word < width)
        low, middle, high = tl.load(place, inside, 0), tl.load(place + 1, inside, 0), tl.load(place + 2, inside, 0)
        pair0, pair1 = low & 0xFFFFFF, (low >> 24 & 0xFF) | (middle & 0xFFFF) << 8
        pair2, pair3 = (middle >> 16 & 0xFFFF) | (high & 0xFF) << 16, high >> 8 & 0xFFFFFF
        pairs = tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3))
        codes = tl.reshape(tl.join(pairs & 0xFFF, pairs >> 12), [row.shape[0], SIZE])
    return codes


@triton.jit
def store_codes(values, codes, row, row_inside, width, first, columns, SIZE: tl.constexpr, FORMAT: tl.constexpr):
    """Store codes, the inverse of :func:`load_codes`; a row's last word is padded with zeros."""
    column = first + tl.arange(0, SIZE)[None, :]
    if FORMAT.mantissa_bits == 3:
        tl.store(values + row * width + column, codes, mask=row_inside & (column < columns))
    else:
        codes = tl.where(column < columns, codes, 0)
        even, odd = tl.split(tl.reshape(codes, [row.shape[0], SIZE // PACKED, 2, 2, 2]))
        pairs02, pairs13 = tl.split(even | odd << 12)
        pair0, pair2 = tl.split(pairs02)
        pair1, pair3 = tl.split(pairs13)
        word = first // PACKED * 3 + 3 * tl.arange(0, SIZE // PACKED)[None, :]
        place, inside = values + row * width + word, row_inside & (word < width)
        tl.store(place, pair0 | pair1 << 24, inside)
        tl.store(place + 1, pair1 >> 8 | pair2 << 16, inside)
        tl.store(place + 2, pair2 >> 16 | pair3 << 8, inside)


@triton.jit
def rows_of_tile(group_sizes, tile, num_groups, MAX_GROUPS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """Find group, first row and end of the ``tile``-th tile of rows; each group begins on a new tile.

    After the last tile, the group is ``num_groups`` and there are no rows.
    """
    index = tl.arange(0, MAX_GROUPS)
    sizes = tl.load(group_sizes + index, mask=index < num_groups, other=0).to(tl.int32)
    tiles = (sizes + TILE_ROWS - 1) // TILE_ROWS
    tile_ends = tl.cumsum(tiles, 0)
    group = tl.sum(tl.where((tile_ends <= tile) & (index < num_groups), 1, 0), 0)
    chosen = (index == group) & (index < num_groups)
    end = tl.sum(tl.where(chosen, tl.cumsum(sizes, 0), 0), 0)
    start = end - tl.sum(tl.where(chosen, sizes, 0), 0)
    first_tile = tl.sum(tl.where(chosen, tile_ends - tiles, 0), 0)
    return group, start + (tile - first_tile) * TILE_ROWS, end
