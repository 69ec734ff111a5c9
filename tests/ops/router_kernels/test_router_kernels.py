"""The router's kernels against PyTorch's operators in float64: small sizes in Triton's interpreter, more on a GPU."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.ops.router_kernels import checks
from tests.ops.router_kernels.checks import Case

pytest.importorskip("triton", reason="triton is not installed")

CASES = [
    Case(37, 12, 3, "softmax"),
    Case(40, 8, 8, "softmax", normalize=False, segments=4),
    Case(30, 60, 6, "softmax", bias=True, segments=2),
    Case(20, 130, 1, "sigmoid", segments=1),
    Case(21, 48, 16, "sigmoid", normalize=False, segments=3),
    Case(10, 500, 22, "sigmoid", bias=True, segments=2),
    Case(24, 64, 6, "sigmoid", bias=True, segments=2, groups=8, top_k_groups=3),
    Case(30, 60, 5, "softmax", normalize=False, groups=5, top_k_groups=2),
    Case(12, 300, 8, "softmax", bias=True, groups=3, top_k_groups=1),
    Case(9, 20, 10, "sigmoid", groups=2, top_k_groups=2),
]
LARGE = [
    Case(24576, 128, 8, "softmax", segments=6),
    Case(16384, 256, 8, "sigmoid", bias=True, segments=4),
    Case(4099, 384, 8, "softmax", normalize=False),
    Case(8192, 512, 16, "sigmoid", bias=True),
    Case(5000, 1024, 10, "softmax"),
    Case(16384, 256, 8, "sigmoid", bias=True, segments=4, groups=8, top_k_groups=4),
    Case(8192, 160, 6, "softmax", normalize=False, groups=8, top_k_groups=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_routing_interpreted(interpreter: ProcessPoolExecutor, case: Case) -> None:
    interpreter.submit(checks.check_routing, "cpu", case).result()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softmax", [True, False])
def test_ties_interpreted(interpreter: ProcessPoolExecutor, softmax: bool, bias: bool) -> None:
    interpreter.submit(checks.check_ties, "cpu", softmax, bias).result()


@pytest.mark.parametrize("bias", [False, True])
def test_groups_interpreted(interpreter: ProcessPoolExecutor, bias: bool) -> None:
    interpreter.submit(checks.check_groups, "cpu", bias).result()


@pytest.mark.parametrize(
    ("scope", "padded"), [("sequence", False), ("sequence", True), ("micro_batch", False), ("micro_batch", True)]
)
def test_layer_interpreted(interpreter: ProcessPoolExecutor, scope: str, padded: bool) -> None:
    interpreter.submit(checks.check_layer, "cpu", scope, padded).result()


def test_split_interpreted(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(checks.check_split, "cpu").result()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_routing_on_a_gpu(case: Case) -> None:
    checks.check_routing("cuda", case)


@pytest.mark.gpu
def test_split_on_a_gpu() -> None:
    checks.check_split("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softmax", [True, False])
def test_ties_on_a_gpu(softmax: bool, bias: bool) -> None:
    checks.check_ties("cuda", softmax, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
def test_groups_on_a_gpu(bias: bool) -> None:
    checks.check_groups("cuda", bias)


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_layer_on_a_gpu(scope: str, padded: bool) -> None:
    checks.check_layer("cuda", scope, padded)
