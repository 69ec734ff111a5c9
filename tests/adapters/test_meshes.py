"""Adapters on a mesh are the single process's: the same initial values, and the same training to rounding."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moefoundry.config import (
    ActivationCheckpointing,
    AdamWConfig,
    Compute,
    Fp8Config,
    Fp8Recipe,
    LoraConfig,
    MeshConfig,
    PrecisionConfig,
)
from tests.distributed import run_distributed
from tests.test_parallel import LENGTH, SEED, SEQUENCES, full_parameters, model_config

STEPS, EXPERTS = 2, 8
FP32, BF16 = PrecisionConfig(), PrecisionConfig(compute=Compute.bf16)
FP8 = PrecisionConfig(fp8=Fp8Config(Fp8Recipe.deepseek_v3))
PLAIN = LoraConfig(rank=4, alpha=8.0, train_router=True)
DORA = LoraConfig(rank=4, alpha=8.0, dora=True, use_rslora=True, targets=["attention", "experts.up_proj"])
MESHES, SLOW_MESHES = [(1, 2, 2)], [(1, 2, 1), (2, 2, 2), (1, 4, 1), (1, 4, 4)]


class Outcome(NamedTuple):
    """What a training run left: losses and gradient norms by step; parameters at the beginning and at the end."""

    losses: Tensor
    grad_norms: Tensor
    start: dict[str, Tensor]
    end: dict[str, Tensor]


def train(mesh: tuple[int, int, int] | None, lora: LoraConfig, precision: PrecisionConfig = FP32) -> Outcome:
    """AdamW steps on fixed batches, of which this rank takes its share in two micro-batches."""
    import torch.distributed as dist

    from moefoundry.adapters import apply_lora
    from moefoundry.callbacks.health import global_norm
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.model.transformer import meta_model
    from moefoundry.optim import build_adamw
    from moefoundry.parallel import begin_micro_batch, materialize, parallelize

    rank, ranks = (0, 1) if mesh is None else (dist.get_rank(), dist.get_world_size())
    meshes = None if mesh is None else build_meshes(resolve_degrees(MeshConfig(*mesh), ranks), "cpu")
    model = meta_model(model_config(EXPERTS, chunks=1 if mesh is None else 2))
    apply_lora(model, lora)
    checkpointing = ActivationCheckpointing.none if mesh is None else ActivationCheckpointing.full
    parallelize(model, meshes, precision, checkpointing)
    materialize(model, "cpu", SEED)
    start, optimizer = full_parameters(model), build_adamw(model, AdamWConfig(lr=1e-2))
    generator = torch.Generator().manual_seed(0)
    losses, grad_norms = [], []
    for _ in range(STEPS):
        tokens = torch.randint(67, (SEQUENCES, LENGTH), generator=generator).chunk(ranks)[rank]
        loss = torch.zeros(())
        for index, micro_batch in enumerate(tokens.chunk(2)):
            begin_micro_batch(model, index == 1)
            micro_loss = model(micro_batch, micro_batch).total / 2
            micro_loss.backward()
            loss += micro_loss.detach()
        if ranks > 1:
            dist.all_reduce(loss)
        grad_norms.append(global_norm([p.grad for p in model.parameters() if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss / ranks)
    return Outcome(torch.stack(losses), torch.stack(grad_norms), start, full_parameters(model))


def train_all(mesh: tuple[int, int, int] | None) -> list[Outcome]:
    small = mesh is None or mesh[0] * mesh[1] == 2  # FP8 takes its time
    return [train(mesh, PLAIN), train(mesh, DORA), *([train(mesh, PLAIN, FP8)] if small else [])]


@cache
def single_process() -> list[Outcome]:
    return run_distributed(train_all, 1, None)[0]


def is_trained(name: str) -> bool:
    return ".lora." in name or name.endswith("router.gate.weight")


@pytest.mark.parametrize(
    "mesh",
    [*MESHES, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in SLOW_MESHES)],
    ids=lambda mesh: "replicate{}-shard{}-expert{}".format(*mesh),
)
def test_training_equals_the_single_process(mesh: tuple[int, int, int]) -> None:
    for rank in run_distributed(train_all, mesh[0] * mesh[1], mesh):
        for outcome, expected, tolerance in zip(rank, single_process(), (1e-5, 1e-5, 5e-3), strict=False):
            assert outcome.start.keys() == expected.start.keys()
            assert all(torch.equal(value, expected.start[name]) for name, value in outcome.start.items())
            assert (outcome.losses / expected.losses - 1).abs().max() <= tolerance / 10
            assert (outcome.grad_norms / expected.grad_norms - 1).abs().max() <= tolerance
            for name, value in outcome.end.items():
                if is_trained(name):
                    error = (value - expected.end[name]).norm() / expected.end[name].norm()
                    assert error <= tolerance * (1 if tolerance < 1e-3 else 10), name


def test_adapters_alone_are_trained() -> None:
    plain, dora, _ = single_process()
    for outcome, of_router in ((plain, True), (dora, False)):
        for name, value in outcome.start.items():
            trains = ".lora." in name or (of_router and name.endswith("router.gate.weight"))
            assert torch.equal(value, outcome.end[name]) != trains, name
    assert any(name.endswith("lora.magnitude.weight") for name in dora.start)


def train_in_bf16(mesh: tuple[int, int, int]) -> list[Outcome]:
    wide = replace(DORA, rank=8)  # rows of 16 bytes
    return [train(mesh, wide), train(mesh, wide, BF16)]


def test_bf16_is_near_fp32() -> None:
    exact, rounded = run_distributed(train_in_bf16, 2, (1, 2, 2))[0]
    assert 0 < (rounded.losses / exact.losses - 1).abs().max() < 0.01
    for name, value in exact.end.items():
        if name.endswith("magnitude.weight"):  # of which BF16 would round most steps away
            steps = rounded.end[name] - rounded.start[name]
            assert (steps != 0).all(), name
            assert (steps - (value - exact.start[name])).norm() < 0.75 * steps.norm(), name
