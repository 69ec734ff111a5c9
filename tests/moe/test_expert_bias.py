"""The expert bias over training steps: the simulation by hand, on every mesh, whatever is recomputed, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moefoundry.config import (
    ActivationCheckpointing,
    AdamWConfig,
    BalanceConfig,
    MeshConfig,
    MoEConfig,
    PrecisionConfig,
    Recipe,
    RouterConfig,
    ScoreFunction,
)
from moefoundry.moe.balance import expert_bias_step, max_violation
from moefoundry.moe.router import Router, Routing
from moefoundry.ops.permute import count_by_expert
from tests.distributed import run_distributed
from tests.model.tiny import EXPERTS, VOCAB, tiny_config
from tests.train.runs import Run, run_recipe

STEPS, SEQUENCES, LENGTH, RATE, FREEZE = 4, 8, 12, 0.01, 3


class Mode(NamedTuple):
    """None of it may change a bias."""

    mesh: tuple[int, int, int] | None = None
    micro_batches: int = 1
    activation_checkpointing: str = "none"
    compute: str = "fp32"


class Outcome(NamedTuple):
    """By step: the biases [L, E], and each layer's choices of all this rank's tokens, as a list of ids."""

    biases: list[Tensor]
    ids: list[list[list[int]]]
    dtype: torch.dtype
    logged: list[float]


def train(mode: Mode) -> Outcome:
    """AdamW steps on fixed batches, of which this rank takes its share, with the callback as Composer calls it."""
    import torch.distributed as dist
    from composer.core import Timestamp

    from moefoundry.callbacks.expert_bias import ExpertBias
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.model.transformer import MoETransformer
    from moefoundry.optim import build_adamw
    from moefoundry.parallel import materialize, moe_layers, parallelize

    rank, ranks = (dist.get_rank(), dist.get_world_size()) if mode.mesh and dist.is_initialized() else (0, 1)
    cfg = tiny_config()
    cfg.moe.router = RouterConfig(score_function=ScoreFunction.sigmoid, num_groups=2)
    cfg.moe.balance = BalanceConfig(bias_update_rate=RATE)
    with torch.device("meta"):
        model = MoETransformer(cfg)
    meshes = mode.mesh and build_meshes(resolve_degrees(MeshConfig(*mode.mesh), ranks), "cpu")
    precision = PrecisionConfig(compute=mode.compute)
    parallelize(model, meshes, precision, ActivationCheckpointing(mode.activation_checkpointing))
    materialize(model, "cpu", seed=0)
    routers = [layer.router for layer in moe_layers(model)]
    ids: list[list[int]] = [[] for _ in routers]
    forward_pass = [True]  # what is recomputed is no further choice

    def record(seen: list[int], routing: Routing) -> None:
        if forward_pass[0]:
            seen.extend(routing.topk_expert_ids.flatten().tolist())

    for router, seen in zip(routers, ids, strict=True):
        router.register_forward_hook(lambda _, __, routing, seen=seen: record(seen, routing))
    logged: list[float] = []
    logger = SimpleNamespace(log_metrics=lambda metrics: logged.extend(metrics.values()))
    callback = ExpertBias(routers, RATE, f"{FREEZE}ba")
    optimizer = build_adamw(model, AdamWConfig(lr=1e-4))
    generator = torch.Generator().manual_seed(0)
    outcome = Outcome([], [], routers[0].expert_bias.dtype, logged)
    for step in range(STEPS):
        tokens = torch.randint(VOCAB, (SEQUENCES, LENGTH), generator=generator).chunk(ranks)[rank]
        for micro_batch in tokens.chunk(mode.micro_batches):
            forward_pass[0] = True
            losses = model(micro_batch, micro_batch)
            forward_pass[0] = False
            callback.after_loss(SimpleNamespace(outputs=losses), logger)
            losses.total.backward()
        optimizer.step()
        callback.batch_end(SimpleNamespace(model=model, previous_timestamp=Timestamp(batch=step)), logger)
        optimizer.zero_grad()
        outcome.biases.append(torch.stack([router.expert_bias for router in routers]).clone())
        outcome.ids.append([list(seen) for seen in ids])
        for seen in ids:
            seen.clear()
    return outcome


@cache
def single_process() -> Outcome:
    return run_distributed(train, 1, Mode())[0]


def test_biases_equal_the_simulation_by_hand() -> None:
    outcome = single_process()
    biases = [[0.0] * EXPERTS for _ in outcome.ids[0]]
    for step, layers in enumerate(outcome.ids):
        for bias, ids in zip(biases, layers, strict=True):
            for expert in range(EXPERTS if step < FREEZE else 0):
                excess = ids.count(expert) - len(ids) / EXPERTS
                bias[expert] += RATE * ((excess < 0) - (excess > 0))
        torch.testing.assert_close(outcome.biases[step], torch.tensor(biases), rtol=0, atol=1e-7)
    assert outcome.logged == pytest.approx([bias.abs().max().item() for bias in outcome.biases])
    assert torch.equal(outcome.biases[FREEZE - 1], outcome.biases[-1]), "frozen"
    assert len({bias.numpy().tobytes() for bias in outcome.biases}) == FREEZE, "changed by every step before"


@pytest.mark.parametrize(
    ("ranks", "mode"),
    [
        (1, Mode(micro_batches=4)),
        (1, Mode(micro_batches=2, activation_checkpointing="full")),
        (1, Mode(activation_checkpointing="selective")),
        (2, Mode((1, 2, 1), micro_batches=2, activation_checkpointing="full")),
        (2, Mode((1, 2, 2))),
        pytest.param(4, Mode((2, 2, 2), micro_batches=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_biases_are_the_same_however_the_step_is_computed(ranks: int, mode: Mode) -> None:
    for outcome in run_distributed(train, ranks, mode):
        for bias, expected in zip(outcome.biases, single_process().biases, strict=True):
            assert torch.equal(bias, expected)


def test_biases_stay_fp32_in_bf16_compute() -> None:
    first, second = run_distributed(train, 2, Mode((1, 2, 1), compute="bf16"))
    assert first.dtype == torch.float32
    assert first.biases[-1].abs().max() > 0
    for bias, other in zip(first.biases, second.biases, strict=True):
        assert torch.equal(bias, other)


def test_it_balances_a_router_that_prefers_some_experts() -> None:
    """Scores lean to the first experts; their choice evens out, their scores stay as they are (arXiv 2408.15664)."""
    generator = torch.Generator().manual_seed(0)
    cfg = MoEConfig(num_experts=8, top_k=2, router=RouterConfig(score_function=ScoreFunction.sigmoid))
    router = Router(8, cfg)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(8))
    violations = []
    for _ in range(150):
        tokens_TD = torch.randn(512, 8, generator=generator) + torch.linspace(1, -1, 8)
        counts_E = count_by_expert(router(tokens_TD).topk_expert_ids, 8)
        violations.append(max_violation(counts_E).item())
        router.expert_bias += expert_bias_step(counts_E, rate=0.01)
    assert violations[0] > 0.8
    assert max(violations[-50:]) < 0.3
    assert router.expert_bias.diff().min() > 0, "the less an expert is preferred, the more it is helped"


# --------------------------------------------------------------------------------------------------------- in a run

RECIPE = (
    "model.moe={num_experts: 4, top_k: 2, expert_hidden_size: 32, "
    "router: {score_function: sigmoid}, balance: {aux_loss_weight: 0.0, bias_update_rate: 0.01, bias_freeze_at: 3ba}}",
    "save_interval=2ba",
    "save_num_checkpoints_to_keep=-1",
)


def saved_biases(checkpoint: Path) -> dict[str, Tensor]:
    from moefoundry.checkpoint.load import read_into

    biases = {f"model/model.layers.{i}.ffn.router.expert_bias": torch.full((4,), torch.nan) for i in (1, 2)}
    read_into(checkpoint, biases)
    return biases


def test_a_resumed_run_goes_on_with_its_biases(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """They are worth 0.02 after two batches, 0.03 at most when they freeze."""
    whole = run_recipe(tiny_recipe(tmp_path / "whole", *RECIPE))
    resume = f"load_path={whole.run_dir / 'checkpoints' / 'ba2'}"
    resumed = run_recipe(tiny_recipe(tmp_path / "resumed", *RECIPE, resume))
    assert resumed.exact() == whole.exact(3)

    def last(run: Run) -> dict[str, Any]:
        return run_distributed(saved_biases, 1, run.run_dir / "checkpoints" / "ba4")[0]

    for name, bias in last(resumed).items():
        assert torch.equal(bias, last(whole)[name])
        assert 0 < bias.abs().max() <= 0.03 + 1e-6
    logged = whole.column("moe/expert_bias_max_abs")
    assert logged[1] == pytest.approx(0.01)
    assert logged[3] == logged[4]
    assert resumed.column("moe/expert_bias_max_abs") == {batch: logged[batch] for batch in (3, 4)}
