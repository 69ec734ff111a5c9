"""The dispatcher of DeepEP, on a stand-in for its package, does what the dispatcher by all-to-all does.

DeepEP itself runs on GPUs only, and has not been run. Values are small whole numbers, which BF16 sums exactly, so that
results and gradients have the same bits.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moefoundry.config import (
    ActivationCheckpointing,
    Compute,
    Dispatcher,
    MeshConfig,
    MoEConfig,
    PrecisionConfig,
    UserError,
)
from moefoundry.moe.deep_ep import check_dispatcher, obstacle
from moefoundry.ops.permute import RowOrder, permute, permute_slots, sum_rows
from tests.distributed import run_distributed
from tests.moe.test_dispatch import EXPERTS, ROUTINGS, case
from tests.test_parallel import LENGTH, SEED, full, model_config

WIDE = 8
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Squares:
    """Experts that square, and add their number, from ``first``."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, tokens: Tensor, weights: Tensor, order: RowOrder) -> Tensor:
        assert not tokens.isnan().any(), "the event was waited for"
        rows = permute(tokens, order)
        numbers = torch.repeat_interleave(torch.arange(len(order.tokens_per_expert_E)), order.tokens_per_expert_E)
        rows = rows * rows + (numbers + self.first).unsqueeze(1).to(rows.dtype)
        return sum_rows(rows * permute_slots(weights, order).unsqueeze(1).to(rows.dtype), order)

    def in_chunks(self, links: Any, schedule: Callable[..., Any]) -> Any:
        return schedule(links, self)


def mixed_by(dispatcher: Any, routing: str, chunks: int) -> list[Tensor]:
    """Output, and gradients of tokens and weights."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    _, ids, _, kept = case(routing, rank, ranks)
    generator = torch.Generator().manual_seed(rank)
    shape = len(ids), WIDE
    tokens = torch.randint(-2, 3, shape, generator=generator).bfloat16().requires_grad_()
    weights = torch.randint(1, 3, ids.shape, generator=generator).float().requires_grad_()
    out = dispatcher.dispatch(tokens, ids, weights, kept, chunks).mix(Squares(rank * EXPERTS // ranks))
    out.backward(torch.randint(-1, 2, shape, generator=generator).bfloat16())
    return [out.detach(), tokens.grad, weights.grad]


def on_ranks() -> int:
    from moefoundry.moe.deep_ep import Buffers, DeepEpDispatcher
    from moefoundry.moe.dispatch import AllToAllDispatcher
    from tests.moe.deep_ep_stand_in import ElasticBuffer, install

    install()
    group = dist.group.WORLD
    theirs, ours = DeepEpDispatcher(EXPERTS, Buffers(group)), AllToAllDispatcher(EXPERTS, group)
    for routing in ROUTINGS:
        for chunks in (1, 3):
            for got, expected in zip(mixed_by(theirs, routing, chunks), mixed_by(ours, routing, 1), strict=True):
                assert torch.equal(got, expected), (routing, chunks)
    return ElasticBuffer.made


@pytest.mark.parametrize("ranks", [2, 4])
def test_results_and_gradients_are_those_of_the_all_to_all(ranks: int) -> None:
    """One buffer serves all, until a rank has more tokens than it has room for."""
    assert run_distributed(on_ranks, ranks) == [2] * ranks


def steps() -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and gradients of a model in BF16, whose blocks are computed again; by all-to-all, then by DeepEP."""
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.model.transformer import meta_model
    from moefoundry.parallel import materialize, parallelize
    from tests.moe.deep_ep_stand_in import install

    install()
    tokens = torch.randint(67, (2, LENGTH), generator=torch.Generator().manual_seed(dist.get_rank()))
    results = []
    for dispatcher, chunks in ((Dispatcher.all_to_all, 1), (Dispatcher.deepep, 1), (Dispatcher.deepep, 2)):
        cfg = model_config(8, chunks=chunks)
        model = meta_model(replace(cfg, moe=replace(cfg.moe, dispatcher=dispatcher)))
        meshes = build_meshes(resolve_degrees(MeshConfig(1, 2, 2), 2), "cpu")
        parallelize(model, meshes, PrecisionConfig(compute=Compute.bf16), ActivationCheckpointing.full)
        materialize(model, "cpu", SEED)
        loss = model(tokens, tokens).total
        loss.backward()
        results.append((loss.detach(), {name: full(parameter.grad) for name, parameter in model.named_parameters()}))
    return results


def test_a_model_trains_with_it() -> None:
    (loss, grads), *by_deep_ep = run_distributed(steps, 2)[0]
    for other_loss, other_grads in by_deep_ep:
        torch.testing.assert_close(other_loss, loss, rtol=1e-3, atol=0)
        for name, grad in grads.items():
            assert (other_grads[name] - grad).norm() <= 0.03 * grad.norm(), name


def test_it_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = MoEConfig(num_experts=2, top_k=1, expert_hidden_size=8, dispatcher=Dispatcher.deepep)
    refusal = "model.moe.dispatcher: deepep cannot run: it needs NVIDIA GPUs, and the device is cpu; use "
    with pytest.raises(UserError, match=refusal + "model.moe.dispatcher=all_to_all"):
        check_dispatcher(cfg, CPU, torch.bfloat16)
    check_dispatcher(replace(cfg, dispatcher=Dispatcher.all_to_all), CPU, torch.bfloat16)
    assert obstacle(CUDA, torch.float32) == "it moves bfloat16, and tokens are torch.float32"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert obstacle(CUDA, torch.bfloat16) == "the package deep_ep is not installed"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))
    assert obstacle(CUDA, torch.bfloat16).endswith("it has no ElasticBuffer, which came with DeepEP 2")


def build_with_deep_ep() -> None:
    from composer.utils import get_device

    from moefoundry import build
    from moefoundry.config import load_recipe
    from tests.conftest import QUICKSTART

    changes = ["mesh={replicate: 1, shard: 2, expert: 2}", "precision.compute=bf16", "model.moe.dispatcher=deepep"]
    recipe = load_recipe(QUICKSTART, changes, 2)
    device = get_device("cpu")
    build.build_model(recipe, build.setup_meshes(recipe, device), device)


def test_training_asks_before_it_begins() -> None:
    with pytest.raises(UserError, match="deepep cannot run: it needs NVIDIA GPUs"):
        run_distributed(build_with_deep_ep, 2)
