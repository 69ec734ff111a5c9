"""Sequences of a forward pass for the devices that a run has: ``device_train_microbatch_size: auto``."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from moefoundry.checkpoint.ranks import from_every_rank, on_rank_zero
from moefoundry.config import Recipe, load_recipe
from moefoundry.config.curriculum import stages_of
from moefoundry.mesh import resolve_degrees
from moefoundry.planning.micro_batch import HEADROOM, Sizes, fitting_sizes, left_open
from moefoundry.planning.outline import Outline

RECORD = "memory_ended.rank{rank}.json"
"""File in which a rank of an earlier start has written down with which size its memory ended."""

CGROUP = Path("/sys/fs/cgroup")


def sizes_here(recipe: Recipe, device: torch.device, local_world_size: int, config: Path) -> Sizes:
    """Choose sizes for the devices at hand, the same on all ranks: those of the rank with least memory. A collective.

    Args:
        recipe: The recipe.
        device: This rank's device.
        local_world_size: Ranks of this node.
        config: The run's copy of its recipe. A run that goes on keeps the sizes in it, or takes half of one with which
            memory has ended on a rank.
    """
    stages = left_open(recipe)
    if not stages:
        return {}
    ranks = from_every_rank(device_memory(device, local_world_size))
    degrees = resolve_degrees(recipe.mesh, len(ranks), local_world_size)
    sharded = Outline(recipe).shard(recipe, degrees)
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
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
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
