"""The package ``megablocks`` itself, with what :func:`moefoundry.megablocks.provide` puts in its place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from multiprocessing import get_context
from unittest import mock

import pytest

from moefoundry.megablocks import INSTALL, provide, provider
from moefoundry.ops.block_sparse import kernels
from tests.megablocks import checks

needs_megablocks = pytest.mark.skipif(
    find_spec("megablocks") is None or bool(kernels.missing()), reason=f"megablocks is not installed: {INSTALL}"
)


def process(**environment: str) -> ProcessPoolExecutor:
    started = ProcessPoolExecutor(1, get_context("spawn"))
    with mock.patch.dict(os.environ, environment, OMP_NUM_THREADS="1"):
        started.submit(os.getpid).result()  # starts it, with this environment
    return started


@pytest.fixture(scope="module")
def plain() -> Iterator[ProcessPoolExecutor]:
    with process() as started:
        started.submit(checks.fail_to_import).result()
        yield started


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with process(TRITON_INTERPRET="1") as started:
        yield started


@needs_megablocks
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("mlp_impl", ["grouped", "sparse"])
def test_dmoe_equals_the_loop_backend(plain: ProcessPoolExecutor, mlp_impl: str, top_k: int) -> None:
    for normalize in (False, True):
        plain.submit(checks.check_dmoe_equals_the_loop_backend, mlp_impl, top_k, normalize).result()


@needs_megablocks
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_kernels_equal_the_loop_backend(interpreter: ProcessPoolExecutor, top_k: int) -> None:
    interpreter.submit(checks.check_dmoe_equals_the_loop_backend, "sparse", top_k, True).result()


@needs_megablocks
def test_global_lists_stay_empty(plain: ProcessPoolExecutor, interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(checks.check_own_backend_leaves_lists_alone).result()
    plain.submit(checks.check_lists_stay_empty).result()


@needs_megablocks
def test_real_extensions_win() -> None:
    with process() as started:
        started.submit(checks.check_real_extensions_win).result()


@needs_megablocks
@pytest.mark.slow  # imports LLM Foundry
@pytest.mark.parametrize("ffn_type", ["mb_dmoe", "mb_moe"])
def test_llm_foundry(ffn_type: str) -> None:
    with process() as started:
        losses = started.submit(checks.check_llm_foundry_builds, ffn_type).result()
    assert losses[-1, 1] < losses[0, 1]
    assert (losses[:, 2] > 0).all()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (mock.Mock(side_effect=PackageNotFoundError), "megablocks is not installed: TORCH_CUDA_ARCH_LIST"),
        (mock.Mock(return_value="0.9.0"), "megablocks 0.9.0 is installed, and only 0.10.0 is known"),
    ],
)
def test_a_missing_or_other_package_is_named(version: mock.Mock, expected: str) -> None:
    with mock.patch.object(provider, "version", version), pytest.raises(ImportError, match=expected):
        provide()
