"""The fused experts as operators of torch: as it asks, in activation checkpointing and in its compiler."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moefoundry.config import ModelConfig, MoEConfig, NormPosition
from moefoundry.moe.layer import MoELayer
from moefoundry.ops.recompute import ending_the_block, keeping
from moefoundry.parallel import KEPT_OPS
from moefoundry.planning.ffn_stages import block_ends_with_experts, moe_stages, order_bytes
from tests.ops.fused_experts import operator_checks
from tests.test_activation_checkpointing import LiveMemory

pytest.importorskip("triton", reason="triton is not installed")

FORWARD = {"place_tiles": 1, "up_swiglu": 1, "down": 1, "gather_sum": 1}
BACKWARD = {"down_backward_swiglu": 1, "weight_gradient": 2, "up_backward": 1, "gather_sum": 1}


@pytest.mark.parametrize("biased", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "biases"])
def test_operators_are_as_torch_asks(interpreter: ProcessPoolExecutor, biased: bool) -> None:
    interpreter.submit(operator_checks.check_operators, biased).result()


@pytest.mark.parametrize("position", [NormPosition.before, NormPosition.both])
def test_checkpointing_runs_no_kernel_twice_that_it_need_not(
    interpreter: ProcessPoolExecutor, position: NormPosition
) -> None:
    found = interpreter.submit(operator_checks.check_activation_checkpointing, position).result()
    assert found["none"] == found["selective"] == [FORWARD, BACKWARD]
    read_again = ("place_tiles", "up_swiglu") if position == NormPosition.before else tuple(FORWARD)
    again = Counter({name: FORWARD[name] for name in read_again})
    assert found["full"] == [FORWARD, again + Counter(BACKWARD)]


def test_a_layer_is_one_graph(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(operator_checks.check_layer_compiles).result()


@pytest.mark.parametrize("position", [NormPosition.before, NormPosition.both])
@pytest.mark.parametrize("backend", ["triton", "quack"])
def test_selective_keeps_what_the_plan_counts(
    backend: str, position: NormPosition, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, width, experts, top_k = 8192, 80, 16, 4
    moe = MoEConfig(num_experts=experts, top_k=top_k, expert_hidden_size=48, num_shared_experts=0, backend=backend)
    cfg = ModelConfig(vocab_size=64, d_model=width, n_layers=1, moe=moe)
    cfg.norm.position = position
    monkeypatch.setattr("moefoundry.ops.fused_experts.obstacle", lambda *_: "")
    monkeypatch.setattr("moefoundry.ops.quack_experts.obstacle", lambda *_: "")
    with torch.device("meta"):
        layer = MoELayer(width, moe).train()
        layer.experts.to(torch.bfloat16)
        x_BSD = torch.empty(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
    with LiveMemory() as memory, ending_the_block(block_ends_with_experts(cfg)):
        out, stats = checkpoint(layer, x_BSD, use_reentrant=False, context_fn=keeping(KEPT_OPS))
        loss = out.float().sum() + stats.balance_loss
        del out, stats
    stages = moe_stages(cfg, 2, 1, False, tokens * top_k / experts)
    planned = sum(stage.kept for stage in stages) + order_bytes(cfg, 1) + 2 * width  # and the layer's input
    assert memory.bytes_alive() / tokens == pytest.approx(planned, rel=0.005)
    del loss
