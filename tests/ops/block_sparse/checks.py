"""The checks of ``test_block_sparse.py``: run in Triton's interpreter by a process of its own, or on a GPU here."""

from __future__ import annotations

import torch

from moefoundry.ops.block_sparse import block_sparse_experts
from moefoundry.ops.block_sparse.function import multiply_into_blocks
from moefoundry.ops.block_sparse.layout import Topology
from moefoundry.ops.permute import order_by_expert
from tests.ops.fused_experts.checks import check_equal_to_float64


def check_mixture(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int, int],
    skew: float,
    keep: float,
    biased: bool = False,
) -> None:
    """As :func:`check_equal_to_float64`."""
    check_equal_to_float64(device, dtype, shape, skew, keep, biased, block_sparse_experts)


def check_no_rows(device: str) -> None:
    """No tokens: there is an output, and every gradient is zero."""
    shapes = (0, 128), (0, 2), (4, 256, 128), (4, 256, 128), (4, 128, 256)
    leaves = [torch.full(shape, 3.0, device=device, requires_grad=True) for shape in shapes]
    out = block_sparse_experts(*leaves, order_by_expert(torch.zeros(0, 2, dtype=torch.int64, device=device), 4))
    assert out.shape == (0, 128)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def check_rows_past_int16(device: str) -> None:
    """Blocks of rows 255, 256 and 300 with stk's int16 indices: a product of such an index and 128 overflows."""
    rows = torch.tensor([0, 255, 256, 300], device=device)
    left, right = torch.randn(301 * 128, 128, device=device), torch.randn(128, 256, device=device)
    columns = torch.tensor([1, 0, 1, 1], device=device)
    unused = rows.int()
    topology = Topology(unused, rows.short(), columns.short(), unused, unused, unused)
    blocks = multiply_into_blocks(left, right, topology)
    expected = left.view(301, 128, 128)[rows] @ right.view(128, 2, 128).permute(1, 0, 2)[columns]
    torch.testing.assert_close(blocks, expected, rtol=1e-5, atol=1e-4)
