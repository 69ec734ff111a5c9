"""Attention with sinks: the fused kernel and the column more equal the softmax written out, in values and gradients."""

import pytest
import torch
from torch import Tensor

from moefoundry.ops import attention_sinks
from moefoundry.ops.attention_sinks import KERNELS, attend_with_sinks, attend_with_sinks_reference

SCALE = 0.3
CASES = {
    "causal": (7, 7, "causal"),
    "one new token": (1, 9, "all"),
    "window": (70, 70, "window"),
    "parts": (5, 9, "window"),
}
Result = tuple[Tensor, ...]


def operands(queries: int, keys: int, dtype: torch.dtype, value_width: int = 8) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = (2, 4, queries, 8), (2, 2, keys, 8), (2, 2, keys, value_width), (4,)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def mask_of(queries: int, keys: int, kind: str) -> Tensor:
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    return (distance >= 0) & (distance < 4) if kind == "window" else distance >= 0


def written_out(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q @ k.mT * SCALE).masked_fill(~mask, -torch.inf)
    exponents = scores.exp()
    return exponents @ v / (exponents.sum(-1, keepdim=True) + sinks.exp().view(-1, 1, 1))


def with_gradients(out: Tensor, inputs: list[Tensor]) -> Result:
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (out, *torch.autograd.grad(out, inputs, incoming.to(out.dtype)))


@pytest.mark.parametrize("attend", [attend_with_sinks, attend_with_sinks_reference])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("queries", "keys", "kind"), CASES.values(), ids=CASES.keys())
def test_equals_the_softmax_written_out(attend, queries: int, keys: int, kind: str, dtype, tolerance: float) -> None:
    inputs, mask = operands(queries, keys, dtype), mask_of(queries, keys, kind)
    given = {"mask": mask} if kind == "window" else {"is_causal": kind == "causal"}
    found = with_gradients(attend(*inputs, **given, scale=SCALE), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for got, expected in zip(found, with_gradients(written_out(*exact, mask), exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)


def test_masks_of_each_row_and_bf16() -> None:
    inputs = operands(9, 9, torch.bfloat16)
    mask = torch.stack([mask_of(9, 9, "window"), mask_of(9, 9, "causal")]).unsqueeze(1)
    out = attend_with_sinks(*inputs, mask, scale=SCALE)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), written_out(*(x.double() for x in inputs), mask), rtol=0, atol=0.02)


def test_a_head_that_attends_to_its_sink_alone_gives_nothing_and_one_without_is_plain() -> None:
    q, k, v, _ = operands(6, 6, torch.float64)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out = attend_with_sinks(q, k, v, torch.tensor([100.0, -100.0, 0.0, -100.0], dtype=torch.float64), is_causal=True)
    assert out[:, 0].abs().max() < 1e-30
    torch.testing.assert_close(out[:, [1, 3]], plain[:, [1, 3]], rtol=0, atol=1e-14)


def test_values_of_another_width_take_the_column_more() -> None:
    inputs = operands(7, 7, torch.float64, value_width=5)
    found = with_gradients(attend_with_sinks(*inputs, is_causal=True, scale=SCALE), inputs)
    expected = with_gradients(written_out(*inputs, mask_of(7, 7, "causal")), inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
def test_no_products_of_all_positions_are_kept(masked: bool) -> None:
    inputs, kept = operands(64, 64, torch.float32), []
    mask = mask_of(64, 64, "window") if masked else None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attend_with_sinks(*inputs, mask, is_causal=not masked)
    assert all(x.shape[-2:] != (64, 64) or x is mask or x.dim() == 2 for x in kept)


@pytest.mark.parametrize("masked", [False, True])
def test_cudas_kernel_takes_what_it_is_given(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta, where its shapes are those of a GPU: arguments, padded sums of rows, gradients."""
    monkeypatch.setitem(attention_sinks.KERNELS, "meta", KERNELS["cuda"])
    inputs = [x.to("meta", torch.bfloat16).requires_grad_() for x in operands(7, 7, torch.float32)]
    mask = torch.ones(7, 7, dtype=torch.bool, device="meta") if masked else None
    out = attend_with_sinks(*inputs, mask, is_causal=not masked)
    assert out.shape == inputs[0].shape
    for x, grad in zip(inputs, torch.autograd.grad(out, inputs, torch.ones_like(out)), strict=True):
        assert (x.shape, x.dtype) == (grad.shape, grad.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "kind"), CASES.values(), ids=CASES.keys())
def test_on_a_gpu(queries: int, keys: int, kind: str, dtype: torch.dtype) -> None:
    inputs = [x.detach().cuda().requires_grad_() for x in operands(queries, keys, dtype)]
    given = {"mask": mask_of(queries, keys, kind).cuda()} if kind == "window" else {"is_causal": kind == "causal"}
    out = attend_with_sinks(*inputs, **given, scale=SCALE)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected = written_out(*exact, mask_of(queries, keys, kind))
    grads = torch.autograd.grad(out, inputs, incoming), torch.autograd.grad(expected, exact, incoming.cpu().double())
    for got, want in [(out, expected), *zip(*grads, strict=True)]:
        error = (got.cpu().double() - want).norm() / want.norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-3)
