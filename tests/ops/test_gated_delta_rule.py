"""The gated delta rule by chunks is the recurrence, one token at a time; so is the convolution before it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from moefoundry.ops.gated_delta_rule import gated_delta_rule
from moefoundry.ops.gated_delta_rule.fused import fused_delta_rule
from moefoundry.ops.short_conv import causal_conv

KEY_HEADS, HEADS, KEYS, VALUES = 2, 6, 8, 12
LENGTHS = [1, 7, 64, 150]  # of one chunk, a part of one, and several
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(length: int, dtype: torch.dtype = torch.float64, rows: int = 2) -> Inputs:
    """Decays between 0.05 and 1: some heads forget at once, some hardly at all."""
    draw = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, length, *shape, generator=draw, dtype=torch.float64).to(dtype)

    q, k, v = normal(KEY_HEADS, KEYS), normal(KEY_HEADS, KEYS), normal(HEADS, VALUES)
    return q, k, v, -3 * normal(HEADS).sigmoid() ** 3, normal(HEADS).sigmoid()


def documents(length: int, rows: int = 2) -> Tensor:
    """Some of a single token, one longer than a chunk, one that begins where a chunk does; padding at the end."""
    numbers = torch.zeros(rows, length, dtype=torch.int64)
    for row, begins in enumerate(([1, 2, 40, 64], [30, 100, 101])):
        for begin in begins:
            numbers[row, begin:] += 1
    numbers[1, max(length - 3, 1) :] = -1
    return numbers


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, numbers: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rule as it is written, token by token."""
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    q, k = (x.repeat_interleave(HEADS // KEY_HEADS, dim=2) for x in (q, k))
    state = v.new_zeros(len(v), HEADS, KEYS, VALUES) if state is None else state
    outputs = []
    for t in range(v.shape[1]):
        if numbers is not None and t > 0:
            state = state * (numbers[:, t] == numbers[:, t - 1])[:, None, None, None]
        state = state * log_decay[:, t].exp()[..., None, None]
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / KEYS**0.5)
    return torch.stack(outputs, dim=1), state


@pytest.mark.parametrize("case", ["plain", "state", "documents"])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_are_the_recurrence_in_float64(length: int, case: str) -> None:
    state = torch.randn(2, HEADS, KEYS, VALUES, dtype=torch.float64) if case == "state" else None
    numbers = documents(length) if case == "documents" else None
    leaves = [x.requires_grad_() for x in inputs(length)]
    out, last = gated_delta_rule(*leaves, numbers, state)
    expected, expected_last = recurrence(*leaves, numbers, state)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    if numbers is None:
        torch.testing.assert_close(last, expected_last, rtol=0, atol=1e-12)
    weights = torch.randn(out.shape, dtype=torch.float64)
    got, wanted = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, expected))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_inputs_are_computed_in_fp32(dtype: torch.dtype) -> None:
    given = inputs(150, dtype)
    given = (*given[:3], given[3].float(), given[4])
    out, state = gated_delta_rule(*given)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    expected, expected_state = recurrence(*(x.double() for x in given), None, None)
    torch.testing.assert_close(state.double(), expected_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.double(), expected.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_a_sequence_in_parts_is_the_sequence() -> None:
    given = inputs(150)
    expected, last = gated_delta_rule(*given)
    outputs, state = [], None
    for parts in zip(*(x.split([70, 1, 1, 78], dim=1) for x in given), strict=True):
        out, state = gated_delta_rule(*parts, state_BHKV=state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-12)


def test_strong_decays_overflow_nothing() -> None:
    q, k, v, log_decay, beta = (x.requires_grad_() for x in inputs(150, torch.float32))
    out, _ = gated_delta_rule(q, k, v, log_decay * 100, beta, documents(150))
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, log_decay, beta))


def test_kernels_get_documents_as_sequences_behind_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that stands for flash-linear-attention, with its arguments, and computes each sequence by itself."""
    seen: dict[str, Any] = {}

    def chunk_gated_delta_rule(q, k, v, g, beta, **options):
        seen.update(options)
        begins = options["cu_seqlens"]
        if begins is None:
            return recurrence(q, k, v, g, beta, None, options["initial_state"])
        parts = [slice(*pair) for pair in zip(begins.tolist(), begins.tolist()[1:], strict=False)]
        found = [recurrence(*(x[:, part] for x in (q, k, v, g, beta)), None, None) for part in parts]
        return torch.cat([out for out, _ in found], dim=1), None

    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = chunk_gated_delta_rule  # type: ignore[attr-defined]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    given, numbers = inputs(150), documents(150)
    out, _ = fused_delta_rule(*given, numbers, None)
    torch.testing.assert_close(out, gated_delta_rule(*given, numbers)[0], rtol=0, atol=1e-12)
    assert seen["cu_seqlens"].tolist() == [0, 1, 2, 40, 64, 150, 180, 250, 251, 297, 300]
    assert seen["use_qk_l2norm_in_kernel"]
    state = torch.randn(2, HEADS, KEYS, VALUES, dtype=torch.float64)
    got, last = fused_delta_rule(*given, None, state)
    expected, expected_last = gated_delta_rule(*given, None, state)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, expected_last, rtol=0, atol=1e-12)


def test_convolution_by_hand() -> None:
    """Width 3, weights 100, 10 and 1 of the token two before, the one before, and itself."""
    x = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]])
    weight = torch.tensor([[[100.0, 10.0, 1.0]]])
    assert causal_conv(x, weight).flatten().tolist() == [1, 12, 123, 234, 345]
    numbers = torch.tensor([[0, 0, 1, 1, 2]])
    assert causal_conv(x, weight, numbers).flatten().tolist() == [1, 12, 3, 34, 5]
    before = torch.tensor([[[8.0], [9.0]]])
    assert causal_conv(x, weight, None, before).flatten().tolist() == [891, 912, 123, 234, 345]


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("length", [2, 9])
def test_convolution_with_one_document_is_that_without(width: int, length: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, length, 5, generator=draw), torch.randn(5, 1, width, generator=draw)
    one = torch.zeros(2, length, dtype=torch.int64)
    torch.testing.assert_close(causal_conv(x, weight, one), causal_conv(x, weight), rtol=0, atol=1e-6)
