"""The checks of ``test_operators.py``: run in Triton's interpreter by a process of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from moefoundry.config import MoEConfig, NormPosition
from moefoundry.moe.layer import MoELayer
from moefoundry.ops.fused_experts import kernels, launches
from moefoundry.ops.fused_experts.operators import BACKWARD, DOWN_SUM, UP_SWIGLU
from moefoundry.ops.permute import order_by_expert
from tests.model.tiny import batch, gradients, tiny_config, tiny_model
from tests.ops.fused_experts.checks import CLAMPED, SMALL, routed

HALF = torch.float16


def check_operators(biased: bool) -> None:
    """What torch asks of an operator: its schema, its results' shapes and strides without values, its compilation."""
    torch.manual_seed(0)
    tokens, width, hidden, experts, top_k = 9, 8, 16, 3, 2
    order = order_by_expert(routed(tokens, experts, top_k), experts)
    tokens_TD, grad_TD = torch.randn(tokens, width, dtype=HALF), torch.randn(tokens, width, dtype=HALF)
    rows = order.token_of_row_N.to(torch.int32), torch.rand(tokens * top_k)
    gate, up, down = (
        torch.randn(experts, *size, dtype=HALF) for size in ((hidden, width), (hidden, width), (width, hidden))
    )
    biases = [torch.randn(experts, hidden, dtype=HALF) if biased else None for _ in range(2)]
    hidden_NF = torch.empty(tokens * top_k, hidden, dtype=HALF)
    with mock.patch.dict(launches.CONFIGS, SMALL):
        forward = tokens_TD, *rows, gate, up, *biases, hidden_NF, order.tokens_per_expert_E, *CLAMPED
        torch.library.opcheck(UP_SWIGLU, forward)
        gate_up, *tiles = UP_SWIGLU(*forward)
        torch.library.opcheck(DOWN_SUM, (hidden_NF, down, tiles, order.tensors, top_k))
        operands = tokens_TD, *rows, gate, up, down, gate_up, tiles, order.tensors, top_k, *CLAMPED
        torch.library.opcheck(BACKWARD, (grad_TD, *operands, biased))


class Counting:
    """The kernels, whose launches are counted by name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        self.counts[name] += 1
        return getattr(kernels, name)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    with mock.patch.object(launches, "kernels", Counting()) as counting:
        yield counting.counts


def step(mode: str, position: NormPosition) -> tuple[list[Counter[str]], dict[str, Tensor]]:
    """Launches of the forward and of the backward pass; the loss and all gradients."""
    cfg = tiny_config(n_layers=2, backend="triton", aux_loss_weight=0.3, z_loss_weight=0.07)
    cfg.norm.position = position
    model = tiny_model(cfg, activation_checkpointing=mode, dtype=HALF)
    with counted() as forward:
        loss = model(batch(), batch()).total
    with counted() as backward:
        loss.backward()
    return [forward, backward], {"loss": loss.detach()} | gradients(model)


def check_activation_checkpointing(position: NormPosition) -> dict[str, list[dict[str, int]]]:
    """The modes give the same bits; return the launches of their passes."""
    found, expected = {}, None
    for mode in ("none", "selective", "full"):
        counts, values = step(mode, position)
        found[mode] = [dict(each) for each in counts]
        expected = expected or values
        assert values.keys() == expected.keys()
        for name, value in values.items():
            assert value.isfinite().all(), name
            assert torch.equal(value, expected[name]), f"{mode}: {name}"
    return found


def check_layer_compiles() -> None:
    """An MoE layer compiles as one graph, or this raises; the numbers stay the same."""
    torch.manual_seed(0)
    cfg = MoEConfig(num_experts=4, top_k=2, expert_hidden_size=16, num_shared_experts=0, backend="triton")
    layer = MoELayer(32, cfg).train()
    layer.experts.to(HALF)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_BSD = torch.randn(2, 16, 32, dtype=HALF)

    def outputs(call: torch.nn.Module) -> list[Tensor]:
        x = x_BSD.clone().requires_grad_()
        out, stats = call(x)
        loss = out.float().square().sum() + stats.balance_loss
        return [out, *torch.autograd.grad(loss, [x, *layer.parameters()])]

    eager = outputs(layer)
    with counted() as counts:
        compiled = outputs(torch.compile(layer, backend="aot_eager", fullgraph=True))
    assert counts["up_swiglu"] == counts["up_backward"] == 1
    for mine, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, other)
