"""The checks of ``test_router_kernels.py``: run in Triton's interpreter by a process of its own, or on a GPU here."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from moefoundry.config import AuxLossScope, BalanceConfig, MoEConfig, RouterConfig
from moefoundry.moe.balance import statistics
from moefoundry.moe.layer import MoELayer
from moefoundry.moe.router import Router, Routing, keep_best_groups
from moefoundry.ops.router_kernels import function
from moefoundry.ops.split_kernel import stack_parts_triton
from moefoundry.ops.wide_linear import stack_parts

PARTS = ("weights", "scores", "statistics")
"""Of the results, that a loss is computed from."""


class Case(NamedTuple):
    """A router of T tokens in some segments."""

    tokens: int
    experts: int
    top_k: int
    score_function: str
    normalize: bool = True
    bias: bool = False
    segments: int = 1
    groups: int = 1
    top_k_groups: int = 1


def check_routing(device: str, case: Case) -> None:
    """Ids equal, the rest and the logits' gradient against float64, for each part of the results and all of them."""
    module = router(case).to(device)
    logits_TE = settled(module, 2 * random(device, case.tokens, case.experts))
    plain = module(logits_TE)
    exact = module.double()(logits_TE.double())
    routed = by_kernel(module.float(), logits_TE, case.segments)
    assert torch.equal(routed.topk_expert_ids, plain.topk_expert_ids)
    assert torch.equal(routed.topk_expert_ids, exact.topk_expert_ids)
    assert routed.means is not None
    for name in ("scores", "topk_weights"):
        assert getattr(routed, name).dtype == torch.float32
        assert_close(getattr(routed, name), getattr(exact, name))
    ours, theirs = (statistics(routing, case.segments, None) for routing in (routed, exact))
    for name, value, expected in zip(ours._fields, ours, theirs, strict=True):
        assert value.shape == expected.shape, name
        assert_close(value, expected)
    for parts in (*((part,) for part in PARTS), PARTS):
        assert_close(gradient(module, logits_TE, case, parts, True), gradient(module, logits_TE, case, parts, False))


def check_ties(device: str, softmax: bool, bias: bool) -> None:
    """Equal logits, of both zeros too, in the order of their experts; ids are valid for NaN and infinite logits."""
    logits_TE = random(device, 9, 21).mul(2).round().div(2)
    logits_TE[0], logits_TE[1, ::2] = 0.0, -0.0
    logits_TE[2] = logits_TE[3] = torch.nan
    logits_TE[3, 5:], logits_TE[4, 3], logits_TE[5] = 1.0, torch.inf, -torch.inf
    bias_E = torch.zeros(21, device=device) if bias else None
    routed = function.choose_experts(logits_TE, bias_E, function.Choice(6, softmax, True, 1.0, 1))
    for ids_K in routed.ids_TK.tolist():
        assert len(set(ids_K)) == 6
        assert 0 <= min(ids_K) <= max(ids_K) < 21
    compared = [t for t in range(9) if not (softmax and bias and t in (4, 5))]  # scores of these are all NaN
    order_TE = logits_TE.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(routed.ids_TK[compared], order_TE[compared, :6])
    exact_TE = logits_TE.softmax(dim=1) if softmax else logits_TE.sigmoid()
    torch.testing.assert_close(routed.scores_TE, exact_TE, rtol=1e-6, atol=1e-7, equal_nan=True)


def check_groups(device: str, bias: bool) -> None:
    """A token has distinct experts of two groups whatever its scores are, of equal ones the first; else as plain."""
    logits_TE = random(device, 12, 24).mul(2).round().div(2)
    logits_TE[0], logits_TE[1, ::2], logits_TE[2, :8] = 0.0, -0.0, torch.nan
    logits_TE[3], logits_TE[4, 5], logits_TE[5] = torch.nan, torch.inf, -torch.inf
    bias_E = torch.linspace(0, 1e-3, 24, device=device) if bias else None
    routed = function.choose_experts(logits_TE, bias_E, function.Choice(5, False, True, 1.0, 1, 6, 2, 2 if bias else 1))
    for ids_K in routed.ids_TK.tolist():
        assert len(set(ids_K)) == 5
        assert len({expert // 4 for expert in ids_K}) == 2
    scores_TE = logits_TE[6:].sigmoid() + (0 if bias_E is None else bias_E)
    if bias:  # without, some are equal
        limited_TE = keep_best_groups(scores_TE, 6, 2, best=2)
        assert torch.equal(routed.ids_TK[6:], limited_TE.topk(5).indices)
    assert bias or routed.ids_TK[0].tolist() == [0, 1, 2, 3, 4]


def check_layer(device: str, scope: str, padded: bool) -> None:
    """A layer, of whose tokens the last may be padding, gives what it gives by operators, gradients too."""
    cfg = MoEConfig(
        num_experts=12,
        top_k=3,
        expert_hidden_size=8,
        num_shared_experts=0,
        router=RouterConfig(score_function="sigmoid", scale=2.5),
        balance=BalanceConfig(aux_loss_scope=AuxLossScope(scope)),
    )
    torch.manual_seed(0)
    layer = MoELayer(16, cfg).to(device).train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BSD, grad_BSD = random(device, 3, 10, 16), random(device, 3, 10, 16, seed=1)
    real_T = torch.arange(27, device=device) if padded else None

    def run() -> list[Tensor]:
        layer.zero_grad(set_to_none=True)
        out_BSD, stats = layer(x_BSD, real_T)
        (stats.balance_loss + 0.1 * stats.z_loss + (out_BSD * grad_BSD).sum() / 30).backward()
        values = [out_BSD, *(value for value in stats if value is not None)]
        return [*values, *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None)]

    plain = run()
    with mock.patch("moefoundry.moe.router.router_kernels", return_value=function):
        fused = run()
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


def check_split(device: str) -> None:
    """The parts of values and of NaN are those of operators, bit for bit, and add up to them."""
    x = random(device, 70, 45) * 10 ** random(device, 70, 45, seed=1)
    x[3, 4], x[5] = torch.nan, 0.0
    for number in (3, 4, 5):
        for dim in (0, 1):
            got = stack_parts_triton(x, number, dim)
            assert got.dtype == torch.bfloat16
            torch.testing.assert_close(got, stack_parts(x, number, dim), rtol=0, atol=0, equal_nan=True)
    rest, low, high = (part.float() for part in stack_parts_triton(x, 3, 0).chunk(3))
    torch.testing.assert_close(rest + low + high, x, rtol=2**-23, atol=0, equal_nan=True)
    assert stack_parts_triton(x[:0], 3, 0).shape == (0, 45)


def router(case: Case) -> Router:
    """A router whose tokens are its logits."""
    cfg = MoEConfig(
        num_experts=case.experts,
        top_k=case.top_k,
        router=RouterConfig(
            score_function=case.score_function,
            normalize_topk=case.normalize,
            scale=2.5,
            num_groups=case.groups,
            top_k_groups=case.top_k_groups,
        ),
        balance=BalanceConfig(bias_update_rate=0.1 if case.bias else 0.0),
    )
    module = Router(1, cfg)
    module.product = lambda logits_TE, weight: (logits_TE, logits_TE)
    if module.expert_bias is not None and case.bias:
        module.expert_bias.copy_(0.1 * random("cpu", case.experts))
    elif case.score_function == "softmax":
        module.expert_bias = None
    return module


def settled(module: Router, logits_TE: Tensor) -> Tensor:
    """Replace tokens whose experts would be others if scores were rounded otherwise."""
    wide_TE = logits_TE.double()
    ids_TK = module.double()(wide_TE).topk_expert_ids
    unsettled_T = torch.zeros(len(logits_TE), dtype=torch.bool, device=logits_TE.device)
    for seed in range(8):
        rounded_TE = wide_TE * (1 + 3e-6 * random(str(logits_TE.device), *logits_TE.shape, seed=10 + seed))
        unsettled_T |= (module(rounded_TE).topk_expert_ids != ids_TK).any(dim=1)
    module.float()
    assert unsettled_T.double().mean() < 0.05
    logits_TE[unsettled_T] = logits_TE[~unsettled_T][: unsettled_T.sum()]
    return logits_TE


def by_kernel(module: Router, logits_TE: Tensor, segments: int) -> Routing:
    with mock.patch("moefoundry.moe.router.router_kernels", return_value=function):
        return module(logits_TE, segments)


def gradient(module: Router, logits_TE: Tensor, case: Case, parts: tuple[str, ...], fused: bool) -> Tensor:
    """The logits' gradient of a loss from some results: by the kernels, or in float64 by operators."""
    leaf = (logits_TE if fused else logits_TE.double()).detach().requires_grad_()
    routing: Any = by_kernel(module, leaf, case.segments) if fused else module(leaf)
    found = statistics(routing, case.segments, None)

    def weighted(values: Tensor) -> Tensor:
        return (values * random(str(values.device), *values.shape, seed=2)).sum()

    losses = {
        "weights": weighted(routing.topk_weights),
        "scores": weighted(routing.scores),
        "statistics": found.balance_loss + 0.3 * found.z_loss + weighted(found.mean_probs),
    }
    sum(losses[part] for part in parts).backward()  # type: ignore[union-attr]
    assert leaf.grad is not None
    return leaf.grad


def random(device: str, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_close(got: Tensor, exact: Tensor) -> None:
    """Up to a few roundings of the largest value in fp32; a gradient may be 0 by what cancels."""
    error = (got.double() - exact.double()).abs().max() if got.numel() else 0.0
    assert error <= 2e-6 * exact.double().abs().max() + 1e-8, f"{error} of {exact.abs().max()}"
