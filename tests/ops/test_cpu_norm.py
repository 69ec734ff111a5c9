"""RMSNorm on a CPU equals torch's, in values and gradients, and keeps its input and a number a row."""

import pytest
import torch
from torch import Tensor

from moefoundry.ops import cpu_norm
from moefoundry.ops.cpu_norm import rms_norm, rms_norm_reference

SHAPES = [(3, 5, 64), (1, 48), (0, 8), (2, 3, 7, 33)]


def operands(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = scale * torch.randn(shape, generator=draw, dtype=torch.float64)
    weight = 1 + torch.randn(shape[-1], generator=draw, dtype=torch.float64)
    return [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]


def with_gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (out, *torch.autograd.grad(out, inputs, incoming.to(out.dtype)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])  # below the root of eps, too
def test_equals_torchs(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, scale: float) -> None:
    inputs = operands(shape, dtype, scale)
    found = with_gradients(rms_norm(*inputs, 1e-6), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for got, expected in zip(found, with_gradients(rms_norm_reference(*exact, 1e-6), exact), strict=True):
        assert got.dtype == dtype
        largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance * largest)


def test_the_weights_gradient_stays_accurate_over_many_rows() -> None:
    inputs = operands((70_000, 16), torch.float32)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = (with_gradients(rms_norm(*each, 1e-6), each)[2] for each in (inputs, exact))
    assert (found.double() - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_row_of_zeros_and_strided_rows() -> None:
    x, weight = (tensor.detach() for tensor in operands((4, 6, 16), torch.float64))
    x[0] = 0
    turned = x.transpose(0, 1).requires_grad_()
    weight.requires_grad_()
    found = with_gradients(rms_norm(turned, weight, 1e-6), [turned, weight])
    for got, expected in zip(
        found, with_gradients(rms_norm_reference(turned, weight, 1e-6), [turned, weight]), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_keeps_its_input_and_a_number_a_row() -> None:
    kept: list[Tensor] = []
    x, weight = operands((3, 5, 64), torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        rms_norm(x, weight, 1e-6)
    assert sorted(tensor.numel() for tensor in kept) == [15, 64, 3 * 5 * 64]


def test_takes_wide_tensors_of_a_cpu() -> None:
    x = torch.empty(2, 8)
    assert cpu_norm.takes(x)
    assert cpu_norm.takes(x.double())
    assert not cpu_norm.takes(x.bfloat16())
    assert not cpu_norm.takes(x.to("meta"))
