"""A training step on every mesh of a few gloo ranks of this machine, and what crosses between nodes.

`step` times forward, backward and AdamW of the quickstart's model at the same global batch, on every mesh in turn with
one process; the case names the bytes a rank sends in a step, as `moefoundry plan` computes them (its tests hold them
against counted ones). All ranks share the machine's cores: this measures what a mesh costs, not what it gains.

`border` compares HSDP with plain FSDP on two pretended nodes: bytes that a rank sends to the other node in a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.harness import Comparison, in_turn
from benchmarks.ranks import on_ranks
from moefoundry.config import AdamWConfig, MeshConfig, Recipe, load_recipe
from moefoundry.planning.plan import Plan, make_plan

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
OVERRIDES = ["max_seq_len=128", "global_train_batch_size=8", "device_train_microbatch_size=8"]
WORLDS, ROUNDS = (2, 4), 5
MIB = 2**20


def compare(quick: bool) -> list[Comparison]:
    """Steps on every mesh, then the border."""
    recipe = load_recipe(RECIPE, OVERRIDES)
    meshes = [mesh for ranks in WORLDS for mesh in meshes_of(ranks)]
    steps = [_step(recipe, mesh, 1 if quick else ROUNDS) for mesh in (meshes[:1] if quick else meshes)]
    return [*steps, _border(recipe)]


def meshes_of(ranks: int) -> Iterator[MeshConfig]:
    """Every valid mesh."""
    degrees = [n for n in range(1, ranks + 1) if ranks % n == 0]
    return (MeshConfig(ranks // shard, shard, expert) for shard in degrees for expert in degrees if shard % expert == 0)


def plan_for(recipe: Recipe, mesh: MeshConfig, ranks_per_node: int = 8) -> Plan:
    """The recipe's plan on ``mesh``."""
    return make_plan(replace(recipe, mesh=mesh), mesh.replicate * mesh.shard, ranks_per_node)


def _name(mesh: MeshConfig) -> str:
    return f"replicate {mesh.replicate}, shard {mesh.shard}, expert {mesh.expert}"


def _step(recipe: Recipe, mesh: MeshConfig, rounds: int) -> Comparison:
    ranks = mesh.replicate * mesh.shard
    sent = sum(traffic.sent for traffic in plan_for(recipe, mesh).traffic)
    seconds = on_ranks(_measure, ranks, recipe, mesh, rounds)
    return Comparison(
        benchmark="step on a mesh",
        case=f"{_name(mesh)}: {sent / MIB:.1f} MiB sent a rank",
        unit="s",
        peer="one of these processes, alone",
        ours=seconds["mesh"],
        theirs=seconds["alone"],
    )


def _measure(recipe: Recipe, mesh: MeshConfig, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of all ranks, and of the same global batch on rank 0 while the others wait."""
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.model.transformer import MoETransformer, meta_model
    from moefoundry.optim import build_adamw
    from moefoundry.parallel import materialize, parallelize

    rank, ranks = dist.get_rank(), dist.get_world_size()
    size = (recipe.global_train_batch_size, recipe.max_seq_len)
    batch = torch.randint(recipe.model.vocab_size, size, generator=torch.Generator().manual_seed(0))

    def trainer(sharded: bool) -> tuple[MoETransformer, torch.optim.Optimizer]:
        model = meta_model(recipe.model)
        parallelize(model, build_meshes(resolve_degrees(mesh, ranks), "cpu") if sharded else None, recipe.precision)
        materialize(model, "cpu", recipe.seed)
        return model, build_adamw(model, AdamWConfig(lr=4e-3))

    def step(trained: tuple[MoETransformer, torch.optim.Optimizer], tokens: torch.Tensor) -> None:
        trained[0](tokens, tokens).total.backward()
        trained[1].step()
        trained[1].zero_grad()
        dist.barrier()

    together, alone = trainer(sharded=True), trainer(sharded=False) if rank == 0 else None
    return in_turn(
        {
            "mesh": lambda: step(together, batch.chunk(ranks)[rank]),
            "alone": lambda: step(alone, batch) if alone else dist.barrier(),
        },
        rounds,
        warmup=1,
        ready=dist.barrier,
    )


def _border(recipe: Recipe) -> Comparison:
    crossing = [
        float(sum(traffic.across_nodes for traffic in plan_for(recipe, mesh, ranks_per_node=2).traffic))
        for mesh in (MeshConfig(2, 2, 1), MeshConfig(1, 4, 1))
    ]
    return Comparison(
        benchmark="bytes between nodes",
        case="replicate 2, shard 2 on two nodes of two ranks",
        unit="bytes a rank and step",
        peer="FSDP: shard 4",
        ours=crossing[:1],
        theirs=crossing[1:],
    )
