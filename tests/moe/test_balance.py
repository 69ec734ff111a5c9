"""Balance loss and z-loss against their formulas in plain Python, and under every split into micro-batches."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moefoundry.config import MoEConfig, RouterConfig, ScoreFunction
from moefoundry.moe.balance import balance_loss, expert_bias_step, max_violation, router_entropy, z_loss
from moefoundry.moe.router import Router, Routing

B, S, D, E, K = 6, 5, 8, 4, 2


def brute_force_balance(logits: Tensor, ids: list[list[int]], num_segments: int) -> Tensor:
    """``sum_e f_e P_e`` of each segment, one token and one expert at a time; differentiable in ``logits``."""
    tokens, experts = logits.shape
    length, top_k = tokens // num_segments, len(ids[0])
    total = torch.zeros((), dtype=logits.dtype)
    for segment in range(num_segments):
        members = range(segment * length, (segment + 1) * length)
        for expert in range(experts):
            routed = sum(ids[t].count(expert) for t in members)
            mean_score = sum(logits[t, expert].exp() / logits[t].exp().sum() for t in members) / length
            total = total + experts / (top_k * length) * routed * mean_score
    return total / num_segments


def brute_force_z(logits: Tensor) -> Tensor:
    return sum(row.exp().sum().log() ** 2 for row in logits) / len(logits)


def router(top_k: int = K) -> Router:
    torch.manual_seed(0)
    return Router(D, MoEConfig(num_experts=E, top_k=top_k)).double()


def tokens(num: int = B * S) -> Tensor:
    return torch.randn(num, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def balance_of(routing: Routing, num_segments: int) -> Tensor:
    return balance_loss(routing.scores, routing.topk_expert_ids, num_segments)


@pytest.mark.parametrize("num_segments", [1, B, B * S], ids=["micro_batch", "sequence", "token"])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_balance_loss_and_its_gate_gradient_equal_the_formula(top_k: int, num_segments: int) -> None:
    gate = (module := router(top_k)).gate.weight
    routing = module(tokens())
    got = balance_of(routing, num_segments)
    expected = brute_force_balance(tokens() @ gate.T, routing.topk_expert_ids.tolist(), num_segments)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, gate), torch.autograd.grad(expected, gate), rtol=0, atol=1e-12)


def test_z_loss_and_its_gate_gradient_equal_the_formula() -> None:
    gate = (module := router()).gate.weight
    got, expected = z_loss(module(tokens()).router_logits), brute_force_z(tokens() @ gate.T)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(got, gate), torch.autograd.grad(expected, gate), rtol=0, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_of_one_segment_equals_transformers(top_k: int) -> None:
    routing = router(top_k)(tokens())
    theirs = load_balancing_loss_func((routing.router_logits,), num_experts=E, top_k=top_k)
    # Theirs sums over the K choices, and counts in fp32.
    torch.testing.assert_close(balance_of(routing, 1), theirs / top_k, rtol=0, atol=1e-6)


def test_balance_loss_passes_gradcheck_for_scores_that_do_not_sum_to_one() -> None:
    scores = torch.rand(6, E, dtype=torch.float64).add(0.1).requires_grad_()
    ids = scores.topk(K).indices
    assert torch.autograd.gradcheck(lambda x: balance_loss(x, ids, 2), scores)


@pytest.mark.parametrize("num_segments", [1, 2, 4])
def test_perfect_balance_is_exactly_one(num_segments: int) -> None:
    ids = torch.tensor([[0, 1], [2, 3]]).repeat(4, 1)
    assert balance_loss(torch.full((8, E), 1 / E), ids, num_segments).item() == 1.0


@pytest.mark.parametrize(("top_k", "expected"), [(1, E), (2, E / 2), (E, 1)])
def test_collapse_onto_the_same_experts_is_e_over_k(top_k: int, expected: float) -> None:
    scores = torch.zeros(8, E)
    scores[:, :top_k] = 1 / top_k
    ids = torch.arange(top_k).expand(8, top_k)
    assert balance_loss(scores, ids, num_segments=2).item() == pytest.approx(expected, rel=1e-6)


def test_balance_loss_does_not_depend_on_the_scale_of_scores() -> None:
    routing = router()(tokens())
    scaled = balance_loss(routing.scores * 7, routing.topk_expert_ids, B)
    torch.testing.assert_close(scaled, balance_of(routing, B), rtol=0, atol=1e-14)


def test_sequence_scope_is_the_mean_over_sequences() -> None:
    module = router()
    each = [balance_of(module(sequence), 1) for sequence in tokens().split(S)]
    torch.testing.assert_close(balance_of(module(tokens()), B), torch.stack(each).mean(), rtol=0, atol=1e-14)


def test_sequence_scope_sees_imbalance_that_a_whole_batch_hides() -> None:
    ids = torch.tensor([[0]] * 4 + [[1]] * 4)
    scores = torch.nn.functional.one_hot(ids.flatten(), 2).float()
    assert balance_loss(scores, ids, 1).item() == 1.0
    assert balance_loss(scores, ids, 2).item() == 2.0


SPLITS = [[6], [3, 3], [1] * 6, [1, 5], [4, 2], [2, 1, 3]]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", ["balance", "z"])
def test_token_weighted_mean_over_micro_batches_is_the_whole_batch(name: str, split: list[int]) -> None:
    gate = (module := router()).gate.weight

    def loss(x_TD: Tensor) -> Tensor:
        routing = module(x_TD)
        return balance_of(routing, len(x_TD) // S) if name == "balance" else z_loss(routing.router_logits)

    whole = loss(tokens())
    parts = sum(loss(part) * len(part) / (B * S) for part in tokens().split([S * n for n in split]))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(parts, gate), torch.autograd.grad(whole, gate), rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_segments", [4, 7])
def test_segments_must_divide_the_tokens(num_segments: int) -> None:
    with pytest.raises(ValueError, match=f"^30 tokens do not split into {num_segments} segments$"):
        balance_of(router()(tokens()), num_segments)


def test_balance_gradient_pushes_an_overused_expert_down() -> None:
    logits = torch.tensor([[2.0, 0.0]] * 4, requires_grad=True)
    balance_loss(logits.softmax(dim=-1), torch.zeros(4, 1, dtype=torch.int64), 1).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1] < 0).all()


def test_z_loss_of_zero_logits_is_log_e_squared() -> None:
    assert z_loss(torch.zeros(3, E)).item() == pytest.approx(math.log(E) ** 2)


def test_z_loss_of_large_logits_stays_finite() -> None:
    logits = torch.tensor([[1e4, 0.0], [-1e4, -1e4]], requires_grad=True)
    z_loss(logits).backward()
    assert logits.grad.isfinite().all()


def test_entropy_of_uniform_certain_and_halved_scores() -> None:
    assert router_entropy(torch.full((3, E), 0.7)).item() == pytest.approx(math.log(E))
    assert router_entropy(torch.eye(E)).item() == 0
    assert router_entropy(torch.tensor([[0.5, 0.5, 0.0, 0.0]])).item() == pytest.approx(math.log(2))


def test_max_violation_is_of_each_layer() -> None:
    load = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0], [8, 4, 4, 4]])
    assert max_violation(load).tolist() == pytest.approx([0.0, 3.0, 0.6])


def test_balance_loss_of_sigmoid_scores_takes_them_normalized() -> None:
    cfg = MoEConfig(num_experts=E, top_k=K, router=RouterConfig(score_function=ScoreFunction.sigmoid))
    torch.manual_seed(0)
    routing = Router(D, cfg).double()(tokens())
    # softmax(log p) is p / sum(p): the brute force takes logits of the normalized scores
    expected = brute_force_balance(routing.scores.log(), routing.topk_expert_ids.tolist(), B)
    torch.testing.assert_close(balance_of(routing, B), expected, rtol=0, atol=1e-12)


def test_expert_bias_moves_against_the_load() -> None:
    """Means are 3 and 7/3, which no float is: only integers compare them exactly."""
    load = torch.tensor([[5, 3, 1], [2, 3, 2]])
    assert expert_bias_step(load, 0.5).tolist() == [[-0.5, 0.0, 0.5], [0.5, -0.5, 0.5]]
    assert expert_bias_step(load, 0.5).dtype == torch.float32
    assert expert_bias_step(torch.full((7,), 3), 0.5).tolist() == [0.0] * 7
