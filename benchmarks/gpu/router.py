"""The gate's product, then from logits choice of experts, means over tokens, and order of rows.

Each by PyTorch's operators and by our kernels. Most take the device less time than the host needs to issue them, so
that the time between events is the host's: that of the kernels is measured, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.figures import Figures, NotRunError, Part
from benchmarks.gpu.layer import error, kernels_chosen
from benchmarks.gpu.steps import Options
from benchmarks.gpu.timing import host_syncs, timed_with_kernels
from moefoundry.config import MoEConfig, RouterConfig
from moefoundry.moe.balance import statistics
from moefoundry.moe.router import Router
from moefoundry.ops.permute import order_by_expert
from moefoundry.ops.wide_linear import wide_linear


class Sizes(NamedTuple):
    """Tokens, experts and chosen experts; the score function; groups of experts, and how many a token reaches."""

    tokens: int
    experts: int
    top_k: int
    scores: str
    groups: int = 1
    top_k_groups: int = 1


SIZES = (
    Sizes(24576, 128, 8, "softmax"),
    Sizes(32768, 128, 8, "softmax"),
    Sizes(16384, 256, 8, "sigmoid"),
    Sizes(16384, 512, 10, "softmax"),
    Sizes(16384, 256, 8, "sigmoid", 8, 4),  # DeepSeek-V3's
)
GATES = ((24576, 1536, 128), (32768, 4096, 128), (16384, 7168, 256), (4096, 7168, 256))
"""Tokens, width and experts."""
TINY_GATES = ((64, 32, 8),)
TINY = (Sizes(64, 8, 2, "softmax"), Sizes(64, 8, 2, "sigmoid", 4, 2))


def run(figures: Figures, options: Options) -> None:
    """Every size by operators and by the kernel."""
    for sizes in TINY if options.tiny else SIZES:
        limited = f", {sizes.top_k_groups} of {sizes.groups} groups" if sizes.groups > 1 else ""
        name = f"T{sizes.tokens} E{sizes.experts} K{sizes.top_k} {sizes.scores}{limited}"
        figures.run(f"{name}, operators", measure, sizes, False, options)
        figures.run(f"{name}, kernel", measure, sizes, True, options, kind="the router's kernels")

    for tokens, width, experts in TINY_GATES if options.tiny else GATES:
        for fused in (False, True):
            name = f"gate T{tokens} D{width} E{experts}, {'kernel' if fused else 'operators'}"
            kind = "the gate's kernels" if fused else None
            figures.run(name, measure_gate, (tokens, width, experts), fused, options, kind=kind)


def measure_gate(part: Part, sizes: tuple[int, int, int], fused: bool, options: Options) -> None:
    """Logits; both passes, with a gradient that the tokens have from experts; both errors beside float64."""
    if fused and options.device != "cuda":
        raise NotRunError("the kernel needs a GPU")
    tokens, width, experts = sizes
    with torch.device(options.device):
        x_TD = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        weight_ED = torch.randn(experts, width).mul_(width**-0.5).requires_grad_()
        grads = torch.randn(tokens, experts), torch.randn(tokens, width, dtype=torch.bfloat16)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(wide_linear(x_TD, weight_ED), (x_TD, weight_ED), grads)

    with kernels_chosen(fused):
        exact_TE = x_TD.detach().double() @ weight_ED.detach().double().T
        part.put(logits_error=error(wide_linear(x_TD, weight_ED)[0].detach(), exact_TE))
        exact_TD = grads[0].double() @ weight_ED.detach().double() + grads[1].double()
        part.put(tokens_gradient_error=error(both()[0], exact_TD))
        part.put(forward=timed_with_kernels(lambda: wide_linear(x_TD, weight_ED), options.device))
        part.put(both=timed_with_kernels(both, options.device))


def measure(part: Part, sizes: Sizes, fused: bool, options: Options) -> None:
    """Forward and backward, with balance loss and z-loss, and the order; ids and order beside those of operators."""
    if fused and options.device != "cuda":
        raise NotRunError("the kernel needs a GPU")
    router = Router(1, config(sizes)).to(options.device)
    router.product = lambda logits_TE, weight: (logits_TE, logits_TE)
    logits_TE = torch.randn(sizes.tokens, sizes.experts, device=options.device).requires_grad_()
    grad_TK = torch.randn(sizes.tokens, sizes.top_k, device=options.device)

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        routing = router(logits_TE)
        found = statistics(routing, 1, None)
        return routing.topk_weights, found.balance_loss + 1e-3 * found.z_loss, routing.topk_expert_ids

    def both() -> Any:
        weights_TK, loss, _ = forward()
        return torch.autograd.grad([weights_TK, loss], logits_TE, [grad_TK, torch.ones_like(loss)])

    plain_ids_TK = forward()[2]
    plain = order_by_expert(plain_ids_TK, sizes.experts).tensors
    with kernels_chosen(fused):
        part.put(same_ids=round((forward()[2] == plain_ids_TK).float().mean().item(), 6))
        part.put(forward=timed_with_kernels(forward, options.device))
        part.put(both=timed_with_kernels(both, options.device))
        part.put(syncs=host_syncs(both, options.device))
        ordered = order_by_expert(plain_ids_TK, sizes.experts).tensors
        part.put(same_order=all(torch.equal(ours, theirs) for ours, theirs in zip(ordered, plain, strict=True)))
        part.put(order=timed_with_kernels(lambda: order_by_expert(plain_ids_TK, sizes.experts), options.device))


def config(sizes: Sizes) -> MoEConfig:
    """The layer's configuration, of which the router's part counts."""
    groups = {"num_groups": sizes.groups, "top_k_groups": sizes.top_k_groups}
    scores = RouterConfig(score_function=sizes.scores, **groups)
    return MoEConfig(num_experts=sizes.experts, top_k=sizes.top_k, router=scores)
