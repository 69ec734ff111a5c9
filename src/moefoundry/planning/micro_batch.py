"""Sequences of a forward pass, where a recipe leaves them to the run: ``device_train_microbatch_size: auto``.

The largest of the even divisions of a rank's sequences is taken whose planned memory fits the device, with some left
free. Learning is the same with any; fewer, larger micro-batches are faster. What a plan cannot know, such as tokens
that gather on one rank, may still end the memory: training then takes smaller ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from moefoundry.checkpoint.ranks import from_every_rank, on_rank_zero
from moefoundry.config import Auto, Recipe, load_recipe
from moefoundry.config.curriculum import Stage, of_stage, stages_of
from moefoundry.mesh import Meshes, resolve_degrees
from moefoundry.planning.memory import memory
from moefoundry.planning.outline import Outline, ShardedOutline
from moefoundry.planning.world import fake_world

HEADROOM = 0.08
"""Share of a device's memory that is left for what a plan does not count: CUDA's context, buffers of NCCL, gaps."""

RECORD = "memory_ended.rank{rank}.json"
"""File in which a rank of an earlier start has written down with which size its memory ended."""

CGROUP = Path("/sys/fs/cgroup")

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
        fits = (size for size in divisions(stage.batch_size // world_size) if _total(sharded, alike, size) <= limit)
        sizes[stage.name] = next(fits, 1)
    return sizes


def divisions(sequences: int) -> list[int]:
    """List the sizes of micro-batches that divide a rank's sequences as evenly as possible, the largest first."""
    return sorted({-(-sequences // count) for count in range(1, sequences + 1)}, reverse=True)


def _total(sharded: ShardedOutline, recipe: Recipe, size: int) -> int:
    return memory(sharded, recipe, size).total


def fitted(recipe: Recipe, world_size: int, gpus_per_node: int, memory_gb: float) -> Recipe:
    """Put sizes in place of ``auto``, for devices of ``memory_gb`` GB (1e9 bytes) that need not be there.

    Raises:
        ConfigError: The mesh does not fit the world size.
    """
    if not left_open(recipe):
        return recipe
    degrees, outline = resolve_degrees(recipe.mesh, world_size, gpus_per_node), Outline(recipe)
    with fake_world(world_size):
        sharded = outline.shard(recipe, degrees)
    return with_sizes(recipe, fitting_sizes(recipe, world_size, sharded, memory_gb * 1e9 * (1 - HEADROOM)))


def sizes_here(
    recipe: Recipe, meshes: Meshes | None, device: torch.device, local_world_size: int, config: Path
) -> Sizes:
    """Choose sizes for the devices at hand, the same on all ranks: those of the rank with least memory. A collective.

    Args:
        recipe: The recipe.
        meshes: The run's meshes.
        device: This rank's device.
        local_world_size: Ranks of this node.
        config: The run's copy of its recipe. A run that goes on keeps the sizes in it, or takes half of one with which
            memory has ended on a rank.
    """
    stages = left_open(recipe)
    if not stages:
        return {}
    ranks = from_every_rank(device_memory(device, local_world_size))
    sharded = Outline(recipe).shard_on(recipe, meshes)
    chosen = fitting_sizes(recipe, len(ranks), sharded, min(ranks) * (1 - HEADROOM))
    kept, too_large = on_rank_zero(lambda: (_kept(config), _too_large(config.parent)))
    most = {stage.name: stage.batch_size // len(ranks) for stage in stages}
    most |= {name: min(most[name], max(1, -(-size // 2))) for name, size in too_large.items() if name in most}
    sizes = {name: min(kept.get(name, size), most[name]) for name, size in chosen.items()}
    return dict(on_rank_zero(lambda: sizes))


def _kept(config: Path) -> Sizes:
    """Read the sizes of a run's copy of its recipe; none where there is no copy."""
    if not config.is_file():
        return {}
    stages = stages_of(load_recipe(config, stored=True))
    return {stage.name: stage.microbatch_size for stage in stages if isinstance(stage.microbatch_size, int)}


def _too_large(run_dir: Path) -> Sizes:
    """Read the sizes with which memory has ended, the smallest of each stage."""
    sizes: Sizes = {}
    for file in run_dir.glob(RECORD.format(rank="*")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads(file.read_text())
            sizes[facts["stage"]] = min(int(facts["size"]), sizes.get(facts["stage"], int(facts["size"])))
    return sizes


def device_memory(device: torch.device, local_world_size: int) -> int:
    """Measure the bytes that this rank may have: what is free on its GPU, or its share of what is free on a host.

    Args:
        device: The rank's device.
        local_world_size: Ranks that share the memory of a host.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        limit, used = "max", "0"
    return int(free if limit == "max" else min(free, int(limit) - int(used))) // local_world_size
