"""FP8 as DeepSeek-V3 trains with it (arXiv 2412.19437, section 3.3): formats, quantizers, matrix products.

formats.py, scales.py             the formats, the tiles, and decisions that the report leaves open
linear.py, feed_forward.py        layers with autograd, and the tensors that they keep for backward
weights.py                        weights in blocks, kept while they do not change
swiglu.py                         SwiGLU whose results leave in FP8
mixture.py                        experts; tokens are quantized before they are copied
coarse.py                         linear layers with one scale a tensor or a row, for comparison
quantization.py, gemm.py          functions to call; they choose an implementation by device (``backend.py``)
reference.py, e5m6.py, groups.py  the quantizers in plain PyTorch: their definition
gemm_reference.py                 the products in plain PyTorch, and on a model of ``tensor_cores.py``
triton_*.py                       the kernels
deep_gemm.py                      grouped products by a package
"""

from moefoundry.ops.fp8.backend import Backend
from moefoundry.ops.fp8.coarse import Granularity, coarse_linear
from moefoundry.ops.fp8.feed_forward import fp8_feed_forward
from moefoundry.ops.fp8.formats import Format, QuantizedTensor, Scaling, Tile
from moefoundry.ops.fp8.gemm import dgrad, fprop, wgrad
from moefoundry.ops.fp8.linear import fp8_frozen_grouped_linear, fp8_kept_linear, fp8_linear
from moefoundry.ops.fp8.mixture import fp8_mixture
from moefoundry.ops.fp8.quantization import (
    dequantize,
    quantize,
    quantize_columns,
    quantize_rows_once,
    quantize_transposed,
    retile,
)
from moefoundry.ops.fp8.weights import BlocksOfPass, GatheredBlocks, KeptBlocks
from moefoundry.ops.sizes import TILE

__all__ = [
    "TILE",
    "Backend",
    "BlocksOfPass",
    "Format",
    "GatheredBlocks",
    "Granularity",
    "KeptBlocks",
    "QuantizedTensor",
    "Scaling",
    "Tile",
    "coarse_linear",
    "dequantize",
    "dgrad",
    "fp8_feed_forward",
    "fp8_frozen_grouped_linear",
    "fp8_kept_linear",
    "fp8_linear",
    "fp8_mixture",
    "fprop",
    "quantize",
    "quantize_columns",
    "quantize_rows_once",
    "quantize_transposed",
    "retile",
    "wgrad",
]
