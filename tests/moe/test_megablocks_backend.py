"""``model.moe.backend: megablocks`` in a whole model: the losses and gradients of the loop backend on every mesh, with
micro-batches, activation checkpointing and dense layers beside the MoE layers.

Torch multiplies the blocks, with the arguments that the kernels get: ranks are forked from a process that has imported
Triton without its interpreter. ``tests/ops/block_sparse`` has the kernels.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from moefoundry.config import (
    ActivationCheckpointing,
    BalanceConfig,
    GqaConfig,
    InitConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    PrecisionConfig,
)
from tests.distributed import run_distributed

MESHES = [None, (1, 2, 2), pytest.param((2, 2, 2), marks=pytest.mark.slow)]


def config(backend: str, capacity_factor: float | None) -> ModelConfig:
    """One dense layer and two of experts."""
    return ModelConfig(
        vocab_size=67,
        d_model=128,
        n_layers=3,
        n_dense_layers=1,
        ffn_hidden_size=48,
        init=InitConfig(std=0.1),
        attention=GqaConfig(n_heads=4, n_kv_heads=2),
        moe=MoEConfig(
            num_experts=4,
            top_k=2,
            expert_hidden_size=128,
            capacity_factor=capacity_factor,
            balance=BalanceConfig(aux_loss_weight=0.1, z_loss_weight=0.01),
            backend=backend,
        ),
    )


def losses_and_gradients(
    backend: str, mesh: tuple[int, int, int] | None, micro_batches: int, capacity_factor: float | None
) -> dict[str, Tensor]:
    """Loss terms and gradients of one batch of 8 sequences, of which this rank takes its share."""
    import torch.distributed as dist

    from moefoundry.megablocks import on_cpu
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.model.transformer import MoETransformer
    from moefoundry.ops.block_sparse import function
    from moefoundry.parallel import begin_micro_batch, materialize, parallelize

    os.environ["TRITON_INTERPRET"] = "1"  # which the backend takes for leave to run on a CPU
    function.missing, function.widened = lambda: "", lambda: on_cpu
    rank, ranks = (0, 1) if mesh is None else (dist.get_rank(), dist.get_world_size())
    meshes = None if mesh is None else build_meshes(resolve_degrees(MeshConfig(*mesh), ranks), "cpu")
    with torch.device("meta"):
        model = MoETransformer(config(backend, capacity_factor))
    checkpointing = ActivationCheckpointing.full if micro_batches > 1 else ActivationCheckpointing.none
    parallelize(model, meshes, PrecisionConfig(), checkpointing)
    materialize(model, "cpu", 5)
    tokens = torch.randint(67, (8, 8), generator=torch.Generator().manual_seed(0)).chunk(ranks)[rank]
    found: dict[str, Any] = {"balance": torch.zeros(()), "total": torch.zeros(())}
    for index, micro_batch in enumerate(tokens.chunk(micro_batches), start=1):
        begin_micro_batch(model, index == micro_batches)
        losses = model(micro_batch, micro_batch)
        (losses.total / micro_batches).backward()
        for name in ("balance", "total"):
            found[name] += getattr(losses, name).detach() / micro_batches / ranks
    if ranks > 1:
        for name in ("balance", "total"):
            dist.all_reduce(found[name])
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {name: grad.full_tensor() if mesh else grad for name, grad in gradients.items()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        tolerance = 1e-5 if name in ("balance", "total") else 1e-4 * value.abs().max().item()
        torch.testing.assert_close(
            got[name], value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_trains_as_the_loop_does_on_one_rank(mesh: tuple[int, int, int] | None) -> None:
    (expected,) = run_distributed(losses_and_gradients, 1, "loop", None, 1, None)
    for got in run_distributed(losses_and_gradients, mesh[0] * mesh[1] if mesh else 1, "megablocks", mesh, 2, None):
        assert_equal(got, expected)


def test_capacity() -> None:
    (expected,) = run_distributed(losses_and_gradients, 1, "loop", None, 1, 1.0)
    (got,) = run_distributed(losses_and_gradients, 1, "megablocks", None, 1, 1.0)
    assert_equal(got, expected)
