"""The kernels' products against cuBLAS's, expert by expert, on the GPU whose cuBLAS scales tiles and blocks: Hopper."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops.fp8 import Backend, QuantizedTensor, Scaling, Tile, fprop, quantize
from moefoundry.ops.fp8.scales import scale_values
from tests.ops.fp8.samples import sample

SIZES, IN, OUT = [128, 0, 384], 512, 256  # cuBLAS wants scales of a multiple of 4 blocks along K


def scaled_mm(x_RI: QuantizedTensor, weight_OI: QuantizedTensor) -> Tensor:
    """``x @ weight.T`` by ``F.scaled_mm``, whose scales lie in memory column by column."""
    types = F.ScalingType
    row_scales = scale_values(x_RI.scales).t().contiguous().t()
    block_scales = scale_values(weight_OI.scales).contiguous().t()
    return F.scaled_mm(
        x_RI.values, weight_OI.values.t(), row_scales, types.BlockWise1x128, block_scales, types.BlockWise128x128
    )


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", Scaling)
def test_grouped_products_are_those_of_cublas(scaling: Scaling) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuBLAS scales 1x128 and 128x128 on compute capability 9.0 only")
    x, weights = sample("normal", sum(SIZES), IN).cuda(), sample("normal", len(SIZES), OUT, IN).cuda()
    got = fprop(
        quantize(x, Tile.ROW, scaling=scaling),
        quantize(weights, Tile.BLOCK, scaling=scaling),
        torch.tensor(SIZES, device="cuda"),
        backend=Backend.TRITON,
    )
    expected = [
        scaled_mm(quantize(rows, Tile.ROW, scaling=scaling), quantize(weight, Tile.BLOCK, scaling=scaling))
        for rows, weight in zip(x.split(SIZES), weights, strict=True)
        if len(rows)
    ]
    torch.testing.assert_close(got, torch.cat(expected), rtol=2**-7, atol=2**-7)
