"""The experts on QuACK's GEMMs: the arithmetic on a stand-in, the calls on the package where it is, all on a GPU.

``MOEFOUNDRY_QUACK`` names a directory ``site-packages`` with QuACK 0.6.5 and what it imports (docs/performance.md).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from inspect import signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.config import ModelConfig, MoEConfig, UserError
from moefoundry.moe.mixture import build_mixture, check_backend
from moefoundry.ops import quack_experts
from moefoundry.ops.permute import order_by_expert
from moefoundry.ops.swiglu import Activation
from moefoundry.planning.ffn_stages import moe_stages
from tests.model.tiny import batch, gradients, tiny_config, tiny_model
from tests.ops.compiling import inspect
from tests.ops.fused_experts.checks import check_equal_to_float64, check_no_rows, routed
from tests.ops.quack_experts import stand_in

PLACE = Path(os.environ.get("MOEFOUNDRY_QUACK", "/nowhere"))
needs_package = pytest.mark.skipif(
    not (PLACE / "quack").is_dir(), reason="MOEFOUNDRY_QUACK names no directory with QuACK in it"
)
CUDA = 190
"""Number of a CUDA machine in the head of an ELF file."""
CASES = [
    pytest.param((37, 40, 24, 5, 2), 0.0, 1.0, id="odd"),
    pytest.param((24, 16, 8, 6, 1), 2.0, 1.0, id="top-1, empty experts"),
    pytest.param((33, 24, 40, 5, 4), 0.5, 0.7, id="slots without rows"),
    pytest.param((70, 8, 8, 512, 3), 0.0, 1.0, id="512 experts"),
    pytest.param((90, 16, 8, 3, 1), 9.0, 1.0, id="a huge group"),
]


@pytest.fixture
def on_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in stand_in.package().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("moefoundry.ops.fused_experts.launches.sum_rows", stand_in.sum_rows)


def mix(*operands: Any) -> Tensor:
    """Call it without the last argument, the hidden layer, which is the plain one."""
    return quack_experts.quack_experts(*operands[:-1])


@pytest.mark.usefixtures("on_stand_in")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "skew", "keep"), CASES)
def test_on_a_stand_in(dtype: torch.dtype, shape: tuple[int, int, int, int, int], skew: float, keep: float) -> None:
    check_equal_to_float64("cpu", dtype, shape, skew, keep, mix=mix)


@pytest.mark.usefixtures("on_stand_in")
def test_no_tokens() -> None:
    check_no_rows("cpu", quack_experts.quack_experts)


@pytest.mark.usefixtures("on_stand_in")
def test_kept_are_the_up_projections_and_the_routing() -> None:
    tokens, width, hidden, experts, top_k = 64, 40, 24, 4, 2
    rows = tokens * top_k
    order = order_by_expert(routed(tokens, experts, top_k), experts)
    shapes = (tokens, width), (tokens, top_k), *[(experts, hidden, width)] * 2, (experts, width, hidden)
    operands = [torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        quack_experts.quack_experts(*operands, order)
    for operand in operands:
        kept.pop(operand.untyped_storage().data_ptr(), None)
    of_starts = 4 * (experts + 1)
    assert sum(kept.values()) == 2 * rows * 2 * hidden + 4 * rows + 4 * rows + of_starts
    moe = MoEConfig(num_experts=experts, top_k=top_k, expert_hidden_size=hidden, backend="quack", num_shared_experts=0)
    *of_rows, _ = moe_stages(
        ModelConfig(vocab_size=64, d_model=width, n_layers=1, moe=moe), 2, 1, False, rows / experts
    )
    assert tokens * sum(stage.saved for stage in of_rows) == sum(kept.values()) - of_starts


@pytest.mark.usefixtures("on_stand_in")
def test_operators_are_as_torch_asks() -> None:
    torch.manual_seed(0)
    tokens, width, hidden, experts, top_k = 9, 8, 16, 3, 2
    order = order_by_expert(routed(tokens, experts, top_k), experts)

    def bf16(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16)

    tokens_TD, gate, up, down = bf16(tokens, width), *bf16(2, experts, hidden, width), bf16(experts, width, hidden)
    token_of_row_N, row_weights_N = order.token_of_row_N.to(torch.int32), torch.rand(tokens * top_k)
    starts_E1 = F.pad(order.tokens_per_expert_E.cumsum(0), (1, 0)).to(torch.int32)
    hidden_NF = torch.empty(tokens * top_k, hidden, dtype=torch.bfloat16)
    forward = tokens_TD, token_of_row_N, starts_E1, gate, up, hidden_NF
    torch.library.opcheck(quack_experts.UP_SWIGLU, forward)
    gate_up = quack_experts.UP_SWIGLU(*forward)
    ordered = order.tensors, top_k
    torch.library.opcheck(quack_experts.DOWN_SUM, (hidden_NF, row_weights_N, starts_E1, down, *ordered))
    rows = token_of_row_N, row_weights_N, starts_E1
    torch.library.opcheck(
        quack_experts.BACKWARD, (bf16(tokens, width), tokens_TD, *rows, gate, up, down, gate_up, *ordered)
    )


@pytest.mark.usefixtures("on_stand_in")
def test_selective_checkpointing_calls_no_product_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    for name in ("gemm", "gemm_gated", "gemm_dgated"):

        def noted(*args: Any, name: str = name, **options: Any) -> Any:
            calls[name] += 1
            return getattr(stand_in, name)(*args, **options)

        monkeypatch.setattr(sys.modules["quack.gemm_interface"], name, noted)
    monkeypatch.setattr(quack_experts, "_obstacle_of", lambda device: "")
    found = {}
    for mode in ("none", "selective", "full"):
        calls.clear()
        model = tiny_model(
            tiny_config(n_layers=2, backend="quack"), activation_checkpointing=mode, dtype=torch.bfloat16
        )
        loss = model(batch(), batch()).total
        loss.backward()
        found[mode] = dict(calls), {"loss": loss.detach()} | gradients(model)
    once = {"gemm_gated": 1, "gemm": 4, "gemm_dgated": 1}
    assert found["none"][0] == found["selective"][0] == once
    assert found["full"][0] == once | {"gemm_gated": 2}
    for mode in ("selective", "full"):
        for name, value in found[mode][1].items():
            assert torch.equal(value, found["none"][1][name]), f"{mode}: {name}"


def test_it_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = MoEConfig(num_experts=2, top_k=1, expert_hidden_size=8, backend="quack")
    cpu = torch.device("cpu")
    refusal = "model.moe.backend: quack cannot run: its kernels need an NVIDIA GPU, not cpu; use model.moe.backend=auto"
    with pytest.raises(UserError, match=refusal):
        check_backend(cfg, 16, cpu, torch.bfloat16)
    assert quack_experts.obstacle(torch.empty(1, 16), 8) == "it multiplies bfloat16, not torch.float32"
    narrow = torch.empty(1, 12, dtype=torch.bfloat16)
    assert quack_experts.obstacle(narrow, 8) == "widths must be multiples of 8, not 12 and 8"
    for key, activation, biased in (
        ("swiglu", Activation(limit=7.0), False),
        ("moe.projection_bias", Activation(), True),
    ):
        cfg.projection_bias = biased
        with pytest.raises(UserError, match=f"quack does not compute model.{key}; use model.moe.backend=auto"):
            build_mixture(cfg, activation)


def test_a_package_that_is_not_there_or_another_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = quack_experts.missing.__wrapped__
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing() == "the package quack-kernels is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", None)
    assert missing().startswith("the package quack-kernels does not load: ModuleNotFoundError")
    other = ModuleType("quack.gemm_interface")
    other.gemm = lambda A, B, out, tuned, cu_seqlens_m, cu_seqlens_k: None
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", other)
    assert missing().startswith("gemm of quack-kernels has no A_idx, concat_layout: another version")
    other.gemm, other.gemm_gated, other.gemm_dgated = stand_in.gemm, stand_in.gemm_gated, stand_in.gemm_dgated
    assert missing() == ""


def cubin_in(library: bytes) -> bytes:
    """The machine code, an ELF file for CUDA inside of one for the host."""
    starts = (match.start() for match in re.finditer(rb"\x7fELF", library))
    return next(
        library[start:] for start in starts if int.from_bytes(library[start + 18 : start + 20], "little") == 190
    )


@needs_package
def test_the_package_has_these_signatures_and_compiles_these_calls(tmp_path: Path) -> None:
    """Forward and backward on fake tensors; six products for compute capability 9.0, on tensor cores, none spills."""
    environment = os.environ | {"QUACK_ARCH": "90", "CUTE_DSL_ARCH": "sm_90a", "QUACK_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.ops.quack_experts.real_package", str(PLACE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, parameters in found["parameters"].items():
        assert parameters == list(signature(getattr(stand_in, name)).parameters), name
    assert found["lacking"] == ""
    assert found["calls"] == ["gemm_gated", "gemm", "gemm_dgated", "gemm", "gemm", "gemm"]
    codes = [cubin_in(file.read_bytes()) for file in tmp_path.rglob("*.o")]
    kernels = [inspect(SimpleNamespace(asm={"cubin": code}, metadata=SimpleNamespace(shared=0))) for code in codes]
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel["stack"] == 0, "it spills"
        assert kernel["tensor cores"] == "HGMMA"
        assert "TMA" in kernel["copies"]


@pytest.mark.gpu
@pytest.mark.skipif(bool(quack_experts.missing()), reason=quack_experts.missing())
@pytest.mark.parametrize(
    ("shape", "skew", "keep"),
    [
        *CASES,
        pytest.param((1000, 1536, 256, 128, 8), 0.0, 1.0, id="128 experts"),
        pytest.param((700, 520, 264, 512, 10), 1.0, 1.0, id="512 experts, wide"),
    ],
)
def test_on_a_gpu(shape: tuple[int, int, int, int, int], skew: float, keep: float) -> None:
    check_equal_to_float64("cuda", torch.bfloat16, shape, skew, keep, mix=mix)
