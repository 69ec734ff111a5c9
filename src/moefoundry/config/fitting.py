"""Degrees that a recipe for one number of ranks could have on another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from moefoundry.config.checks import check_recipe
from moefoundry.config.schema import Recipe

KEYS = ("mesh.replicate", "mesh.shard", "mesh.expert", "global_train_batch_size")


def fitting_overrides(recipe: Recipe, world_size: int) -> list[str]:
    """Overrides of :data:`KEYS`, as few as do, with which ``recipe`` fits ``world_size`` ranks, if any.

    Of what is possible: experts over as many ranks as the recipe says, or else the most below; then the same of
    ``shard``; and the global batch that is nearest from above.
    """
    batch = -(-recipe.global_train_batch_size // world_size) * world_size
    for replicate, shard, expert in _degrees(recipe, world_size):
        mesh = replace(recipe.mesh, replicate=replicate, shard=shard, expert=expert)
        if not check_recipe(replace(recipe, mesh=mesh, global_train_batch_size=batch), world_size):
            before = (recipe.mesh.replicate, recipe.mesh.shard, recipe.mesh.expert, recipe.global_train_batch_size)
            pairs = zip(KEYS, before, (replicate, shard, expert, batch), strict=True)
            return [f"{key}={value}" for key, old, value in pairs if old not in (value, -1)]
    return []


def _degrees(recipe: Recipe, world_size: int) -> Iterator[tuple[int, int, int]]:
    """(replicate, shard, expert), the best first."""
    mesh, num_experts = recipe.mesh, recipe.model.moe.num_experts
    largest = mesh.shard if mesh.shard > 0 else world_size
    shards = [shard for shard in range(min(largest, world_size), 0, -1) if world_size % shard == 0]
    for expert in range(min(mesh.expert, world_size), 0, -1):
        for shard in shards:
            if math.gcd(shard, num_experts) % expert == 0:
                yield world_size // shard, shard, expert
