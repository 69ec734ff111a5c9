"""Plan of a recipe on any number of ranks, without the ranks: memory and traffic of one rank.

Nothing is built, and torch is not imported: shards follow from the recipe's keys. Tests compare them with those of the
model that training builds, shards and runs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

from moefoundry.config import Auto, MuonConfig, Recipe
from moefoundry.config.curriculum import of_stage, stages_of
from moefoundry.mesh import MeshDegrees, resolve_degrees
from moefoundry.planning.describe import ParameterCounts
from moefoundry.planning.memory import Memory, memory
from moefoundry.planning.outline import Outline, ShardedOutline
from moefoundry.planning.traffic import Traffic, step_traffic


@dataclass(frozen=True)
class Plan:
    """Memory and traffic of the rank that needs most memory.

    Attributes:
        run_name: Name of the run.
        gpus_per_node: Ranks of a node.
        mesh: Degrees of the mesh.
        parameters: Parameters of the whole model.
        micro_batches: Micro-batches of a rank in an optimizer step.
        tokens_per_micro_batch: Tokens of the largest micro-batch of a rank.
        tokens_per_step: Tokens of a rank in an optimizer step.
        rows_per_expert: Mean rows that an expert computes in that micro-batch, from all ranks that share it.
        memory: Memory in bytes.
        traffic: Traffic by collective and mesh axis, in an optimizer step.
        stage: Stage of the curriculum that this is the plan of, the one that needs most memory; "" without one.
    """

    run_name: str
    gpus_per_node: int
    mesh: MeshDegrees
    parameters: ParameterCounts
    micro_batches: int
    tokens_per_micro_batch: int
    tokens_per_step: int
    rows_per_expert: float
    memory: Memory
    traffic: list[Traffic]
    stage: str = ""

    def to_json(self, memory_gb: float) -> dict[str, Any]:
        """Convert to plain values; ``memory_gb`` is the memory of a device in GB of 1e9 bytes."""
        values = asdict(self)
        values["mesh"]["world_size"] = self.mesh.world_size
        values["memory"]["peak"]["total"] = self.memory.peak.total
        values["memory"] |= {"total": self.memory.total, "limit": int(memory_gb * 1e9), "fits": self.fits(memory_gb)}
        return values

    def fits(self, memory_gb: float) -> bool:
        """Tell if a device of ``memory_gb`` GB (1e9 bytes) has enough memory."""
        return self.memory.total <= memory_gb * 1e9


def make_plan(recipe: Recipe, world_size: int, gpus_per_node: int = 8) -> Plan:
    """Plan ``recipe`` for ``world_size`` ranks.

    Args:
        recipe: Loaded for this number of ranks (``load_recipe(..., world_size)`` checks that it fits).
        world_size: Number of ranks.
        gpus_per_node: Ranks on a node; ranks are numbered node by node.

    Raises:
        ConfigError: The mesh does not fit the world size.
    """
    degrees, outline = resolve_degrees(recipe.mesh, world_size, gpus_per_node), Outline(recipe)
    sharded = outline.shard(recipe, degrees)
    plans = [
        replace(plan_of(of_stage(recipe, stage), degrees, gpus_per_node, outline, sharded), stage=stage.name)
        for stage in stages_of(recipe)
    ]
    return max(plans, key=lambda plan: plan.memory.total)


def plan_of(
    recipe: Recipe,
    degrees: MeshDegrees,
    gpus_per_node: int,
    outline: Outline,
    sharded: ShardedOutline,
    known: Memory | None = None,
) -> Plan:
    """Plan a recipe whose model is sharded already; arguments as of :func:`make_plan`.

    ``known`` is its memory, if it is: that of the same recipe with other chunks.
    """
    batches = micro_batches(recipe, degrees.world_size)
    tokens, moe = max(batches) * recipe.max_seq_len, recipe.model.moe
    blocks = sharded.planned_blocks(recipe.max_seq_len)
    exchanges = sharded.matrices.exchanges if isinstance(recipe.optimizer, MuonConfig) else ()
    return Plan(
        run_name=recipe.run_name,
        gpus_per_node=gpus_per_node,
        mesh=degrees,
        parameters=outline.counts,
        micro_batches=batches.total(),
        tokens_per_micro_batch=tokens,
        tokens_per_step=recipe.global_train_batch_size // degrees.world_size * recipe.max_seq_len,
        rows_per_expert=tokens * moe.top_k * degrees.expert / moe.num_experts,
        memory=known or memory(sharded, recipe, max(batches)),
        traffic=step_traffic(recipe, degrees, blocks, sharded.units, batches, gpus_per_node, exchanges),
    )


def micro_batches(recipe: Recipe, world_size: int) -> Counter[int]:
    """Count the micro-batches of a rank by their sequences, the first ones first, as Composer divides its batch.

    Raises:
        ValueError: The recipe leaves the size to the run.
    """
    sequences = recipe.global_train_batch_size // world_size
    size = recipe.device_train_microbatch_size
    if isinstance(size, Auto):
        raise ValueError("the micro-batch is still to be chosen: planning.micro_batch")
    full, rest = divmod(sequences, size)
    return Counter({size: times for size, times in ((size, full), (rest, 1)) if size * times})
