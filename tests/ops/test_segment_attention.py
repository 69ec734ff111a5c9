"""Attention in segments against plain attention with a mask, in float64; its kernel on a GPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.ops import kernel_choice, segment_attention
from moefoundry.ops.attention_sinks import attend_with_sinks_reference
from moefoundry.ops.kernel_choice import use_fused_kernels
from moefoundry.ops.segment_attention import (
    Segments,
    attend_in_segments,
    segments_of_lengths,
    segments_of_rows,
    takes_segments,
)
from tests.flash import FlashInPyTorch

LENGTHS = [[5, 1, 6, 4], [16], [2, 14]]  # of the segments of each row
CPU = torch.device("cpu")
CASES = {
    "equal heads": (4, 4, 8, 8, None, False),
    "grouped": (4, 2, 8, 8, None, False),
    "window": (4, 1, 8, 8, 3, False),
    "sinks": (4, 2, 8, 8, None, True),
    "sinks and window": (4, 2, 8, 8, 3, True),
    "narrow values": (4, 4, 12, 8, None, False),
    "wide values and sinks": (4, 4, 8, 12, None, True),
}


def segments(device: torch.device = CPU) -> Segments:
    return segments_of_lengths([length for row in LENGTHS for length in row], device)


def reference(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int | None, lengths: list[list[int]]
) -> Tensor:
    """All products, with a mask."""
    ids = torch.tensor([[i for i, length in enumerate(row) for _ in range(length)] for row in lengths], device=q.device)
    place = torch.arange(ids.shape[1], device=q.device)
    distance = place[:, None] - place
    mask = (distance >= 0) & (ids[:, None, :, None] == ids[:, None, None, :])
    if window is not None:
        mask = mask & (distance < window)
    if sinks is not None:
        out = attend_with_sinks_reference(q, k, v, sinks, mask, scale=0.3)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def operands(heads: int, groups: int, width: int, value_width: int, sinks: bool, length: int = 16) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(3, heads, length, width), (3, groups, length, width), (3, groups, length, value_width)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes] + [torch.randn(heads).double()] * sinks


@pytest.mark.parametrize(("heads", "groups", "width", "value_width", "window", "sinks"), CASES.values(), ids=CASES)
def test_it_is_attention_with_a_mask(
    heads: int, groups: int, width: int, value_width: int, window: int | None, sinks: bool
) -> None:
    leaves = [x.requires_grad_() for x in operands(heads, groups, width, value_width, sinks)]
    with mock.patch.object(segment_attention, "aten", FlashInPyTorch()) as kernel:
        out = attend_in_segments(*leaves[:3], segments(), window, 0.3, *leaves[3:])
        incoming = torch.randn_like(out)
        got = torch.autograd.grad(out, leaves, incoming)
    assert kernel.heads == [groups]
    expected = reference(*leaves[:3], leaves[3] if sinks else None, window, LENGTHS)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, torch.autograd.grad(expected, leaves, incoming), rtol=0, atol=1e-12)


def test_segments_by_hand() -> None:
    assert segments_of_rows(3, 4, CPU).ends.tolist() == [0, 4, 8, 12]
    made = segments()
    assert made.ends.tolist() == [0, 5, 6, 12, 16, 32, 34, 48]
    assert made.longest == 16
    assert made.ends.dtype == torch.int32


def test_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "_fused", False)  # and again at the end
    gpu = torch.device("cuda")
    with mock.patch.object(segment_attention, "has_kernel", lambda device: device.type == "cuda"):
        assert not takes_segments(gpu, torch.bfloat16, 192), "not chosen"
        use_fused_kernels(True)
        assert takes_segments(gpu, torch.bfloat16, 192)
        assert takes_segments(gpu, torch.float16, 256)
        assert not takes_segments(gpu, torch.float32, 128)
        assert not takes_segments(gpu, torch.bfloat16, 100)
        assert not takes_segments(gpu, torch.bfloat16, 264)
    assert not takes_segments(CPU, torch.bfloat16, 128)


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "groups", "width", "value_width", "window", "sinks"), CASES.values(), ids=CASES)
def test_the_kernel_is_attention_with_a_mask(
    heads: int, groups: int, width: int, value_width: int, window: int | None, sinks: bool
) -> None:
    lengths = [[300, 1, 211], [512], [17, 495]]
    exact = operands(heads, groups, 8 * width, 8 * value_width, sinks, 512)
    narrow = [x.to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    whole = segments_of_lengths([length for row in lengths for length in row], torch.device("cuda"))
    out = attend_in_segments(*narrow[:3], whole, window, 0.3, *narrow[3:])
    expected = reference(*wide[:3], wide[3] if sinks else None, window, lengths)
    incoming = torch.randn_like(out)
    pairs = zip(
        (out, *torch.autograd.grad(out, narrow, incoming)),
        (expected, *torch.autograd.grad(expected, wide, incoming.double())),
        strict=True,
    )
    for got, other in pairs:
        assert (got.double() - other).norm() <= 2e-2 * other.norm()
