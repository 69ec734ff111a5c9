"""A small model on meshes, for tests of what one mesh saves and another loads. For ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from moefoundry.config import PrecisionConfig
from moefoundry.mesh import MeshDegrees, build_meshes, by_mesh
from moefoundry.parallel import materialize, parallelize
from tests.model.tiny import meta_model, tiny_config

MESHES = {
    1: [(1, 1, 1)],
    2: [(1, 2, 1), (1, 2, 2), (2, 1, 1)],
    3: [(1, 3, 1), (3, 1, 1)],
    4: [(1, 4, 1), (1, 4, 2), (1, 4, 4), (2, 2, 1), (2, 2, 2), (4, 1, 1)],
}
"""World size -> (replicate, shard, expert)."""


Mesh = tuple[int, int, int]


def state_on(mesh: Mesh, num_experts: int = 4) -> dict[str, Tensor]:
    """Model and AdamW state of this rank; what they hold depends on a tensor's name alone, not on the mesh."""
    from moefoundry.checkpoint.state import optimizer_tensors, trained_tensors

    cfg = tiny_config(n_layers=2)
    model = meta_model(replace(cfg, moe=replace(cfg.moe, num_experts=num_experts)))
    parallelize(model, build_meshes(MeshDegrees(*mesh), "cpu") if dist.is_initialized() else None, PrecisionConfig())
    materialize(model, "cpu", seed=1)
    parameters = dict(model.named_parameters())
    optimizer = AdamW([{"params": tensors} for tensors in by_mesh(parameters.values())], fused=True)
    slots = optimizer_tensors(model, optimizer)
    with torch.no_grad():
        for name, tensor in slots.items():
            _, parameter, slot = name.split("/")
            local(tensor).copy_(torch.tensor(5.0) if slot == "step" else len(slot) * local(parameters[parameter]))
    return {**trained_tensors(model), **slots}


def local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def differing(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bit for bit on this rank."""
    assert ours.keys() == expected.keys()
    return [name for name, tensor in ours.items() if not torch.equal(local(tensor), local(expected[name]))]


def named(mesh: Mesh) -> str:
    return "x".join(str(degree) for degree in mesh)
