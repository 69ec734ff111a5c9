"""SparseMixer against transformers' function: choices, weights and gradients, given the same random numbers."""

import pytest
import torch
from torch import Tensor
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from moefoundry.config import ConfigError, MoEConfig, SparseMixerConfig, load_recipe
from moefoundry.moe import sparse_mixer
from moefoundry.moe.router import Router
from moefoundry.moe.sparse_mixer import SparseMixer
from tests.conftest import QUICK
from tests.model.tiny import batch, gradients, tiny_config, tiny_model

T, E = 400, 8
MARGINS = pytest.mark.parametrize("margin", [0.01, 0.2, 0.6])


def logits() -> Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def compared(margin: float, training: bool) -> Tensor:
    """The experts, the same on both sides; so are weights and gradients."""
    mixer = SparseMixer(SparseMixerConfig(margin=margin))
    ours, theirs = logits(), logits()
    torch.manual_seed(1)
    weights, ids = mixer.pick(ours, 2, training)
    torch.manual_seed(1)
    expected, chosen = sparsemixer(theirs, jitter_eps=margin, training=training)
    assert torch.equal(ids, chosen)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-7 if training else 1e-14)  # a third is fp32 there
    grad = torch.randn(T, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weights.backward(grad)
    expected.backward(grad)
    assert theirs.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-14)
    return ids


@MARGINS
def test_the_best_of_each_turn_as_transformers(margin: float) -> None:
    ids = compared(margin, training=False)
    assert torch.equal(ids, logits().topk(2).indices)


@MARGINS
def test_drawn_experts_and_their_gradients_as_transformers(margin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def uniform(like: Tensor) -> Tensor:
        drawn.append(torch.rand_like(like))  # theirs draws the second turn's numbers twice
        return drawn[-1].uniform_() if len(drawn) == 2 else drawn[-1]

    monkeypatch.setattr(sparse_mixer, "uniform", uniform)
    ids = compared(margin, training=True)
    share = (ids == logits().topk(2).indices).all(dim=1).double().mean()
    assert share > 0.9 if margin == 0.01 else 0.01 < share < 0.9


def test_any_number_of_experts_none_twice() -> None:
    weights, ids = SparseMixer(SparseMixerConfig(margin=0.5)).pick(logits(), E, training=True)
    assert torch.equal(ids.sort(dim=1).values, torch.arange(E).expand(T, E))
    assert torch.allclose(weights[:, -1], torch.ones(T, dtype=torch.float64)), "the last one is alone"


def test_a_router_draws_in_training_alone_and_only_if_it_is_to() -> None:
    tokens = torch.randn(T, 16, generator=torch.Generator().manual_seed(1))

    def routed(sampled: bool, training: bool) -> Tensor:
        cfg = MoEConfig(num_experts=E, top_k=2, router=SparseMixerConfig(margin=0.4, sampled=sampled))
        torch.manual_seed(0)
        ids: Tensor = Router(16, cfg).train(training)(tokens).topk_expert_ids
        return ids

    best = routed(sampled=False, training=False)
    assert torch.equal(routed(sampled=False, training=True), best)
    assert torch.equal(routed(sampled=True, training=False), best)
    assert not torch.equal(routed(sampled=True, training=True), best)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_activations_draw_the_same(mode: str) -> None:
    cfg = tiny_config(backend="loop")
    cfg.moe.router = SparseMixerConfig(margin=0.5)
    found = []
    for each in ("none", mode):
        model = tiny_model(cfg, activation_checkpointing=each)
        torch.manual_seed(3)
        losses = model(batch(), batch())
        losses.total.backward()
        found.append((losses.total, gradients(model)))
    (plain, expected), (total, grads) = found
    assert torch.equal(total, plain)
    assert all(torch.allclose(grads[name], gradient, atol=1e-7) for name, gradient in expected.items())


def test_nothing_else_chooses_experts_beside_it() -> None:
    router = "model.moe.router={score_function: sparsemixer, num_groups: 4, top_k_groups: 2}"
    with pytest.raises(ConfigError) as error:
        load_recipe(None, [*QUICK, router, "model.moe.balance.bias_update_rate=0.001"])
    assert [problem.path for problem in error.value.problems] == [
        "model.moe.router.num_groups",
        "model.moe.balance.bias_update_rate",
    ]
