"""The fused CPU function computes what its plain parts compute."""

import pytest
import torch
from torch import Tensor

from moefoundry.ops.expert_mixture import expert_mixture, expert_mixture_reference, pays
from moefoundry.ops.permute import order_by_expert

T, D, F, E, K = 23, 12, 8, 6, 2
ROUTINGS = {
    "random": lambda g: torch.rand(T, E, generator=g).topk(K).indices,
    "all on two": lambda g: torch.tensor([[4, 1]]).expand(T, K),
    "one expert empty": lambda g: torch.rand(T, E - 1, generator=g).topk(K).indices,
    "no token": lambda g: torch.empty(0, K, dtype=torch.int64),
}


def case(routing: str, dtype: torch.dtype) -> tuple[list[Tensor], object]:
    g = torch.Generator().manual_seed(0)
    ids = ROUTINGS[routing](g)
    shapes = [(len(ids), D), (len(ids), K), (E, F, D), (E, F, D), (E, D, F)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return tensors, order_by_expert(ids, E)


def results(fn: object, routing: str, dtype: torch.dtype) -> list[Tensor]:
    tensors, order = case(routing, dtype)
    out = fn(*tensors, order)
    (out * torch.linspace(0.5, 2.0, D, dtype=dtype)).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_equals_its_plain_parts(routing: str, dtype: torch.dtype, tolerance: float) -> None:
    expected = results(expert_mixture_reference, routing, torch.float64)
    for ours, theirs in zip(results(expert_mixture, routing, dtype), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_gradient_of_an_empty_expert_is_zero() -> None:
    for grad in results(expert_mixture, "one expert empty", torch.float32)[3:]:
        assert torch.count_nonzero(grad[E - 1]) == 0


def test_two_runs_give_the_same_bits() -> None:
    once, again = (results(expert_mixture, "random", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_gradcheck() -> None:
    tensors, order = case("random", torch.float64)
    assert torch.autograd.gradcheck(lambda *inputs: expert_mixture(*inputs, order), tensors)


def test_pays_for_many_rows_and_before_that_for_large_groups() -> None:
    rows = (8 << 20) // (256 * 4)
    assert pays(4 * rows, 512, 256, 4)
    assert not pays(4 * rows - 1, 512, 256, 4)
    assert pays(rows, rows // 512, 256, 4)
    assert not pays(rows, rows // 512 + 1, 256, 4)
    assert not pays(rows - 1, 1, 256, 4)
