"""The fused kernels against float64: small sizes in Triton's interpreter, all of them on a GPU.

The interpreter holds no bfloat16 in descriptors, so it checks float16; the kernels differ in nothing but the dtype.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.ops.fused_experts import checks

pytest.importorskip("triton", reason="triton is not installed")

CASES = [
    pytest.param((37, 40, 24, 5, 2), 0.0, 1.0, id="odd"),
    pytest.param((24, 16, 8, 6, 1), 2.0, 1.0, id="top-1, empty experts"),
    pytest.param((33, 24, 40, 5, 4), 0.5, 0.7, id="slots without rows"),
]


@pytest.mark.parametrize(("shape", "skew", "keep"), CASES)
def test_interpreted(
    interpreter: ProcessPoolExecutor, shape: tuple[int, int, int, int, int], skew: float, keep: float
) -> None:
    interpreter.submit(checks.check_small_tiles, "cpu", torch.float16, shape, skew, keep).result()


def test_biases_and_a_clamped_activation_interpreted(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(checks.check_small_tiles, "cpu", torch.float16, *CASES[2].values, True).result()


def test_no_rows_interpreted(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(checks.check_no_rows, "cpu").result()


def test_weighted_sum_interpreted(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(checks.check_weighted_sum, "cpu", 37, 40, 3, 0.7).result()


def test_weights_anywhere_interpreted(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(checks.check_weights_anywhere, "cpu").result()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "skew", "keep"),
    [
        *CASES,
        pytest.param((1000, 1536, 256, 128, 8), 0.0, 1.0, id="128 experts"),
        pytest.param((700, 520, 264, 512, 10), 1.0, 1.0, id="512 experts"),
        pytest.param((3000, 256, 128, 4, 2), 3.0, 1.0, id="huge groups"),
        pytest.param((600, 200, 72, 8, 3), 0.3, 0.5, id="slots without rows"),
    ],
)
def test_on_a_gpu(dtype: torch.dtype, shape: tuple[int, int, int, int, int], skew: float, keep: float) -> None:
    checks.check_equal_to_float64("cuda", dtype, shape, skew, keep)
    checks.check_equal_to_float64("cuda", dtype, shape, skew, keep, biased=True)
    checks.check_small_tiles("cuda", dtype, shape, skew, keep)


@pytest.mark.gpu
def test_no_rows_on_a_gpu() -> None:
    checks.check_no_rows("cuda")


@pytest.mark.gpu
def test_weighted_sum_on_a_gpu() -> None:
    checks.check_weighted_sum("cuda", 1000, 1536, 8, 0.9)


@pytest.mark.gpu
def test_weights_anywhere_on_a_gpu() -> None:
    checks.check_weights_anywhere("cuda")
