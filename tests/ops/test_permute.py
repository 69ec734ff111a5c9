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
    permute_slots,
    sum_rows,
    sum_rows_reference,
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
    assert order.row_of_kept_slot_N.tolist() == [2, 0, 1, 4, 3, 5]
    assert order.first_of_token.tolist() == [0, 2, 4, 6]
    assert order.token_of_row_N.tolist() == [0, 1, 0, 2, 1, 2]
    assert order.tokens_per_expert_E.tolist() == [2, 0, 2, 2]


def test_values_of_the_example_worked_out_by_hand() -> None:
    order = order_by_expert(HAND_IDS, num_experts=4)
    rows = permute(torch.tensor([[10.0], [20.0], [30.0]]), order)
    assert rows.flatten().tolist() == [10, 20, 10, 30, 20, 30]
    # Each row now tells its position; token 0 = 1 * row 2 + 2 * row 0, and so on.
    rows = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]])
    weights_N = permute_slots(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), order)
    assert weights_N.tolist() == [2, 3, 1, 5, 4, 6]
    out = sum_rows(rows * weights_N.unsqueeze(1), order)
    assert out.flatten().tolist() == [2, 3 + 16, 15 + 30]


@pytest.mark.parametrize("ids", ORDERS)
def test_order_is_a_bijection_sorted_by_expert_and_stable(ids: Tensor) -> None:
    order = order_by_expert(ids, E)
    slots = order.slot_of_row_N
    assert slots.dtype == order.row_of_kept_slot_N.dtype == torch.int64
    assert slots.tolist() == sorted(range(ids.numel()), key=lambda slot: (ids.flatten()[slot].item(), slot))
    assert order.row_of_kept_slot_N[slots].tolist() == list(range(ids.numel()))
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


@pytest.mark.parametrize("kept", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("ids", ORDERS)
def test_sum_of_rows_equals_indexing_forward_and_backward(ids: Tensor, kept: bool) -> None:
    order = order_by_expert(ids, E, torch.rand(ids.shape) < 0.5 if kept else None)
    rows, incoming = leaf(len(order.slot_of_row_N), 5), torch.randn(ids.shape[0], 5, dtype=torch.float64)
    out, expected = sum_rows(rows, order), sum_rows_reference(rows, order)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grads = (torch.autograd.grad(total, rows, incoming)[0] for total in (out, expected))
    assert torch.equal(*grads)


@pytest.mark.parametrize("kept", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("ids", ORDERS)
def test_values_of_slots_equal_indexing_forward_and_backward(ids: Tensor, kept: bool) -> None:
    order = order_by_expert(ids, E, torch.rand(ids.shape) < 0.5 if kept else None)
    values = leaf(*ids.shape)
    out, expected = permute_slots(values, order), values.flatten()[order.slot_of_row_N]
    assert torch.equal(out, expected)
    incoming = torch.randn_like(out)
    grads = (torch.autograd.grad(result, values, incoming)[0] for result in (out, expected))
    assert torch.equal(*grads)


def test_gradients_pass_gradcheck() -> None:
    order = order_by_expert(HAND_IDS, 4)
    assert torch.autograd.gradcheck(lambda tokens: permute(tokens, order), leaf(3, 2))
    assert torch.autograd.gradcheck(lambda rows: sum_rows(rows, order), leaf(6, 2))
    assert torch.autograd.gradcheck(lambda values: permute_slots(values, order), leaf(3, 2))


def test_only_kept_slots_have_rows() -> None:
    """Of the example, without token 0's expert 2 and all of token 1."""
    kept = torch.tensor([[False, True], [False, False], [True, True]])
    known, counted = (order_by_expert(HAND_IDS, 4, kept, num_kept) for num_kept in (3, None))
    assert known.slot_of_row_N.tolist() == counted.slot_of_row_N.tolist() == [1, 4, 5]
    assert known.row_of_kept_slot_N.tolist() == [0, 1, 2]
    assert known.first_of_token.tolist() == [0, 1, 1, 3]
    assert known.tokens_per_expert_E.tolist() == [1, 0, 1, 1]
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    assert sum_rows(rows, known).flatten().tolist() == [1, 0, 5]
    assert permute_slots(torch.arange(6.0).view(3, 2), known).tolist() == [1, 4, 5]


def test_a_token_without_rows_gets_nothing_of_others() -> None:
    """Also where these are not finite."""
    order = order_by_expert(HAND_IDS, 4, torch.tensor([[True, True], [False, False], [False, True]]))
    rows = torch.tensor([[float("inf")], [float("nan")], [1.0]])
    assert sum_rows(rows, order)[1:].flatten().tolist() == [0, 1]


def test_the_sum_undoes_permute_where_weights_sum_to_one() -> None:
    ids = distinct_ids(8, 3)
    order = order_by_expert(ids, E)
    tokens, weights = leaf(8, 4), torch.rand(8, 3, dtype=torch.float64).softmax(dim=1)
    rows = permute(tokens, order) * permute_slots(weights, order).unsqueeze(1)
    torch.testing.assert_close(sum_rows(rows, order), tokens, rtol=0, atol=1e-14)


def test_neither_direction_keeps_rows_for_backward() -> None:
    order = order_by_expert(HAND_IDS, 4)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        sum_rows(permute(leaf(3, 8), order), order)
    assert kept == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_expanded_gradients_are_taken(dtype: torch.dtype) -> None:
    order = order_by_expert(HAND_IDS, 4)
    tokens = leaf(3, 8, dtype=dtype)
    permute(tokens, order).sum().backward()
    assert torch.equal(tokens.grad, torch.full_like(tokens, 2.0))
    rows = leaf(6, 8, dtype=dtype)
    sum_rows(rows, order).sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


def test_incoming_gradient_is_left_as_it_was() -> None:
    order = order_by_expert(all_on(0, 3), E)
    rows, incoming = leaf(3, 4), torch.randn(3, 4, dtype=torch.float64)
    before = incoming.clone()
    sum_rows(rows, order).backward(incoming)
    assert torch.equal(incoming, before)


def test_two_runs_give_the_same_bits() -> None:
    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        order: RowOrder = order_by_expert(distinct_ids(500, 3), E)
        tokens, weights = torch.randn(500, 16, requires_grad=True), torch.rand(500, 3, requires_grad=True)
        out = sum_rows(permute(tokens, order) * permute_slots(weights, order).unsqueeze(1), order)
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
