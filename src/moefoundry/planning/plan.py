"""Plan of a recipe on any number of ranks, without the ranks: memory and traffic of one rank.

The functions that training uses build the mesh and the sharded model, on meta tensors in a simulated world; the figures
are read from the resulting shards.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from moefoundry.adapters import apply_lora
from moefoundry.config import Recipe
from moefoundry.mesh import MeshDegrees, build_meshes, resolve_degrees
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.parallel import needs_mesh, parallelize
from moefoundry.planning.describe import ParameterCounts, parameter_counts
from moefoundry.planning.memory import Memory, memory
from moefoundry.planning.traffic import Traffic, step_traffic
from moefoundry.planning.units import fsdp_units, planned_blocks
from moefoundry.planning.world import fake_world


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
    degrees = resolve_degrees(recipe.mesh, world_size, gpus_per_node)
    batches = micro_batches(recipe, world_size)
    with fake_world(world_size):
        model = build_sharded(recipe, degrees)
        blocks, units = planned_blocks(model, recipe.max_seq_len), fsdp_units(model)
        held = memory(model, blocks, units, recipe, max(batches))
        counts = parameter_counts(model)
    tokens, moe = max(batches) * recipe.max_seq_len, recipe.model.moe
    return Plan(
        run_name=recipe.run_name,
        gpus_per_node=gpus_per_node,
        mesh=degrees,
        parameters=counts,
        micro_batches=len(batches),
        tokens_per_micro_batch=tokens,
        tokens_per_step=sum(batches) * recipe.max_seq_len,
        rows_per_expert=tokens * moe.top_k * degrees.expert / moe.num_experts,
        memory=held,
        traffic=step_traffic(recipe, degrees, blocks, units, batches, gpus_per_node),
    )


def micro_batches(recipe: Recipe, world_size: int) -> list[int]:
    """List the sequences of each micro-batch of a rank, as Composer divides its batch."""
    sequences = recipe.global_train_batch_size // world_size
    full, rest = divmod(sequences, recipe.device_train_microbatch_size)
    return [recipe.device_train_microbatch_size] * full + [rest] * (rest > 0)


def build_sharded(recipe: Recipe, degrees: MeshDegrees) -> MoETransformer:
    """Build the model on meta, sharded as in training; on one rank that computes in fp32 it is not sharded."""
    model = meta_model(recipe.model)
    if recipe.lora is not None:
        apply_lora(model, recipe.lora)
    meshes = build_meshes(degrees, "cpu") if needs_mesh(degrees, recipe.precision) else None
    parallelize(model, meshes, recipe.precision, recipe.activation_checkpointing)
    return model
