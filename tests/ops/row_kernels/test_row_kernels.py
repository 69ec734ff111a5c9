"""Kernels over rows against float64: small sizes in Triton's interpreter, all of them on a GPU."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.ops.row_kernels import checks

pytest.importorskip("triton", reason="triton is not installed")

NORMS = [((3, 5, 48), 0.0), ((700, 16), 1.0), ((2, 5000), 0.0)]
ROTATIONS = [(2, 3, 5, 6), (1, 2, 70, 64)]
LOGITS = [(5, 61), (4, 9000)]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("shape", "offset"), NORMS)
def test_rms_norm_interpreted(interpreter: ProcessPoolExecutor, shape: tuple[int, ...], offset: float) -> None:
    for dtype in DTYPES:
        interpreter.submit(checks.check_rms_norm, "cpu", dtype, shape, offset).result()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", ROTATIONS)
def test_rotation_interpreted(interpreter: ProcessPoolExecutor, shape: tuple[int, ...], interleaved: bool) -> None:
    for dtype in DTYPES:
        interpreter.submit(checks.check_rotation, "cpu", dtype, shape, interleaved).result()


@pytest.mark.parametrize(("rows", "width"), LOGITS)
def test_cross_entropy_interpreted(interpreter: ProcessPoolExecutor, rows: int, width: int) -> None:
    for dtype in DTYPES:
        interpreter.submit(checks.check_cross_entropy, "cpu", dtype, rows, width).result()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for shape, offset in [*NORMS, ((16384, 2048), 0.0), ((4096, 7168), 1.0), ((65536, 128), 0.0)]:
        checks.check_rms_norm("cuda", dtype, shape, offset)
    for shape in [*ROTATIONS, (2, 16, 1024, 128)]:
        for interleaved in (False, True):
            checks.check_rotation("cuda", dtype, shape, interleaved)
    for rows, width in [*LOGITS, (1024, 50304), (512, 151936)]:
        checks.check_cross_entropy("cuda", dtype, rows, width)
