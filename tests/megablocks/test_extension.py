"""The stand-ins for MegaBlocks' extension and for grouped_gemm, against definitions in plain Python."""

from __future__ import annotations

import pytest
import torch

from moefoundry.megablocks import extension, grouped_gemm

INTEGERS = [torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(0,), (50,), (3, 40)])
def test_histogram(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.randint(-2, 9, shape).to(dtype)
    got = extension.histogram(x, 7)
    rows = x.tolist() if len(shape) == 2 else [x.tolist()]
    expected = [[row.count(value) for value in range(7)] for row in rows]
    assert got.dtype == torch.int32
    assert got.tolist() == (expected if len(shape) == 2 else expected[0])


@pytest.mark.parametrize("dtype", INTEGERS)
def test_cumulative_sums(dtype: torch.dtype) -> None:
    x = torch.randint(-5, 9, (3, 20)).to(dtype)
    inclusive, exclusive = torch.empty_like(x), torch.empty_like(x)
    extension.inclusive_cumsum(x, 1, inclusive)
    extension.exclusive_cumsum(x, 1, exclusive)
    assert inclusive.tolist() == [[sum(row[: i + 1]) for i in range(20)] for row in x.tolist()]
    assert exclusive.tolist() == [[sum(row[:i]) for i in range(20)] for row in x.tolist()]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("bits", [1, 3, None])
def test_sort_is_stable_and_by_the_lowest_bits(dtype: torch.dtype, bits: int | None) -> None:
    x = torch.randint(-20, 20, (200,)).to(dtype)
    values, places = torch.empty_like(x), torch.empty_like(x)
    extension.sort(x, bits or torch.iinfo(dtype).bits, values, places)
    numbers = x.tolist()
    expected = sorted(range(200), key=lambda i: numbers[i] % 2**bits if bits else numbers[i])
    assert places.tolist() == expected
    assert values.tolist() == [numbers[i] for i in expected]


def test_columns_of_blocks() -> None:
    padded_bins = torch.tensor([256, 256, 384, 640], dtype=torch.int32)
    out = torch.empty(5 * 3, dtype=torch.int16)
    extension.indices(padded_bins, 128, 5, 3, out)
    assert out.tolist() == [0, 1, 2, 0, 1, 2, 6, 7, 8, 9, 10, 11, 9, 10, 11]


@pytest.mark.parametrize(("rows", "columns", "named"), [(32768, 1, "32768 blocks of rows"), (1, 8192, "columns")])
def test_more_blocks_than_int16_counts_are_refused(rows: int, columns: int, named: str) -> None:
    padded_bins, out = torch.zeros(4, dtype=torch.int32), torch.empty(rows * columns, dtype=torch.int16)
    with pytest.raises(ValueError, match=named):
        extension.indices(padded_bins, 128, rows, columns, out)


@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 0], [0, 4, 0]])
def test_replicate(counts: list[int]) -> None:
    bins, places = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32), sum(counts)
    x, grad = torch.randn(2, 3).half(), torch.randn(2, places).half()
    out, total = torch.empty(2, places).half(), torch.empty(2, 3).half()
    extension.replicate_forward(x, bins, out)
    extension.replicate_backward(grad, bins, total)
    assert out.tolist() == [[v for v, n in zip(row, counts, strict=True) for _ in range(n)] for row in x.tolist()]
    parts = [part.float().sum(1) for part in grad.split(counts, dim=1)]
    torch.testing.assert_close(total.float(), torch.stack(parts, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0, 0], [8, 0, 0]], ids=str)
@pytest.mark.parametrize("width", [16, 6])
@pytest.mark.parametrize("trans_b", [False, True])
def test_grouped_gemm(sizes: list[int], width: int, trans_b: bool) -> None:
    """Width 6 has rows that are not whole 16 bytes, which ``F.grouped_mm`` refuses."""
    torch.manual_seed(0)
    rows, batch_sizes = sum(sizes), torch.tensor(sizes)
    a = torch.randn(rows, width, requires_grad=True)
    b = torch.randn(*((3, 8, width) if trans_b else (3, width, 8)), requires_grad=True)
    got = grouped_gemm.multiply_with_gradient(a, b, batch_sizes, trans_b)
    weights = b.mT if trans_b else b
    expected = torch.cat([part @ weight for part, weight in zip(a.split(sizes), weights, strict=True)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    incoming = torch.randn(1, 8).expand(rows, 8)
    got_grads, expected_grads = (torch.autograd.grad(out, [a, b], incoming) for out in (got, expected))
    torch.testing.assert_close(got_grads, expected_grads, rtol=1e-5, atol=1e-5)
    out = torch.full((3, width, 8), torch.nan)
    assert grouped_gemm.multiply(a, incoming, batch_sizes, trans_a=True, c=out) is out
    parts = zip(a.split(sizes), incoming.split(sizes), strict=True)
    torch.testing.assert_close(out, torch.stack([left.T @ right for left, right in parts]), rtol=1e-5, atol=1e-5)
