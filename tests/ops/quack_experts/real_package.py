"""Compile the calls of the backend ``quack`` by the package itself, without a GPU, and print what was found as JSON.

    python -m tests.ops.quack_experts.real_package SITE_PACKAGES

Tensors are fake, of a CUDA device: QuACK compiles each product, and writes it to ``QUACK_CACHE_DIR``.
"""

from __future__ import annotations

import json
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

TOKENS, WIDTH, HIDDEN, EXPERTS, TOP_K = 2048, 1536, 256, 128, 8
FUNCTIONS = ("gemm", "gemm_gated", "gemm_dgated")


def main(place: Path) -> None:
    sys.path[:0] = [str(place), str(place / "nvidia_cutlass_dsl" / "dsl_packages")]
    from quack import gemm_interface

    from moefoundry.ops import quack_experts
    from moefoundry.ops.fused_experts import launches

    parameters = {name: list(signature(getattr(gemm_interface, name)).parameters) for name in FUNCTIONS}
    lacking, calls = quack_experts.missing(), record(gemm_interface)
    launches.sum_rows = lambda rows_ND, order, *_: rows_ND.new_empty(TOKENS, WIDTH)
    for name in ("up_swiglu", "down_sum", "backward"):  # operators would do nothing on fake tensors
        setattr(quack_experts, name.upper(), getattr(quack_experts, name))
    only_compile()
    with FakeTensorMode():
        forward_and_backward()
    print(json.dumps({"parameters": parameters, "lacking": lacking, "calls": calls}))


def record(interface: Any) -> list[str]:
    """List the functions that are called, in order."""
    calls: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def noted(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*args, **options)

        return noted

    for name in FUNCTIONS:
        setattr(interface, name, noting(name, getattr(interface, name)))
    return calls


def only_compile() -> None:
    """Let the driver, which is not there, be a Hopper's, and compiled products do nothing when they are called."""
    import cutlass.cute as cute
    import cutlass.utils

    class Hopper:
        def __init__(self, device: int = 0) -> None:
            pass

        def get_max_active_clusters(self, cluster_size: int) -> int:
            return 132 // cluster_size

    class Compiled:
        def __init__(self, product: Any) -> None:
            self.export_to_c = product.export_to_c

        def __call__(self, *args: Any) -> None:
            pass

    compile_, cutlass.utils.HardwareInfo = cute.compile, Hopper
    cute.compile = lambda *args, **options: Compiled(compile_(*args, **options))


class Context:
    """Of an autograd function: the engine itself asks CUDA for its devices."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@torch.no_grad()
def forward_and_backward() -> None:
    from moefoundry.ops.permute import RowOrder
    from moefoundry.ops.quack_experts import _QuackExperts

    def integers(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device="cuda")

    rows = TOKENS * TOP_K
    order = RowOrder(integers(rows), integers(rows), integers(TOKENS + 1), integers(EXPERTS), TOP_K)
    shapes = (TOKENS, WIDTH), (TOKENS, TOP_K), *[(EXPERTS, HIDDEN, WIDTH)] * 2, (EXPERTS, WIDTH, HIDDEN)
    operands = [torch.empty(*shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
    context = Context()
    out = _QuackExperts.forward(context, *operands, order)
    *grads, _ = _QuackExperts.backward(context, torch.empty_like(out))
    assert [grad.shape for grad in grads] == [operand.shape for operand in operands]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
