"""Sequences of a forward pass, where a recipe leaves them to the run: ``device_train_microbatch_size: auto``.

The largest of the even divisions of a rank's sequences is taken whose planned memory fits the device, with some left
free. Learning is the same with any; fewer, larger micro-batches are faster. What a plan cannot know, such as tokens
that gather on one rank, may still end the memory: training then takes smaller ones.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace

from moefoundry.config import Auto, Recipe
from moefoundry.config.curriculum import Stage, of_stage, stages_of
from moefoundry.mesh import resolve_degrees
from moefoundry.planning.memory import memory
from moefoundry.planning.outline import Outline, ShardedOutline

HEADROOM = 0.08
"""Share of a device's memory that is left for what a plan does not count: CUDA's context, buffers of NCCL, gaps."""

Sizes = dict[str, int]
"""Sequences of a micro-batch by the name of a stage; the name is "" in a run without a curriculum."""


def left_open(recipe: Recipe) -> list[Stage]:
    """List the stages whose micro-batch the recipe leaves to the run."""
    return [stage for stage in stages_of(recipe) if isinstance(stage.microbatch_size, Auto)]


def with_sizes(recipe: Recipe, sizes: Mapping[str, int]) -> Recipe:
    """Put sizes in place of ``auto``; stages that have their own keep them."""
    if not sizes:
        return recipe
    if recipe.curriculum is None:
        return replace(recipe, device_train_microbatch_size=sizes[""])
    curriculum = {
        name: replace(stage, device_train_microbatch_size=sizes[name]) if name in sizes else stage
        for name, stage in recipe.curriculum.items()
    }
    own = recipe.device_train_microbatch_size
    last = [*sizes.values()][-1]  # read by no stage any more
    return replace(recipe, curriculum=curriculum, device_train_microbatch_size=last if isinstance(own, Auto) else own)


def fitting_sizes(recipe: Recipe, world_size: int, sharded: ShardedOutline, limit: float) -> Sizes:
    """Choose the size of each stage that is left open.

    Args:
        recipe: The recipe, whose model is ``sharded``.
        world_size: Number of ranks.
        sharded: The model on the mesh.
        limit: Bytes that may be planned for a device.

    Returns:
        Sizes; 1 where nothing fits.
    """
    sizes = {}
    for stage in left_open(recipe):
        alike = of_stage(recipe, replace(stage, microbatch_size=1))
        sizes[stage.name] = _largest(sharded, alike, stage.batch_size // world_size, limit)
    return sizes


def _largest(sharded: ShardedOutline, recipe: Recipe, sequences: int, limit: float) -> int:
    """Find the largest division that fits; memory grows with it."""
    sizes = divisions(sequences)
    first = bisect_left(sizes, True, key=lambda size: memory(sharded, recipe, size).total <= limit)
    return sizes[first] if first < len(sizes) else 1


def divisions(sequences: int) -> list[int]:
    """List the sizes of micro-batches that divide a rank's sequences as evenly as possible, the largest first."""
    sizes = [sequences]
    while sizes[-1] > 1:
        count = -(-sequences // (sizes[-1] - 1))  # the fewest micro-batches that are smaller
        sizes.append(-(-sequences // count))
    return sizes


def fitted(recipe: Recipe, world_size: int, gpus_per_node: int, memory_gb: float) -> Recipe:
    """Put sizes in place of ``auto``, for devices of ``memory_gb`` GB (1e9 bytes) that need not be there.

    Raises:
        ConfigError: The mesh does not fit the world size.
    """
    if not left_open(recipe):
        return recipe
    degrees, outline = resolve_degrees(recipe.mesh, world_size, gpus_per_node), Outline(recipe)
    sharded = outline.shard(recipe, degrees)
    return with_sizes(recipe, fitting_sizes(recipe, world_size, sharded, memory_gb * 1e9 * (1 - HEADROOM)))
