"""Grouped products by DeepGEMM, on a stand-in with its signature and demands, against the plain definition.

DeepGEMM itself runs on GPUs only. ``MOEFOUNDRY_DEEPGEMM`` names a directory with the package, whose signature is then
compared with that of the stand-in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moefoundry.ops.expert_bias import PLAIN_LAYER, HiddenLayer
from moefoundry.ops.fp8 import Backend, Tile, deep_gemm, dgrad, fp8_linear, fp8_mixture, fprop, quantize
from moefoundry.ops.fp8.backend import GEMM_CAPABILITY, choose_backend, describe_backend
from moefoundry.ops.permute import order_by_expert
from tests.ops.fp8 import deep_gemm_stand_in
from tests.ops.fused_experts.checks import CLAMPED, routed

PLACE = Path(os.environ.get("MOEFOUNDRY_DEEPGEMM", "/nowhere"))
CPU = torch.device("cpu")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU be a device that it runs on."""
    monkeypatch.setitem(sys.modules, "deep_gemm", deep_gemm_stand_in.package())
    monkeypatch.setattr(deep_gemm, "obstacle", lambda device: "")


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got.float() - expected.float()).norm() <= 2e-3 * expected.float().norm())


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("width", "hidden"), [(256, 128), (144, 400)])
def test_the_products(width: int, hidden: int) -> None:
    """Fprop, and Dgrad, whose weight is a transposed view."""
    torch.manual_seed(0)
    sizes = torch.tensor([128, 0, 256, 128])
    rows, grad = (torch.randn(512, columns, dtype=torch.bfloat16) for columns in (width, hidden))
    weight = quantize(torch.randn(4, hidden, width), Tile.BLOCK)
    for product, operand in ((fprop, rows), (dgrad, grad)):
        quantized = quantize(operand * torch.rand(512, 1).exp2(), Tile.ROW)
        got, expected = (
            product(quantized, weight, sizes, torch.bfloat16, backend)
            for backend in (Backend.DEEPGEMM, Backend.REFERENCE)
        )
        assert close(got, expected)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("shape", "skew", "keep", "biased"),
    [
        pytest.param((70, 144, 48, 5, 2), 0.0, 1.0, False, id="odd"),
        pytest.param((200, 128, 64, 6, 1), 3.0, 1.0, False, id="huge and empty groups"),
        pytest.param((60, 128, 32, 40, 4), 0.5, 0.6, True, id="many groups, slots without rows, biases"),
        pytest.param((0, 128, 32, 3, 2), 0.0, 1.0, False, id="no tokens"),
    ],
)
def test_a_mixture_is_that_of_the_definition(
    shape: tuple[int, int, int, int, int], skew: float, keep: float, biased: bool
) -> None:
    """Output and all gradients, for groups of any sizes."""
    torch.manual_seed(1)
    tokens, width, hidden, experts, top_k = shape
    ids = routed(tokens, experts, top_k, skew)
    order = order_by_expert(ids, experts, None if keep == 1 else torch.rand(ids.shape) < keep)
    operands = [torch.randn(tokens, width), torch.rand(tokens, top_k)]
    operands += [torch.randn(experts, *of_expert) * 0.1 for of_expert in [(hidden, width)] * 2 + [(width, hidden)]]
    operands += [torch.randn(experts, hidden) for _ in range(2 * biased)]
    results = []
    for backend in (Backend.DEEPGEMM, Backend.REFERENCE):
        leaves = [each.to(torch.float32 if i == 1 else torch.bfloat16) for i, each in enumerate(operands)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        layer = HiddenLayer(CLAMPED, *leaves[5:]) if biased else PLAIN_LAYER
        out = fp8_mixture(*leaves[:5], order, layer, backend)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        assert close(got, expected)


@pytest.mark.usefixtures("stand_in")
def test_it_is_for_groups_alone() -> None:
    x, weight = torch.randn(8, 128, dtype=torch.bfloat16), torch.randn(16, 128, dtype=torch.bfloat16)
    assert torch.equal(fp8_linear(x, weight, backend=Backend.DEEPGEMM), fp8_linear(x, weight))
    assert choose_backend(CPU, GEMM_CAPABILITY, Backend.DEEPGEMM) is Backend.REFERENCE
    assert describe_backend(CPU, GEMM_CAPABILITY, Backend.DEEPGEMM) == "deepgemm"
    rows, weights = quantize(torch.randn(128, 24), Tile.ROW), quantize(torch.randn(1, 32, 24), Tile.BLOCK)
    with pytest.raises(ValueError, match="widths that are multiples of 16, not 24 and 32"):
        fprop(rows, weights, torch.tensor([128]), torch.bfloat16, Backend.DEEPGEMM)
    rows, weights = quantize(torch.randn(128, 32), Tile.ROW), quantize(torch.randn(1, 32, 32), Tile.BLOCK)
    with pytest.raises(ValueError, match="gives bfloat16, not torch"):
        fprop(rows, weights, torch.tensor([128]), torch.float32, Backend.DEEPGEMM)


def test_it_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="deepgemm cannot run: it needs an NVIDIA GPU, not cpu; use backend triton"):
        describe_backend(CPU, GEMM_CAPABILITY, Backend.DEEPGEMM)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert deep_gemm.missing() == "the package deep_gemm is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    other = ModuleType("deep_gemm")
    monkeypatch.setitem(sys.modules, "deep_gemm", other)
    assert deep_gemm.missing().startswith("the package deep_gemm has no m_grouped_fp8_gemm_nt_contiguous")
    other.m_grouped_fp8_gemm_nt_contiguous = deep_gemm_stand_in.m_grouped_fp8_gemm_nt_contiguous
    other.get_mk_alignment_for_contiguous_layout = lambda: 224
    assert deep_gemm.missing() == "its groups begin at multiples of 224 rows, not 128"
    other.get_mk_alignment_for_contiguous_layout = lambda: 128
    assert deep_gemm.missing() == ""


@pytest.mark.skipif(not (PLACE / "deep_gemm").is_dir(), reason="MOEFOUNDRY_DEEPGEMM names no directory with DeepGEMM")
def test_the_package_has_the_signature_of_the_stand_in() -> None:
    code = (
        "import json, sys; from inspect import signature; sys.path.insert(0, sys.argv[1]); import deep_gemm; "
        "from moefoundry.ops.fp8.deep_gemm import missing; "
        "function = deep_gemm.m_grouped_fp8_gemm_nt_contiguous; "
        "print(json.dumps([missing(), list(signature(function).parameters)]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(PLACE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = list(signature(deep_gemm_stand_in.m_grouped_fp8_gemm_nt_contiguous).parameters)
    assert json.loads(done.stdout.splitlines()[-1]) == ["", ours]
