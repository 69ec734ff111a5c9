"""The Triton kernels: bit for bit what the references give, in Triton's interpreter and on a GPU.

Triton decides at its import whether it interprets, and a pytest process has long imported it: the checks run in a
process of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from moefoundry.ops.fp8 import Backend, Format, Scaling, Tile, quantize
from moefoundry.ops.fp8.backend import GEMM_CAPABILITY, choose_backend
from tests.ops.fp8 import kernel_checks as checks

pytest.importorskip("triton", reason="triton is not installed")

Run = Callable[..., None]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """``run(check, ...)``: the check on a device, there or here."""
    if request.param == "cuda":
        return lambda check, *args: check("cuda", *args)
    process: ProcessPoolExecutor = request.getfixturevalue("interpreter")
    return lambda check, *args: process.submit(check, "cpu", *args).result()


@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("format", Format)
def test_rows(run: Run, format: Format, scaling: Scaling) -> None:
    run(checks.check_rows, format, scaling)


@pytest.mark.parametrize("scaling", Scaling)
def test_blocks(run: Run, scaling: Scaling) -> None:
    run(checks.check_blocks, scaling)


@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("retiled", [None, *Format])
def test_columns(run: Run, scaling: Scaling, retiled: Format | None) -> None:
    run(checks.check_columns, scaling, retiled)


@pytest.mark.parametrize("scaling", Scaling)
@pytest.mark.parametrize("sizes", [None, [0, 1, 130, 0, 40], [0, 0]], ids=str)
def test_products(run: Run, sizes: list[int] | None, scaling: Scaling) -> None:
    run(checks.check_products, scaling, sizes, 200, 144)


@pytest.mark.parametrize(
    ("weighted", "sizes", "columns", "dtype"),
    [
        (True, [0, 1, 130], 72, torch.float16),
        (False, None, 40, torch.float32),
        pytest.param(True, [0, 1, 130, 0, 40], 200, torch.float32, marks=pytest.mark.slow),
        pytest.param(True, [0, 0], 136, torch.float32, marks=pytest.mark.slow),
        pytest.param(False, None, 200, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_swiglu(run: Run, weighted: bool, sizes: list[int] | None, columns: int, dtype: torch.dtype) -> None:
    run(checks.check_swiglu, weighted, sizes, columns, dtype)


def test_tiles_that_are_not_finite(run: Run) -> None:
    run(checks.check_tiles_that_are_not_finite)


def test_cpus_get_the_reference_and_kernels_say_what_they_need() -> None:
    cpu = torch.device("cpu")
    assert choose_backend(cpu, GEMM_CAPABILITY) is Backend.REFERENCE
    x = torch.randn(2, 128)
    assert torch.equal(quantize(x, Tile.ROW).scales, quantize(x, Tile.ROW, backend=Backend.REFERENCE).scales)
    with pytest.raises(ValueError, match="triton cannot run: its kernels need a CUDA device, not cpu"):
        quantize(x, Tile.ROW, backend=Backend.TRITON)


@pytest.mark.parametrize(
    ("capability", "hip", "obstacle"),
    [((8, 0), None, r"\(8, 9\), not \(8, 0\)"), ((9, 4), "6.0", "NVIDIA"), ((9, 0), None, None)],
)
def test_gpus_get_the_kernels_that_they_can_run(capability, hip, obstacle, monkeypatch: pytest.MonkeyPatch) -> None:
    from moefoundry.ops.fp8 import backend

    monkeypatch.setattr(backend, "_obstacle", backend._obstacle.__wrapped__)  # without its cache
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    cuda = torch.device("cuda")
    if obstacle is None:
        assert choose_backend(cuda, GEMM_CAPABILITY) is Backend.TRITON
        return
    assert choose_backend(cuda, GEMM_CAPABILITY) is Backend.REFERENCE
    with pytest.raises(ValueError, match=obstacle):
        choose_backend(cuda, GEMM_CAPABILITY, Backend.TRITON)


ROWS = {"x": "*bf16", "values": "*u8", "scales": "*u8", "rows": "i32", "columns": "i32", "width": "i32"}
COLUMNS = ROWS | {"x": "*u8", "x_scales": "*u8", "group_sizes": "*i64", "tiles": "i32", "num_groups": "i32"}
PRODUCT = {"x": "*fp8e4nv", "x_scales": "*u8", "out": "*bf16", "group_sizes": "*i64", "columns": "i32"}
STRIDES = [f"{tensor}_{dim}" for tensor in ("weight", "scale") for dim in ("group", "row", "column")]
MULTIPLY = PRODUCT | {"weights": "*fp8e4nv", "weight_scales": "*u8", "inner": "i32", "num_groups": "i32"}
MULTIPLY |= dict.fromkeys(STRIDES, "i32")
WGRAD = PRODUCT | {"grad": "*fp8e4nv", "grad_scales": "*u8", "other": "*fp8e4nv", "other_scales": "*u8"}
WGRAD |= {"rows": "i32", "width": "i32", "num_groups": "i32"}
E5M6 = {"FORMAT": Format.E5M6, "FP32_SCALES": False}
E4M3 = {"FORMAT": Format.E4M3, "FP32_SCALES": False}
WIDE, ROUNDS = {"ld.global.v4.b32", "st.global.v4.b32"}, "cvt.rn.satfinite.e4m3x2.f32"
COMPILED: dict[str, tuple[str, dict[str, str], dict[str, Any], set[str]]] = {
    "rows": ("_quantize_rows", ROWS, E4M3 | {"ROWS": 32}, WIDE | {ROUNDS}),
    "e5m6_rows": ("_quantize_rows", ROWS | {"values": "*i32"}, E5M6 | {"ROWS": 32}, {"ld.global.v4.b32"}),
    "columns": (
        "_quantize_columns",
        COLUMNS,
        E4M3 | {"SOURCE": Format.E4M3, "MAX_GROUPS": 8, "COLUMNS": 64},
        WIDE | {ROUNDS, "cvt.rn.f16x2.e4m3x2"},
    ),
    "multiply": (
        "_multiply",
        MULTIPLY,
        {"weight_column": 1, "DESCRIBED": False, "MAX_GROUPS": 8, "M": 128, "N": 128, "PAIRS": True},
        {"wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", "cp.async.cg.shared.global"},
    ),
    "wgrad": (
        "_wgrad",
        WGRAD,
        {"DESCRIBED": False, "MAX_GROUPS": 8, "M": 128, "N": 128},
        {"wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3", "cp.async.cg.shared.global"},
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_for_hopper_with_wide_accesses_and_its_tensor_cores(name, kept_between_runs, monkeypatch) -> None:
    """Triton's compiler needs no GPU; the interpreter takes what the compiler does not."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moefoundry.ops.fp8 import triton_gemm, triton_quantize

    monkeypatch.setenv("TRITON_CACHE_DIR", str(kept_between_runs("triton")))
    target = GPUTarget("cuda", 90, 32)

    def current_target() -> GPUTarget:
        return target

    current_target.__triton_builtin__ = True  # no code for the GPU
    monkeypatch.setattr("triton.language.target_info.current_target", current_target)
    kernel, types, constants, instructions = COMPILED[name]
    fn = getattr(triton_gemm if hasattr(triton_gemm, kernel) else triton_quantize, kernel).fn
    signature = {arg: "constexpr" if arg in constants else types[arg] for arg in fn.arg_names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, arg in enumerate(fn.arg_names) if arg not in constants}
    source = ASTSource(fn, signature, constants, aligned)
    assembly = triton.compile(source, target=target, options={"num_warps": 8}).asm["ptx"]
    assert {instruction for instruction in instructions if instruction not in assembly} == set()
