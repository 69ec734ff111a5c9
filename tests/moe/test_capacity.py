"""Capacity: the layer against a float64 loop over experts and tokens, in output, gradients and rows multiplied."""

import math

import pytest
import torch
from torch import Tensor, nn

from moefoundry.config import MoEConfig, RouterConfig, ScoreFunction
from moefoundry.moe.layer import MoELayer, RoutingStats
from moefoundry.moe.router import within_capacity
from tests.distributed import run_distributed

B, S, D, F, E, K = 3, 10, 16, 12, 6, 2
T = B * S
FACTORS = [0.1, 0.5, 1.0, 1.25, 2.0, 10.0]


def layer(capacity_factor: float | None, backend: str = "loop", dtype: torch.dtype = torch.float64) -> MoELayer:
    cfg = MoEConfig(
        num_experts=E,
        top_k=K,
        expert_hidden_size=F,
        num_shared_experts=1,
        router=RouterConfig(score_function=ScoreFunction.sigmoid, scale=1.5),
        capacity_factor=capacity_factor,
        backend=backend,
    )
    module = MoELayer(D, cfg)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4, generator=generator)
    return module.to(dtype)


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def naive_swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    hidden = gate @ x
    return down @ (hidden * hidden.sigmoid() * (up @ x))


def naive_layer(x_BSD: Tensor, p: dict[str, Tensor], capacity_factor: float) -> tuple[Tensor, int]:
    """The output, and how many choices were dropped: every expert takes its best tokens, one after the other."""
    x_TD = x_BSD.reshape(-1, D)
    scores = [(p["router.gate.weight"] @ x).sigmoid() for x in x_TD]
    chosen = [sorted(range(E), key=lambda e, row=row: -row[e].item())[:K] for row in scores]
    capacity = math.ceil(capacity_factor * len(x_TD) * K / E)
    out = [naive_swiglu(x, *(p[f"shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down"))) for x in x_TD]
    dropped = 0
    for e in range(E):
        asking = sorted((t for t in range(len(x_TD)) if e in chosen[t]), key=lambda t, e=e: -scores[t][e].item())
        dropped += max(0, len(asking) - capacity)
        for t in asking[:capacity]:
            weight = 1.5 * scores[t][e] / sum(scores[t][other] for other in chosen[t])
            out[t] = out[t] + weight * naive_swiglu(
                x_TD[t], *(p[f"experts.{n}_proj"][e] for n in ("gate", "up", "down"))
            )
    return torch.stack(out).view_as(x_BSD), dropped


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(
    ("backend", "dtype", "atol"),
    [("loop", torch.float64, 1e-10), ("loop", torch.float32, 2e-4), ("grouped_mm", torch.float32, 2e-4)],
    ids=["float64", "loop_fp32", "grouped_mm_fp32"],
)
def test_output_gradients_and_rows_equal_brute_force(
    factor: float, backend: str, dtype: torch.dtype, atol: float
) -> None:
    module, x_BSD = layer(factor, backend, dtype), tokens(dtype)
    rows: list[int] = []
    module.experts.register_forward_pre_hook(lambda _, args: rows.append(len(args[2].slot_of_row_N)))
    out, stats = module(x_BSD)
    exact = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    exact_x = x_BSD.detach().double().requires_grad_()
    expected, dropped = naive_layer(exact_x, exact, factor)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=atol)
    assert stats.dropped_slots == dropped
    assert rows == [T * K - dropped], "dropped rows are not multiplied"
    assert stats.tokens_per_expert.sum() == T * K, "loads are those that were asked for"
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = torch.autograd.grad(out, [x_BSD, *module.parameters()], incoming.to(dtype))
    want = torch.autograd.grad(expected, [exact_x, *exact.values()], incoming)
    for name, g, w in zip(["x", *exact], got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=0, atol=10 * atol, msg=lambda text, name=name: f"{name}: {text}")


def test_the_factors_above_drop_from_nearly_all_to_none() -> None:
    fractions = [layer(factor)(tokens())[1].dropped_slots.item() / (T * K) for factor in FACTORS]
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] > 0.8
    assert 0 < fractions[2] < 0.5
    assert fractions[-1] == 0


def test_enough_capacity_changes_no_bit() -> None:
    def run(capacity_factor: float | None) -> list[Tensor]:
        module, x_BSD = layer(capacity_factor, "grouped_mm", torch.float32), tokens(torch.float32)
        out = module(x_BSD)[0]
        out.square().sum().backward()
        return [out, x_BSD.grad, *(p.grad for p in module.parameters())]

    for limited, dropless in zip(run(float(E)), run(None), strict=True):
        assert torch.equal(limited, dropless)


def test_evaluation_drops_nothing() -> None:
    module, dropless = layer(0.25).eval(), layer(None).eval()
    out, stats = module(tokens())
    assert stats.dropped_slots == 0
    assert torch.equal(out, dropless(tokens())[0])


def test_best_scores_stay_and_of_equal_ones_the_first() -> None:
    """Expert 0 is asked for by tokens 0 to 3, expert 1 by 4 and 5; ceil(1.0 * 6 / 2) = 3 places each."""
    scores = torch.tensor([[0.7, 0.1], [0.5, 0.1], [0.9, 0.1], [0.5, 0.1], [0.1, 0.2], [0.1, 0.2]])
    ids = torch.tensor([[0], [0], [0], [0], [1], [1]])
    assert within_capacity(scores, ids, 1.0).flatten().tolist() == [True, True, True, False, True, True]
    assert within_capacity(scores, ids, 0.6).flatten().tolist() == [True, False, True, False, True, True]
    assert within_capacity(scores, ids, 0.3).flatten().tolist() == [False, False, True, False, True, False]


def test_many_equal_scores_keep_the_first_tokens() -> None:
    kept = within_capacity(torch.full((5000, 2), 0.5), torch.zeros(5000, 1, dtype=torch.int64), 0.5).flatten()
    assert kept.tolist() == [True] * 1250 + [False] * 3750


def test_the_fused_cpu_function_leaves_out_the_same_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for threshold in (2**60, 0):
        monkeypatch.setattr("moefoundry.ops.expert_mixture.PAYS_FROM_BYTES", threshold)
        module, x_BSD = layer(0.5, "auto", torch.float32), tokens(torch.float32).detach().requires_grad_()
        out = module(x_BSD)[0]
        out.square().sum().backward()
        runs.append([out.detach(), x_BSD.grad, *(parameter.grad for parameter in module.parameters())])
    for plain, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def on_ranks(capacity_factor: float) -> tuple[Tensor, Tensor, RoutingStats]:
    """The layer with its experts on all ranks, on the tokens of this one."""
    import torch.distributed as dist

    from moefoundry.moe.dispatch import AllToAllDispatcher

    rank, ranks = dist.get_rank(), dist.get_world_size()
    module = layer(capacity_factor)
    share = slice(rank * E // ranks, (rank + 1) * E // ranks)
    for name, weight in list(module.experts.named_parameters()):
        setattr(module.experts, name, nn.Parameter(weight.detach()[share]))
    module.dispatcher = AllToAllDispatcher(E, dist.group.WORLD)
    x_BSD = tokens().detach()[rank : rank + 1].requires_grad_()
    out, stats = module(x_BSD)
    out.square().sum().backward()
    return out, x_BSD.grad, stats


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_has_the_capacity_of_its_own_tokens(ranks: int) -> None:
    for rank, (out, grad, stats) in enumerate(run_distributed(on_ranks, ranks, 0.8)):
        x_BSD = tokens().detach()[rank : rank + 1].requires_grad_()
        expected, expected_stats = layer(0.8)(x_BSD)
        expected.square().sum().backward()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(grad, x_BSD.grad, rtol=0, atol=1e-11)
        assert stats.dropped_slots == expected_stats.dropped_slots > 0
