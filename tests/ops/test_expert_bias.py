"""Biases of experts in row order, against plain indexing."""

import torch

from moefoundry.ops.expert_bias import add_bias, expert_of_row, sum_by_expert, weighted_biases
from moefoundry.ops.permute import order_by_expert

COUNTS = torch.tensor([2, 0, 3, 1])


def test_bias_is_added_to_each_experts_rows_and_its_gradient_is_their_sum() -> None:
    rows, bias = torch.randn(6, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    rows, bias = rows.requires_grad_(), bias.requires_grad_()
    out = add_bias(rows, bias, COUNTS)
    assert torch.equal(out, rows + bias[[0, 0, 2, 2, 2, 3]])
    assert torch.autograd.gradcheck(lambda *x: add_bias(*x, COUNTS), (rows, bias))
    assert add_bias(rows, None, COUNTS) is rows


def test_sums_by_hand_and_of_no_rows() -> None:
    rows = torch.arange(12.0).view(6, 2)
    assert sum_by_expert(rows, COUNTS).tolist() == [[2, 4], [0, 0], [18, 21], [10, 11]]
    assert sum_by_expert(rows[:0], torch.zeros(4, dtype=torch.int64)).tolist() == [[0, 0]] * 4


def test_weighted_biases_are_those_of_each_tokens_kept_slots() -> None:
    ids, kept = torch.tensor([[3, 0], [2, 3], [1, 2]]), torch.tensor([[True, True], [False, True], [False, False]])
    order = order_by_expert(ids, 4, kept)
    assert expert_of_row(order).tolist() == [0, 3, 3]
    weights, bias = torch.rand(3, 2, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    expected = [weights[0, 0] * bias[3] + weights[0, 1] * bias[0], weights[1, 1] * bias[3], torch.zeros(5)]
    torch.testing.assert_close(weighted_biases(weights, bias, order), torch.stack([x.double() for x in expected]))
    inputs = weights.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: weighted_biases(*x, order), inputs)
