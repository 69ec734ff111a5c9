"""Permutation by expert: an index example worked out by hand, then plain indexing and autograd as the oracle."""

import pytest
import torch
from torch import Tensor

from moefoundry.ops.permute import (
    RowOrder,
    count_by_expert,
    order_by_expert,
    permute,
    permute_reference,
    unpermute,
    unpermute_reference,
)

E = 4
CASES = {
    "spread": (9, 2),
    "one_choice": (7, 1),
    "one_token": (1, 3),
    "one_token_one_choice": (1, 1),
    "every_expert": (5, E),
    "no_tokens": (0, 2),
}


def distinct_ids(tokens: int, top_k: int, num_experts: int = E) -> Tensor:
    """[T, K] expert ids, distinct within a token."""
    torch.manual_seed(tokens * 10 + top_k)
    return torch.rand(tokens, num_experts).argsort(dim=1)[:, :top_k]


def all_on(expert: int, tokens: int = 6) -> Tensor:
    return torch.full((tokens, 1), expert)


ORDERS = [pytest.param(distinct_ids(*case), id=name) for name, case in CASES.items()]
ORDERS += [pytest.param(all_on(expert), id=f"all_on_{expert}") for expert in (0, 2, E - 1)]


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


# Token 0 goes to experts 2 and 0, token 1 to 0 and 3, token 2 to 2 and 3; expert 1 gets nothing.
#   slot    0 1 2 3 4 5       row     0 1 2 3 4 5
#   expert  2 0 0 3 2 3       expert  0 0 2 2 3 3
#   row     2 0 1 4 3 5       slot    1 2 0 4 3 5
HAND_IDS = torch.tensor([[2, 0], [0, 3], [2, 3]])


def test_order_of_the_example_worked_out_by_hand() -> None:
    order = order_by_expert(HAND_IDS, num_experts=4)
    assert order.slot_of_row_N.tolist() == [1, 2, 0, 4, 3, 5]
    assert order.row_of_slot_TK.tolist() == [[2, 0], [1, 4], [3, 5]]
    assert order.token_of_row_N.tolist() == [0, 1, 0, 2, 1, 2]
    assert order.tokens_per_expert_E.tolist() == [2, 0, 2, 2]


def test_values_of_the_example_worked_out_by_hand() -> None:
    order = order_by_expert(HAND_IDS, num_experts=4)
    rows = permute(torch.tensor([[10.0], [20.0], [30.0]]), order)
    assert rows.flatten().tolist() == [10, 20, 10, 30, 20, 30]
    # Each row now tells its position; token 0 = 1 * row 2 + 2 * row 0, and so on.
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]])
    out = unpermute(rows, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), order)
    assert out.flatten().tolist() == [2, 3 + 16, 15 + 30]


@pytest.mark.parametrize("ids", ORDERS)
def test_order_is_a_bijection_sorted_by_expert_and_stable(ids: Tensor) -> None:
    order = order_by_expert(ids, E)
    slots = order.slot_of_row_N
    assert slots.dtype == order.row_of_slot_TK.dtype == torch.int64
    assert slots.tolist() == sorted(range(ids.numel()), key=lambda slot: (ids.flatten()[slot].item(), slot))
    assert order.row_of_slot_TK.flatten()[slots].tolist() == list(range(ids.numel()))
    assert order.tokens_per_expert_E.tolist() == torch.bincount(ids.flatten(), minlength=E).tolist()


def test_order_is_stable_where_many_slots_tie() -> None:
    ids = torch.randint(0, 2, (3000, 1), generator=torch.Generator().manual_seed(0))
    slots = order_by_expert(ids, 2).slot_of_row_N
    first = int((ids == 0).sum())
    assert (slots[:first].diff() > 0).all()
    assert (slots[first:].diff() > 0).all()


@pytest.mark.parametrize("ids", ORDERS)
def test_permute_equals_indexing_forward_and_backward(ids: Tensor) -> None:
    order = order_by_expert(ids, E)
    tokens, incoming = leaf(ids.shape[0], 5), torch.randn(ids.numel(), 5, dtype=torch.float64)
    out, expected = permute(tokens, order), permute_reference(tokens, order)
    assert torch.equal(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, tokens, incoming), torch.autograd.grad(expected, tokens, incoming), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("ids", ORDERS)
def test_unpermute_equals_indexing_forward_and_backward(ids: Tensor) -> None:
    order = order_by_expert(ids, E)
    inputs = leaf(ids.numel(), 5), leaf(*ids.shape)
    incoming = torch.randn(ids.shape[0], 5, dtype=torch.float64)
    out, expected = unpermute(*inputs, order), unpermute_reference(*inputs, order)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, incoming), torch.autograd.grad(expected, inputs, incoming), rtol=0, atol=1e-12
    )


def test_gradients_pass_gradcheck() -> None:
    order = order_by_expert(HAND_IDS, 4)
    assert torch.autograd.gradcheck(lambda tokens: permute(tokens, order), leaf(3, 2))
    assert torch.autograd.gradcheck(lambda rows, weights: unpermute(rows, weights, order), (leaf(6, 2), leaf(3, 2)))


def test_unpermute_undoes_permute_where_weights_sum_to_one() -> None:
    ids = distinct_ids(8, 3)
    order = order_by_expert(ids, E)
    tokens, weights = leaf(8, 4), torch.rand(8, 3, dtype=torch.float64).softmax(dim=1)
    torch.testing.assert_close(unpermute(permute(tokens, order), weights, order), tokens, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_cast_to_the_rows_and_get_their_gradient_in_their_own_dtype(dtype: torch.dtype) -> None:
    ids = distinct_ids(16, 2)
    order = order_by_expert(ids, E)
    rows, weights = leaf(32, 8, dtype=dtype), torch.rand(16, 2, requires_grad=True)
    out = unpermute(rows, weights, order)
    out.backward(torch.randn_like(out))
    expected = unpermute_reference(rows.detach().double(), weights.detach().double(), order)
    assert (out.dtype, rows.grad.dtype, weights.grad.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_expanded_gradients_are_taken(dtype: torch.dtype) -> None:
    order = order_by_expert(HAND_IDS, 4)
    tokens, weights = leaf(3, 8, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    permute(tokens, order).sum().backward()
    assert torch.equal(tokens.grad, torch.full_like(tokens, 2.0))
    rows = leaf(6, 8, dtype=dtype)
    unpermute(rows, weights, order).sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


def test_incoming_gradient_is_left_as_it_was() -> None:
    order = order_by_expert(all_on(0, 3), E)
    rows, incoming = leaf(3, 4), torch.randn(3, 4, dtype=torch.float64)
    before = incoming.clone()
    unpermute(rows, torch.full((3, 1), 0.5, dtype=torch.float64), order).backward(incoming)
    assert torch.equal(incoming, before)


def test_two_runs_give_the_same_bits() -> None:
    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        order: RowOrder = order_by_expert(distinct_ids(500, 3), E)
        tokens, weights = torch.randn(500, 16, requires_grad=True), torch.rand(500, 3, requires_grad=True)
        out = unpermute(permute(tokens, order), weights, order)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        return out, tokens.grad, weights.grad

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(40,), (5, 8), (2, 4, 5), (0,)])
def test_count_equals_bincount(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    ids = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    counts = count_by_expert(ids, 7)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=7))
