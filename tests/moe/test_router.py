"""The router against transformers' routing and its own formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

from moefoundry.config import RouterConfig
from moefoundry.moe.router import Router

T, D, E = 50, 16, 8


def router(top_k: int = 2, **cfg: object) -> Router:
    torch.manual_seed(0)
    return Router(D, E, top_k, RouterConfig(**cfg))


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("top_k", [1, 2, 5, E])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_weights_are_the_best_scores_normalized_and_scaled(top_k: int, normalize: bool, scale: float) -> None:
    module = router(top_k, normalize_topk=normalize, scale=scale).double()
    routing = module(tokens(torch.float64))
    for t, token in enumerate(tokens(torch.float64)):
        logits = [float(token @ row) for row in module.gate.weight.detach()]
        exponentials = torch.tensor(logits, dtype=torch.float64).exp()
        scores = (exponentials / exponentials.sum()).tolist()
        best = sorted(range(E), key=lambda e: -scores[e])[:top_k]
        divisor = sum(scores[e] for e in best) if normalize else 1.0
        assert routing.router_logits[t].tolist() == pytest.approx(logits, abs=1e-13)
        assert routing.scores[t].tolist() == pytest.approx(scores, abs=1e-13)
        assert routing.topk_expert_ids[t].tolist() == best
        assert routing.topk_weights[t].tolist() == pytest.approx([scale * scores[e] / divisor for e in best], abs=1e-13)


def test_experts_of_a_token_are_distinct_and_best_first() -> None:
    routing = router(5)(tokens())
    assert all(len(set(ids)) == 5 for ids in routing.topk_expert_ids.tolist())
    assert (routing.topk_weights.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_normalized_weights_sum_to_the_scale(scale: float) -> None:
    sums = router(3, normalize_topk=True, scale=scale)(tokens()).topk_weights.sum(dim=1)
    torch.testing.assert_close(sums, torch.full((T,), scale))


def transformers_block(name: str, top_k: int) -> torch.nn.Module:
    if name == "mixtral":
        return MixtralSparseMoeBlock(
            MixtralConfig(hidden_size=D, intermediate_size=4, num_local_experts=E, num_experts_per_tok=top_k)
        )
    normalize = name == "olmoe_normalized"
    return OlmoeSparseMoeBlock(
        OlmoeConfig(
            hidden_size=D, intermediate_size=4, num_experts=E, num_experts_per_tok=top_k, norm_topk_prob=normalize
        )
    )


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "olmoe_normalized"])
def test_logits_weights_and_choice_equal_transformers(name: str, top_k: int) -> None:
    """Each expert of their block returns its own unit vector here, so that the block's output *is* the routing."""
    module = router(top_k, normalize_topk=name != "olmoe")
    block = transformers_block(name, top_k)
    block.gate.weight = module.gate.weight
    for expert, child in enumerate(block.experts):
        child.forward = lambda x, expert=expert: F.one_hot(torch.full((len(x),), expert), D).to(x.dtype)
    out, logits = block(tokens().unsqueeze(0))
    routing = module(tokens())
    ours = torch.zeros(T, D).scatter(1, routing.topk_expert_ids, routing.topk_weights)
    torch.testing.assert_close(routing.router_logits, logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours, out[0], rtol=0, atol=1e-6)
    assert torch.equal(ours != 0, out[0] != 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gate_is_computed_in_fp32_whatever_the_tokens_are(dtype: torch.dtype) -> None:
    module = router().to(dtype)
    routing = module(tokens(dtype))
    assert {x.dtype for x in routing} == {torch.float32, torch.int64}
    exact = tokens(dtype).double() @ module.gate.weight.double().T
    torch.testing.assert_close(routing.router_logits.double(), exact, rtol=0, atol=1e-5)


def test_float64_stays_float64() -> None:
    assert {x.dtype for x in router().double()(tokens(torch.float64))} == {torch.float64, torch.int64}


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_are_differentiable_in_gate_and_tokens(normalize: bool) -> None:
    module = router(2, normalize_topk=normalize).double()
    x = tokens(torch.float64)[:3].requires_grad_()

    def weights(x_TD: Tensor, gate: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"gate.weight": gate}, x_TD).topk_weights

    assert torch.autograd.gradcheck(weights, (x, module.gate.weight))
