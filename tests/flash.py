"""The flash kernel for sequences of any lengths, in plain PyTorch and any dtype: a stand-in where there is no GPU.

Its backward pass takes the logarithms of the denominators and the output that it is given, as the kernel's does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from moefoundry.model import context
from moefoundry.ops import segment_attention


class FlashInPyTorch:
    """Stands for ``torch.ops.aten``.

    Attributes:
        heads: Heads of keys of each call.
    """

    def __init__(self) -> None:
        self.heads: list[int] = []

    def _flash_attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *rest: object, scale: float, **window: int
    ) -> tuple[Tensor, ...]:
        self.heads.append(k.shape[1])
        assert rest[0] is ends
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert rest[1] == rest[2] >= int(ends.diff().max())
        scores_HTT = _scores(q, k, ends, scale, window)
        logs_HT = scores_HTT.logsumexp(-1)
        out = torch.einsum("hij,jhd->ihd", (scores_HTT - logs_HT.unsqueeze(-1)).exp(), _repeated(v, q))
        return out, logs_HT, torch.empty(0), torch.empty(0), torch.empty(0)

    def _flash_attention_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        logs_HT: Tensor,
        ends: Tensor,
        *rest: object,
        scale: float,
        **window: int,
    ) -> tuple[Tensor, ...]:
        probs_HTT = (_scores(q, k, ends, scale, window) - logs_HT.unsqueeze(-1)).exp()
        slopes_HTT = torch.einsum("ihd,jhd->hij", grad, _repeated(v, q)) - (grad * out).sum(-1).T.unsqueeze(-1)
        slopes_HTT = probs_HTT * slopes_HTT * scale
        grad_k = torch.einsum("hij,ihd->jhd", slopes_HTT, q)
        grad_v = torch.einsum("hij,ihd->jhd", probs_HTT, grad)
        groups = k.shape[1]
        return (
            torch.einsum("hij,jhd->ihd", slopes_HTT, _repeated(k, q)),
            *(x.unflatten(1, (groups, -1)).sum(2) for x in (grad_k, grad_v)),
        )


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, ends: Tensor, scale: float, window: dict[str, int]) -> Tensor:
    place_T = torch.arange(len(q))
    segment_T = torch.searchsorted(ends, place_T, right=True)
    distance_TT = place_T[:, None] - place_T
    seen_TT = (segment_T[:, None] == segment_T) & (distance_TT >= 0)
    if window:
        assert window["window_size_right"] == 0
        seen_TT &= distance_TT <= window["window_size_left"]
    return (torch.einsum("ihd,jhd->hij", q, _repeated(k, q)) * scale).masked_fill(~seen_TT, -torch.inf)


@contextmanager
def attention_in_segments() -> Iterator[FlashInPyTorch]:
    """Let models attend in segments, whatever their dtype and device, and make no mask."""
    kernel = FlashInPyTorch()
    with (
        mock.patch.object(segment_attention, "aten", kernel),
        mock.patch.object(context, "takes_segments", return_value=True),
        mock.patch.object(context, "_mask", side_effect=AssertionError("a mask is made")),
    ):
        yield kernel
