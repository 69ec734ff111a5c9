"""Rows on the wire: what arrives is what was quantized, bit for bit, and small."""

import pytest
import torch

from moefoundry.ops.fp8 import Tile, dequantize, quantize, quantize_rows_once
from moefoundry.ops.fp8.wire import Fp8Codec
from moefoundry.ops.sizes import row_bytes
from tests.ops.fp8.samples import sample


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("columns", [1, 127, 128, 300, 384])
def test_what_arrives_is_what_was_quantized(rows: int, columns: int) -> None:
    x = sample("student_t", rows, columns).to(torch.bfloat16)
    codec = Fp8Codec()
    sent = codec.encode(x)
    assert sent.shape == (rows, row_bytes(columns))
    got = codec.decode(sent, x)
    expected = quantize(x, Tile.ROW)
    assert torch.equal(got, dequantize(expected, torch.bfloat16))
    again = quantize(got, Tile.ROW)
    assert torch.equal(dequantize(again), dequantize(expected)), "quantizing once more loses nothing"
    assert torch.equal(quantize_rows_once(got).values.view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.parametrize("columns", [2048, 7168])
def test_a_row_takes_at_most_52_percent_of_bf16(columns: int) -> None:
    assert row_bytes(columns) <= 0.52 * 2 * columns
    assert row_bytes(columns) % 16 == 0
