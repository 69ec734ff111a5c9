"""Advice on recipes: what is allowed but seldom meant, and how to fit another number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from moefoundry.config.checks import check_recipe
from moefoundry.config.errors import Problem
from moefoundry.config.schema import Recipe
from moefoundry.config.schema_model import Assignment

KEYS_OF_RANKS = ("mesh.replicate", "mesh.shard", "mesh.expert", "global_train_batch_size")


def advice(recipe: Recipe) -> list[Problem]:
    """Warn of settings that train as they say but are seldom meant, each with its cure as the suggestion."""
    moe = recipe.model.moe
    router = moe.router
    gate_chooses = moe.num_experts > 1 and router.assignment == Assignment.scores
    if not (moe.top_k == 1 and router.normalize_topk and gate_chooses):
        return []
    message = "true, and with model.moe.top_k=1 every weight is 1: the gate learns nothing from the model's loss"
    return [Problem("model.moe.router.normalize_topk", message, suggestion="model.moe.router.normalize_topk=false")]


def fit_advice(recipe: Recipe, problems: list[Problem], world_size: int) -> str:
    """Say how a recipe whose ``problems`` come of its number of ranks alone would fit ``world_size``; or nothing."""
    if not {problem.path for problem in problems} <= {*KEYS_OF_RANKS}:
        return ""
    overrides = fitting_overrides(recipe, world_size)
    return f"a world size of {world_size} fits with: {' '.join(overrides)}" if overrides else ""


def fitting_overrides(recipe: Recipe, world_size: int) -> list[str]:
    """Find overrides of :data:`KEYS_OF_RANKS`, as few as do, with which ``recipe`` fits ``world_size`` ranks.

    The experts are on as many ranks as the recipe says, or else on the most below; then the same holds for ``shard``;
    the global batch is the nearest from above. The list is empty if nothing fits.
    """
    batch = -(-recipe.global_train_batch_size // world_size) * world_size
    for replicate, shard, expert in _degrees(recipe, world_size):
        mesh = replace(recipe.mesh, replicate=replicate, shard=shard, expert=expert)
        if not check_recipe(replace(recipe, mesh=mesh, global_train_batch_size=batch), world_size):
            before = (recipe.mesh.replicate, recipe.mesh.shard, recipe.mesh.expert, recipe.global_train_batch_size)
            pairs = zip(KEYS_OF_RANKS, before, (replicate, shard, expert, batch), strict=True)
            return [f"{key}={value}" for key, old, value in pairs if old not in (value, -1)]
    return []


def _degrees(recipe: Recipe, world_size: int) -> Iterator[tuple[int, int, int]]:
    """Yield ``(replicate, shard, expert)``, the best first."""
    mesh, num_experts = recipe.mesh, recipe.model.moe.num_experts
    largest = mesh.shard if mesh.shard > 0 else world_size
    shards = [shard for shard in range(min(largest, world_size), 0, -1) if world_size % shard == 0]
    for expert in range(min(mesh.expert, world_size, num_experts), 0, -1):
        for shard in shards:
            if math.gcd(shard, num_experts) % expert == 0:
                yield world_size // shard, shard, expert
