"""The router against transformers' routing and its own formulas, token by token."""

import math
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moefoundry.config import Assignment, BalanceConfig, MoEConfig, RouterConfig, ScoreFunction
from moefoundry.moe.router import Router, deal_in_turn
from tests.model.tiny import batch, gradients, tiny_config, tiny_model

T, D, E = 50, 16, 8


def router(top_k: int = 2, **cfg: object) -> Router:
    torch.manual_seed(0)
    return Router(D, MoEConfig(num_experts=E, top_k=top_k, router=RouterConfig(**cfg)))


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


@pytest.mark.parametrize("score_function", ScoreFunction)
@pytest.mark.parametrize(("normalize", "learns"), [(True, False), (False, True)])
def test_a_normalized_top_1_teaches_the_gate_nothing(
    score_function: ScoreFunction, normalize: bool, learns: bool
) -> None:
    """What the recipe's warning says: every weight is 1."""
    module = router(1, score_function=score_function, normalize_topk=normalize)
    (module(tokens()).topk_weights * torch.randn(T, 1, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert (module.gate.weight.grad.abs().max() > 1e-3) == learns


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
    normalize = name.endswith("normalized")
    if name.startswith("qwen3"):
        sizes = {"hidden_size": D, "moe_intermediate_size": 4, "num_experts": E, "num_experts_per_tok": top_k}
        return Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(norm_topk_prob=normalize, **sizes))
    return OlmoeSparseMoeBlock(
        OlmoeConfig(
            hidden_size=D, intermediate_size=4, num_experts=E, num_experts_per_tok=top_k, norm_topk_prob=normalize
        )
    )


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "olmoe_normalized", "qwen3", "qwen3_normalized"])
def test_logits_weights_and_choice_equal_transformers(name: str, top_k: int) -> None:
    """Each expert of their block returns its own unit vector here, so that the block's output *is* the routing."""
    module = router(top_k, normalize_topk=name not in ("olmoe", "qwen3"))
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
    assert {x.dtype for x in routing[:4]} == {torch.float32, torch.int64}
    exact = tokens(dtype).double() @ module.gate.weight.double().T
    torch.testing.assert_close(routing.router_logits.double(), exact, rtol=0, atol=1e-5)


def test_float64_stays_float64() -> None:
    assert {x.dtype for x in router().double()(tokens(torch.float64))[:4]} == {torch.float64, torch.int64}


@pytest.mark.parametrize("normalize", [True, False])
def test_weights_are_differentiable_in_gate_and_tokens(normalize: bool) -> None:
    module = router(2, normalize_topk=normalize).double()
    x = tokens(torch.float64)[:3].requires_grad_()

    def weights(x_TD: Tensor, gate: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"gate.weight": gate}, x_TD).topk_weights

    assert torch.autograd.gradcheck(weights, (x, module.gate.weight))


# ------------------------------------------------------------------------------------- groups, sigmoid, bias: DeepSeek

MANY, WIDE, GROUPS, KEPT_GROUPS, CHOICES = 10_000, 16, 4, 2, 4
V3 = {"score_function": ScoreFunction.sigmoid, "num_groups": GROUPS, "top_k_groups": KEPT_GROUPS, "scale": 2.5}


def wide_router(bias: Tensor | None, **options: object) -> Router:
    """16 experts in 4 groups."""
    torch.manual_seed(0)
    module = Router(D, MoEConfig(num_experts=WIDE, top_k=CHOICES, router=RouterConfig(**options)))
    if bias is not None:
        module.expert_bias.copy_(bias)
    return module


def random_bias(low: float = -0.2, high: float = 0.2) -> Tensor:
    return torch.empty(WIDE).uniform_(low, high, generator=torch.Generator().manual_seed(2))


def many_tokens() -> Tensor:
    return torch.randn(MANY, D, generator=torch.Generator().manual_seed(1))


def brute_force_choice(judged: list[float], best: int) -> tuple[list[int], float]:
    """Experts of the best groups, best first, and by how much the choice is no other."""
    size = WIDE // GROUPS
    group_scores = [sum(sorted(judged[g * size : (g + 1) * size])[-best:]) for g in range(GROUPS)]
    groups = sorted(range(GROUPS), key=lambda g: -group_scores[g])
    allowed = [g * size + member for g in groups[:KEPT_GROUPS] for member in range(size)]
    ranking = sorted(allowed, key=lambda e: -judged[e])
    gaps = [judged[a] - judged[b] for a, b in pairwise(ranking)][:CHOICES]
    gaps.append(group_scores[groups[KEPT_GROUPS - 1]] - group_scores[groups[KEPT_GROUPS]])
    return ranking[:CHOICES], min(gaps)


@pytest.mark.parametrize(("dtype", "margin", "tolerance"), [(torch.float64, 0.0, 1e-13), (torch.float32, 1e-6, 1e-6)])
@pytest.mark.parametrize("score_function", ScoreFunction)
def test_group_limited_routing_equals_brute_force_in_float64(
    score_function: ScoreFunction, dtype: torch.dtype, margin: float, tolerance: float
) -> None:
    """In fp32, choices that hang on less than its rounding are set aside; there are next to none."""
    sigmoid = score_function == ScoreFunction.sigmoid
    bias = random_bias() if sigmoid else torch.zeros(WIDE)
    module = wide_router(bias if sigmoid else None, **{**V3, "score_function": score_function})
    logits = many_tokens().double() @ module.gate.weight.detach().double().T
    routing = module.to(dtype)(many_tokens().to(dtype))
    compared = 0
    rows = zip(logits.tolist(), routing.topk_expert_ids.tolist(), routing.topk_weights.tolist(), strict=True)
    for row, ids, weights in rows:
        scores = [1 / (1 + math.exp(-x)) for x in row] if sigmoid else [math.exp(x) for x in row]
        if not sigmoid:
            scores = [x / sum(scores) for x in scores]
        judged = [score + b for score, b in zip(scores, bias.tolist(), strict=True)]
        expected, gap = brute_force_choice(judged, best=2 if sigmoid else 1)
        if gap <= margin:
            continue
        compared += 1
        assert ids == expected
        chosen = sum(scores[e] for e in expected)
        assert weights == pytest.approx([2.5 * scores[e] / chosen for e in expected], rel=tolerance)
    assert compared >= MANY - (10 if margin else 0)


def deepseek_gate(logits_TE: Tensor, score_func: str, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Weights and experts by the formula of DeepSeek-V3's published inference code (``Gate.forward``)."""
    scores = logits_TE.softmax(dim=-1) if score_func == "softmax" else logits_TE.sigmoid()
    original_scores = scores
    if bias is not None:
        scores = scores + bias
    scores = scores.view(len(scores), GROUPS, -1)
    group_scores = scores.amax(dim=-1) if bias is None else scores.topk(2, dim=-1)[0].sum(dim=-1)
    indices = group_scores.topk(KEPT_GROUPS, dim=-1)[1]
    mask = torch.ones(scores.shape[:2], dtype=torch.bool).scatter(1, indices, False)
    scores = scores.masked_fill(mask.unsqueeze(-1), -math.inf).flatten(1)
    indices = scores.topk(CHOICES, dim=-1)[1]
    weights = original_scores.gather(1, indices)
    if score_func == "sigmoid":
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights * scale, indices


@pytest.mark.parametrize(
    ("score_func", "rate"), [("softmax", 0.0), ("softmax", 1e-3), ("sigmoid", 0.0), ("sigmoid", 1e-3)]
)
def test_groups_are_ranked_as_in_deepseeks_gate(score_func: str, rate: float) -> None:
    """By their best two where there is a bias, whatever the score function; by their best one where there is none."""
    options = {**V3, "score_function": ScoreFunction(score_func), "normalize_topk": score_func == "sigmoid"}
    torch.manual_seed(0)
    balance = BalanceConfig(bias_update_rate=rate)
    module = Router(D, MoEConfig(WIDE, CHOICES, router=RouterConfig(**options), balance=balance)).double()
    bias = None
    if module.expert_bias is not None:
        bias = module.expert_bias.copy_(random_bias())
    else:
        assert (score_func, rate) == ("softmax", 0.0)
    logits = many_tokens().double() @ module.gate.weight.detach().T
    routing = module(many_tokens().double())
    weights, ids = deepseek_gate(logits, score_func, bias, scale=2.5)
    assert torch.equal(routing.topk_expert_ids, ids)
    torch.testing.assert_close(routing.topk_weights, weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (8, 3)])
def test_equals_transformers_deepseek_v3(groups: int, kept: int, normalize: bool) -> None:
    """Where scores plus bias are positive: elsewhere theirs leaves the kept groups (next test)."""
    bias = random_bias(0.0, 0.3)
    module = wide_router(bias, **{**V3, "num_groups": groups, "top_k_groups": kept, "normalize_topk": normalize})
    theirs = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=D, n_routed_experts=WIDE, num_experts_per_tok=CHOICES, routed_scaling_factor=2.5,
            n_group=groups, topk_group=kept, norm_topk_prob=normalize,
        )
    )  # fmt: skip
    theirs.weight = module.gate.weight
    theirs.e_score_correction_bias.copy_(bias)
    ids, weights = theirs(many_tokens())
    routing = module(many_tokens())
    dense = torch.zeros(MANY, WIDE)
    ours = dense.scatter(1, routing.topk_expert_ids, routing.topk_weights)
    torch.testing.assert_close(ours, dense.scatter(1, ids, weights), rtol=0, atol=1e-6)


def test_experts_of_other_groups_are_never_chosen() -> None:
    """Not even where every score plus bias is negative, so that a mask of 0.0 would prefer them."""
    module = wide_router(torch.full((WIDE,), -2.0), **V3)
    groups = module(many_tokens()).topk_expert_ids // (WIDE // GROUPS)
    assert max(len(set(row)) for row in groups.tolist()) <= KEPT_GROUPS


def test_bias_decides_the_choice_but_not_the_weights() -> None:
    plain = wide_router(None, score_function=ScoreFunction.sigmoid, normalize_topk=False)
    biased = wide_router(None, score_function=ScoreFunction.sigmoid, normalize_topk=False)
    biased.expert_bias[5] = 10.0
    before, after = plain(many_tokens()), biased(many_tokens())
    assert (after.topk_expert_ids[:, 0] == 5).all()
    assert not (before.topk_expert_ids == 5).any(dim=1).all()
    assert torch.equal(after.scores, before.scores)
    assert torch.equal(after.topk_weights, after.scores.gather(1, after.topk_expert_ids))


def test_only_routers_that_may_need_a_bias_have_one() -> None:
    def names(score_function: str, rate: float) -> set[str]:
        router_cfg = RouterConfig(score_function=ScoreFunction(score_function))
        cfg = MoEConfig(num_experts=E, router=router_cfg, balance=BalanceConfig(bias_update_rate=rate))
        return set(Router(D, cfg).state_dict())

    assert names("softmax", 0.0) == {"gate.weight"}
    assert names("softmax", 1e-3) == names("sigmoid", 0.0) == names("sigmoid", 1e-3) == {"gate.weight", "expert_bias"}


def test_a_materialized_model_starts_with_a_bias_of_zero() -> None:
    cfg = tiny_config()
    cfg.moe.router.score_function = ScoreFunction.sigmoid
    biases = [buffer for name, buffer in tiny_model(cfg).named_buffers() if name.endswith("expert_bias")]
    assert len(biases) == 2
    for bias in biases:
        assert torch.equal(bias, torch.zeros(4))


def test_sigmoid_scores_that_all_underflow_give_finite_weights_and_gradients() -> None:
    module = wide_router(None, **V3)
    with torch.no_grad():
        module.gate.weight.fill_(-100.0)
    weights = module(torch.ones(3, D)).topk_weights
    weights.sum().backward()
    assert weights.tolist() == [[0.0] * CHOICES] * 3
    assert module.gate.weight.grad.isfinite().all()


def test_group_limited_weights_are_differentiable() -> None:
    module = wide_router(random_bias(), **V3).double()
    x = many_tokens()[:3].double().requires_grad_()

    def weights(x_TD: Tensor, gate: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"gate.weight": gate}, x_TD).topk_weights

    assert torch.autograd.gradcheck(weights, (x, module.gate.weight))


# ---------------------------------------------------------------------------------------------- jitter and assignment


def test_jitter_multiplies_the_gates_input_in_training_only() -> None:
    module = router(input_jitter=0.1)
    with torch.no_grad():
        module.gate.weight.copy_(torch.eye(E, D))  # logits are the first inputs
    torch.manual_seed(0)
    ratio = module(tokens()).router_logits / tokens()[:, :E]
    assert 0.9 <= ratio.min() < 0.92
    assert 1.08 < ratio.max() <= 1.1
    module.eval()
    assert torch.equal(module(tokens()).router_logits, F.linear(tokens(), module.gate.weight))


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_sees_the_same_jitter(mode: str) -> None:
    def step(activation_checkpointing: str) -> dict[str, Tensor]:
        cfg = tiny_config()
        cfg.moe.router.input_jitter = 0.3
        model = tiny_model(cfg, activation_checkpointing=activation_checkpointing)
        torch.manual_seed(0)
        model(batch(), batch()).total.backward()
        return gradients(model)

    expected = step("none")
    for name, grad in step(mode).items():
        assert torch.equal(grad, expected[name]), name


def test_uniform_assignment_deals_experts_in_turn() -> None:
    routing = router(3, assignment=Assignment.uniform)(tokens())
    first = routing.topk_expert_ids.flatten()[:E].tolist()
    assert sorted(first) == list(range(E))
    assert first != sorted(first), "neighbours, which share a rank, would be one token's experts"
    assert routing.topk_expert_ids.flatten()[E : 2 * E].tolist() == first
    counts = routing.topk_expert_ids.flatten().bincount(minlength=E)
    assert counts.max() - counts.min() <= 1
    chosen = routing.scores.gather(1, routing.topk_expert_ids)
    torch.testing.assert_close(routing.topk_weights, chosen / chosen.sum(dim=1, keepdim=True))


def dealt(num_tokens: int, top_k: int, num_experts: int, groups: int, kept: int) -> Tensor:
    cfg = RouterConfig(num_groups=groups, top_k_groups=kept)
    return deal_in_turn(num_tokens, top_k, num_experts, cfg, torch.device("cpu"))


def counted_experts(ids_TK: Tensor, num_experts: int) -> list[int]:
    return ids_TK.flatten().bincount(minlength=num_experts).tolist()


@pytest.mark.parametrize(("groups", "size"), [(1, 12), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_uniform_assignment_keeps_to_the_groups_of_a_token_and_evens_out(groups: int, size: int) -> None:
    for kept, top_k in product(range(1, groups + 1), range(1, 13)):
        if top_k > kept * size:
            continue
        period = 12 // math.gcd(size, top_k)
        ids_TK = dealt(period, top_k, 12, groups, kept)
        assert counted_experts(ids_TK, 12) == [period * top_k // 12] * 12
        for ids in ids_TK.tolist():
            assert len(set(ids)) == top_k
            assert len({expert // size for expert in ids}) == min(kept, top_k)
        assert torch.equal(dealt(2 * period, top_k, 12, groups, kept), ids_TK.repeat(2, 1))


def distinct(ids_TK: Tensor, experts_of_one: int) -> list[int]:
    """On how many nodes or ranks each token's experts lie."""
    return [len(set(places)) for places in (ids_TK // experts_of_one).tolist()]


def test_uniform_assignment_meets_as_many_nodes_and_ranks_as_the_router_of_deepseek_v3() -> None:
    """On 8 nodes of 8 ranks of 4 experts. Dealt, each of a token's 4 groups has 2 of its experts. Scored, it may have
    more or none, so that nodes and ranks are a few percent fewer."""
    sizes = {"num_experts": 256, "top_k": 8}
    cfg = RouterConfig(score_function=ScoreFunction.sigmoid, num_groups=8, top_k_groups=4)
    scored = Router(256, MoEConfig(router=cfg, **sizes))
    torch.nn.init.eye_(scored.gate.weight)  # logits are the inputs
    scores_TE = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))
    scored_TK, dealt_TK = scored(scores_TE).topk_expert_ids, dealt(2000, 8, 256, 8, 4)
    assert set(distinct(dealt_TK, 32)) == {4}
    assert max(distinct(scored_TK, 32)) == 4
    for experts_of_one, tolerance in ((64, 0.05), (32, 0.02), (4, 0.03)):  # nodes of 16 ranks, nodes of 8, ranks
        means = [sum(distinct(ids_TK, experts_of_one)) / 2000 for ids_TK in (dealt_TK, scored_TK)]
        assert means[0] == pytest.approx(means[1], rel=tolerance), experts_of_one
    assert len({tuple(sorted(set(ids))) for ids in (dealt_TK // 32).tolist()}) > 8, "the same groups again and again"


def test_uniform_assignment_of_a_router_with_groups() -> None:
    module = wide_router(None, **V3, assignment=Assignment.uniform)
    routing = module(many_tokens()[:16])
    assert torch.equal(routing.topk_expert_ids, dealt(16, CHOICES, WIDE, GROUPS, KEPT_GROUPS))
    assert counted_experts(routing.topk_expert_ids, WIDE) == [4] * WIDE
