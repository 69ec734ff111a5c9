"""The checks of ``test_row_kernels.py``: run in Triton's interpreter by a process of its own, or on a GPU here."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.model.rope import Rotation, rotate_interleaved
from moefoundry.model.rope import rotate as eager_rotate
from moefoundry.ops.cross_entropy import IGNORE_INDEX
from moefoundry.ops.row_kernels import function

TOLERANCE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of the largest value: what rounding to the dtype, once, may change."""


def check_rms_norm(device: str, dtype: torch.dtype, shape: tuple[int, ...], offset: float) -> None:
    """Output and gradients against float64, for weights of the inputs' dtype and of fp32."""
    for weight_dtype in (dtype, torch.float32):
        x = random(device, *shape).to(dtype)
        weight = random(device, shape[-1]).to(weight_dtype)
        got = with_gradients(lambda x, w: function.rms_norm(x, w, 1e-5, offset), dtype, x, weight)
        wide = x.double(), weight.double()
        exact = with_gradients(lambda x, w: F.rms_norm(x, w.shape, w + offset, 1e-5), dtype, *wide)
        assert [tensor.dtype for tensor in got] == [dtype, dtype, weight_dtype]
        assert_close(got, exact, dtype)


def check_rotation(device: str, dtype: torch.dtype, shape: tuple[int, ...], interleaved: bool) -> None:
    """Heads of tokens as projections leave them, of a wider head, and of positions that differ by row."""
    batch, heads, seq_len, width = shape
    eager = rotate_interleaved if interleaved else eager_rotate
    for rows in (None, batch):
        angles = random(device, *([] if rows is None else [rows, 1]), seq_len, width // 2)
        cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()
        wide = Rotation(cos.double(), sin.double())
        for x in (
            random(device, batch, seq_len, heads, width).to(dtype).transpose(1, 2),
            random(device, batch, seq_len, heads, width + 3).to(dtype).transpose(1, 2)[..., :width],
            random(device, batch, heads, width, seq_len).to(dtype).mT,
        ):
            got = with_gradients(lambda x, c=cos, s=sin: function.rotate(x, c, s, interleaved), dtype, x)
            assert got[0].transpose(1, 2).is_contiguous()
            assert_close(got, with_gradients(lambda x, r=wide: eager(x, r), dtype, x.double()), dtype)


def check_cross_entropy(device: str, dtype: torch.dtype, rows: int, width: int) -> None:
    """Losses and gradients; labels at both ends, none, logits so large that their exponentials overflow, and NaN."""
    logits = (10 * random(device, rows, width)).to(dtype)
    logits[0] = 300.0
    labels = torch.randint(width, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    labels[0], labels[1], labels[2] = 0, width - 1, IGNORE_INDEX
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, labels, ignore_index=IGNORE_INDEX, reduction="none")
    losses.sum().backward()
    untouched = logits.clone()
    alone = function.cross_entropy_(untouched, labels, gradient=False)
    assert torch.equal(untouched, logits)
    got = function.cross_entropy_(logits, labels, gradient=True)
    assert torch.equal(got, alone)
    torch.testing.assert_close(got.double(), losses.detach(), rtol=1e-6, atol=1e-5)
    assert exact.grad is not None
    torch.testing.assert_close(logits.double(), exact.grad, rtol=TOLERANCE[dtype], atol=1e-6)
    assert not logits[2].any()
    logits[3, width // 2] = torch.nan
    assert function.cross_entropy_(logits, labels, gradient=True).isnan().nonzero().flatten().tolist() == [3]


def random(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def with_gradients(compute: Callable[..., Tensor], dtype: torch.dtype, *operands: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of its operands, for the same incoming gradient of ``dtype`` each time."""
    leaves = [operand.detach().requires_grad_() for operand in operands]
    out = compute(*leaves)
    incoming = random(str(out.device), *out.shape).to(dtype).to(out.dtype)
    return (out.detach(), *torch.autograd.grad(out, leaves, incoming))


def assert_close(got: tuple[Tensor, ...], exact: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for mine, other in zip(got, exact, strict=True):
        error = (mine.double() - other).abs().max() / other.abs().max()
        assert error <= TOLERANCE[dtype], f"{list(other.shape)}: {error:.1e}"
