"""The gate's kernels against float64: small sizes in Triton's interpreter, more on a GPU."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.ops.gate_kernels import checks

pytest.importorskip("triton", reason="triton is not installed")

SIZES = [(200, 136, 24), (5, 1032, 8), (130, 64, 136), (1, 8, 16)]
"""T, D, E: of one tile and of several, shared by programs or not, of widths that fill none."""
LARGE = [
    (24576, 1536, 128),
    (32768, 4096, 128),
    (4096, 7168, 256),
    (2048, 7168, 32),
    (4099, 2040, 384),
    (777, 4096, 512),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_interpreted(interpreter: ProcessPoolExecutor, size: tuple[int, int, int]) -> None:
    interpreter.submit(checks.check_products, "cpu", *size).result()


@pytest.mark.parametrize("kept_in_fp8", [False, True])
def test_gradients_interpreted(interpreter: ProcessPoolExecutor, kept_in_fp8: bool) -> None:
    interpreter.submit(checks.check_gradients, "cpu", kept_in_fp8).result()


def test_other_tokens_come_back_interpreted(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(checks.check_where_it_cannot, "cpu").result()


@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_layer_interpreted(interpreter: ProcessPoolExecutor, jitter: float) -> None:
    interpreter.submit(checks.check_layer, "cpu", jitter).result()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, *LARGE], ids=str)
def test_products_on_a_gpu(size: tuple[int, int, int]) -> None:
    checks.check_products("cuda", *size)


@pytest.mark.gpu
@pytest.mark.parametrize("kept_in_fp8", [False, True])
def test_gradients_on_a_gpu(kept_in_fp8: bool) -> None:
    checks.check_gradients("cuda", kept_in_fp8)


@pytest.mark.gpu
def test_other_tokens_come_back_on_a_gpu() -> None:
    checks.check_where_it_cannot("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_layer_on_a_gpu(jitter: float) -> None:
    checks.check_layer("cuda", jitter)
