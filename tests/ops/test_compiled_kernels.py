"""Every Triton kernel compiles for GPUs that are not here, and its machine code is what it is meant to be.

Kept in ``compiled_kernels.json`` for the locked Triton; a change of a kernel updates it:
``python -m tests.ops.compiling --update``, and again with ``--capability 80`` and ``100``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from moefoundry.ops.block_sparse.kernels import missing
from tests.ops import compiling

triton = pytest.importorskip("triton", reason="triton is not installed")

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a program can have on compute capability 9.0 and 10.0."""
SHARED_LIMIT_8_0 = 163 * 1024
needs_stk = pytest.mark.skipif(bool(missing()), reason=missing())
PAIRS = ("FP8 fprop", "FP8 dgrad")
"""Kernels whose first configuration takes steps of K in pairs."""
MULTIPLIES = (
    *("experts: up", "experts: down", "experts: tokens", "experts: gradients", "experts of"),
    *("router: logits", "router: tokens", "blocks", "FP8"),
)


def compiled(capability: int, configs: int, beginning: str | tuple[str, ...], cache: Path) -> dict[str, Any]:
    """Compile in a process of its own, which interprets nothing.

    ``cache`` is Triton's: it goes by the text of a kernel and of what it calls, its options, target and compiler.
    """
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(compiling.compile_all, capability, configs, beginning).result()


@pytest.mark.parametrize(
    ("capability", "configs", "beginning"),
    [
        pytest.param(80, 1, "blocks", marks=[needs_stk, pytest.mark.slow]),
        (90, 1, ("blocks", "experts", "rows", "router", "order", "AdamW")),
        pytest.param(100, 1, "blocks", marks=[needs_stk, pytest.mark.slow]),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((90, 2, ""), (100, 2, ""))),
    ],
)
def test_machine_code(
    capability: int, configs: int, beginning: str | tuple[str, ...], kept_between_runs: Callable[[str], Path]
) -> None:
    found = compiled(capability, configs, beginning, kept_between_runs("triton"))
    assert found
    expected, key = json.loads(compiling.GOLDEN.read_text()), f"triton {triton.__version__}, sm_{capability}"
    for name, kernel in found.items():
        if name in PAIRS and key not in expected:
            continue  # Triton 3.6 spills there, and promotes between products; the tuner has the other configurations
        assert kernel["stack"] == 0, f"{name} spills"
        assert kernel["shared"] <= (SHARED_LIMIT if capability >= 90 else SHARED_LIMIT_8_0), f"{name} cannot start"
        if name.startswith(MULTIPLIES):
            assert kernel["tensor cores"], f"{name} does not use the tensor cores"
            assert kernel["copies"], f"{name} copies nothing ahead"
            if name.startswith(("experts", "router")):
                assert kernel.get("copies ahead") != 0, f"{name} waits for what it has just begun to copy"
                assert "serialized" not in kernel, f"{name} waits for each product before the next"
        if capability == 90 and name in PAIRS:
            overlap = kernel["while multiplying"]
            assert overlap["FFMA"] >= 32, f"{name} promotes no block while it multiplies the next"
            assert overlap["copies"], f"{name} copies nothing while it multiplies"
    if key not in expected:
        pytest.skip(f"compiled_kernels.json has nothing of {key}; what must hold of every version was checked")
    assert found == {name: kernel for name, kernel in expected[key].items() if name in found}
