"""SwiGLU against its formula and autograd."""

import math

import pytest
import torch
from torch import Tensor

from moefoundry.ops.swiglu import PLAIN, Activation, swiglu, swiglu_reference

SHAPES = [(5,), (3, 8), (2, 3, 4), (0, 8)]
GPT_OSS = Activation(alpha=1.702, limit=1.0, offset=1.0)
ACTIVATIONS = {"plain": PLAIN, "gpt_oss": GPT_OSS, "alpha": Activation(alpha=0.5), "limit": Activation(limit=0.5)}


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (4 * torch.randn(shape)).to(dtype).requires_grad_(), torch.randn(shape).to(dtype).requires_grad_()


def test_value_is_x_sigmoid_x_times_up() -> None:
    gate, up = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64), torch.tensor([5.0, 3.0, 0.5], dtype=torch.float64)
    expected = [x / (1 + math.exp(-x)) * y for x, y in zip(gate.tolist(), up.tolist(), strict=True)]
    assert swiglu(gate, up).tolist() == pytest.approx(expected, abs=1e-15)


def test_clamped_value_by_hand() -> None:
    gate, up = torch.tensor([0.5, 3.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 3.0, -2.0], dtype=torch.float64)
    clamped = [(0.5, 0.5), (1.0, 1.0), (-2.0, -1.0)]
    expected = [g / (1 + math.exp(-1.702 * g)) * (u + 1) for g, u in clamped]
    assert swiglu(gate, up, None, GPT_OSS).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_autograd_in_float64(shape: tuple[int, ...], weighted: bool, activation: Activation) -> None:
    inputs = [*pair(shape), *([torch.rand(shape[:-1], dtype=torch.float64).requires_grad_()] if weighted else [])]
    given = dict(zip(("gate", "up", "row_weights"), inputs, strict=False))
    out, expected = (fn(**given, activation=activation) for fn in (swiglu, swiglu_reference))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    incoming = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, incoming), torch.autograd.grad(expected, inputs, incoming), rtol=0, atol=1e-12
    )


def test_gradients_pass_gradcheck() -> None:
    assert torch.autograd.gradcheck(swiglu, pair((3, 4)))
    assert torch.autograd.gradcheck(swiglu, (*pair((3, 4)), torch.rand(3, dtype=torch.float64).requires_grad_()))


def test_weights_of_rows_keep_their_dtype() -> None:
    weights = torch.rand(3).requires_grad_()
    out = swiglu(*pair((3, 4), torch.bfloat16), weights)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.float().sum(), weights)[0].dtype == torch.float32


@pytest.mark.parametrize("activation", [PLAIN, GPT_OSS], ids=["plain", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_kept_and_near_float64(dtype: torch.dtype, activation: Activation) -> None:
    # off the limit, where torch's own clamp has either gradient, by its version
    limit = activation.limit or math.inf
    inputs = [x.detach().where(x.abs() != limit, 0.5).requires_grad_() for x in pair((64, 8), dtype)]
    out = swiglu(*inputs, None, activation)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = swiglu_reference(*exact_inputs, None, activation)
    exact_grads = torch.autograd.grad(exact, exact_inputs, torch.ones_like(exact))
    for got, expected in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-2 * 2**-8)


def test_inputs_and_gradient_are_left_as_they_were() -> None:
    gate, up = pair((3, 4))
    incoming = torch.randn(3, 4, dtype=torch.float64)
    before = [x.detach().clone() for x in (gate, up, incoming)]
    swiglu(gate, up).backward(incoming)
    assert all(torch.equal(x, y) for x, y in zip((gate, up, incoming), before, strict=True))


def test_extreme_gates_stay_finite() -> None:
    gate = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    out = swiglu(gate, torch.ones(4))
    out.sum().backward()
    assert out.tolist() == pytest.approx([0, 0, 100, 1e4], abs=1e-30)
    assert gate.grad.tolist() == pytest.approx([0, 0, 1, 1], abs=1e-30)


def test_only_the_two_inputs_are_kept_for_backward() -> None:
    gate, up = pair((3, 4))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        swiglu(gate, up)
    assert {x.data_ptr() for x in kept} == {gate.data_ptr(), up.data_ptr()}
