"""Block-sparse experts against float64: small sizes in Triton's interpreter, more of them on a GPU."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError
from unittest import mock

import pytest
import torch

from moefoundry.ops.block_sparse import kernels, obstacle
from tests.ops.block_sparse import checks

Shape = tuple[int, int, int, int, int]

needs_stk = pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing())
CASES = [
    pytest.param((37, 128, 128, 5, 2), 0.0, 1.0, id="top-2"),
    pytest.param((300, 128, 256, 3, 1), 2.0, 1.0, id="top-1, an empty expert, several blocks"),
    pytest.param((90, 256, 128, 6, 4), 0.5, 0.7, id="top-4, uneven, slots without rows"),
    pytest.param((20, 128, 128, 4, 2), 0.0, 0.0, id="no slot has a row"),
]


@needs_stk
@pytest.mark.parametrize(("shape", "skew", "keep"), CASES)
def test_interpreted(interpreter: ProcessPoolExecutor, shape: Shape, skew: float, keep: float) -> None:
    interpreter.submit(checks.check_mixture, "cpu", torch.float32, shape, skew, keep).result()


@needs_stk
@pytest.mark.parametrize(("shape", "skew", "keep"), [CASES[1], CASES[3]])
def test_biases_and_a_clamped_activation_interpreted(
    interpreter: ProcessPoolExecutor, shape: Shape, skew: float, keep: float
) -> None:
    interpreter.submit(checks.check_mixture, "cpu", torch.float32, shape, skew, keep, True).result()


@needs_stk
def test_half_precision_interpreted(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(checks.check_mixture, "cpu", torch.float16, *CASES[0].values).result()


@needs_stk
def test_no_rows_interpreted(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(checks.check_no_rows, "cpu").result()


@needs_stk
def test_indices_do_not_overflow(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(checks.check_rows_past_int16, "cpu").result()


@needs_stk
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "skew", "keep"),
    [
        *CASES,
        pytest.param((1000, 1536, 256, 128, 8), 0.0, 1.0, id="128 experts"),
        pytest.param((20000, 256, 128, 4, 2), 3.0, 1.0, id="300 blocks of rows"),
    ],
)
def test_on_a_gpu(dtype: torch.dtype, shape: Shape, skew: float, keep: float) -> None:
    checks.check_mixture("cuda", dtype, shape, skew, keep)
    checks.check_mixture("cuda", dtype, shape, skew, keep, biased=True)


@needs_stk
@pytest.mark.gpu
def test_no_rows_and_many_on_a_gpu() -> None:
    checks.check_no_rows("cuda")
    checks.check_rows_past_int16("cuda")


@pytest.mark.parametrize(
    ("width", "hidden", "dtype", "expected"),
    [
        (130, 128, torch.float32, "model.d_model must be a multiple of 128, not 130"),
        (128, 64, torch.float32, "model.moe.expert_hidden_size must be a multiple of 128, not 64"),
        (128, 128, torch.float64, "it multiplies float32, bfloat16 and float16, not torch.float64"),
        (128, 128, torch.float32, "its kernels need an NVIDIA GPU, not cpu"),
    ],
)
def test_what_stands_in_the_way_is_named(width: int, hidden: int, dtype: torch.dtype, expected: str) -> None:
    with mock.patch.object(kernels, "version", return_value=kernels.STK_VERSION):
        assert obstacle(torch.zeros(1, width, dtype=dtype), hidden) == expected


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (mock.Mock(side_effect=PackageNotFoundError), "stanford-stk is not installed: pip install --no-deps"),
        (mock.Mock(return_value="0.8.0"), "stanford-stk 0.8.0 is installed, and only 0.7.1 is known to be right"),
    ],
)
def test_stk_of_one_version(version: mock.Mock, expected: str) -> None:
    with mock.patch.object(kernels, "version", version):
        assert obstacle(torch.zeros(1, 128), 128).startswith(expected)
        kernels.widened.cache_clear()
        with pytest.raises(ImportError, match=expected):
            kernels.widened()
