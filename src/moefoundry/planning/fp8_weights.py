"""Bytes of the weights that FP8 training keeps quantized, or gathers so: ``fp8_weights.py``, ``fp8_gather.py``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING

from moefoundry.config import Fp8Backend, Fp8Recipe, Recipe
from moefoundry.ops.sizes import num_tiles
from moefoundry.planning.weights import Weight

if TYPE_CHECKING:
    from moefoundry.planning.outline import ShardedOutline

NEVER = ("router.gate", "beta_proj", "decay_proj", "shared_gate")
"""Linear layers of blocks that have no FP8 form."""


def kept_bytes(sharded: ShardedOutline, recipe: Recipe) -> int:
    """Compute the bytes of rank 0, with the transposed copies that kernels read; exact if all weights train.

    Shards that are gathered in FP8 are kept without such copies.
    Of frozen weights those below the first adapter need no transposed copy, which is counted nevertheless.
    """
    fp8, degrees = recipe.precision.fp8, sharded.degrees
    if fp8.recipe != Fp8Recipe.deepseek_v3:
        return 0
    copies = 1 if fp8.backend == Fp8Backend.reference else 2
    of_experts, others = sharded.outline.bytes_in_fp8(tuple(fp8.exclude))
    whole_experts = degrees.shard == degrees.expert
    kept = (of_experts // degrees.expert if whole_experts else 0) + (others if degrees.shard == 1 else 0)
    return copies * kept + sum(unit.fp8_bytes // unit.shards for unit in sharded.units)


def names_in_fp8(weights: Iterable[tuple[str, Weight]], exclude: Collection[str]) -> frozenset[str]:
    """Collect the names of weights that have an FP8 form and are not excluded."""
    return frozenset(name for name, weight in weights if _has_blocks(name, weight) and not _excluded(name, exclude))


def block_bytes(shape: Sequence[int]) -> int:
    """Compute the bytes of a weight in blocks."""
    *matrices, rows, columns = shape
    return prod(shape) + prod(matrices) * num_tiles(rows) * num_tiles(columns)


def bytes_in_fp8(weights: Iterable[tuple[str, Weight]], exclude: Collection[str]) -> tuple[int, int]:
    """Compute the bytes of experts' weights in blocks, and of all others that have an FP8 form and are not excluded."""
    of_experts = others = 0
    for name, weight in weights:
        if not _has_blocks(name, weight) or _excluded(name, exclude):
            continue
        nbytes = block_bytes(weight.shape)
        if weight.of_experts:
            of_experts += nbytes
        else:
            others += nbytes
    return of_experts, others


def _has_blocks(name: str, weight: Weight) -> bool:
    if weight.of_experts:
        return len(weight.shape) == 3 and ".lora." not in name
    return weight.linear and name.startswith(("layers.", "mtp.")) and not name.removesuffix(".weight").endswith(NEVER)


def _excluded(name: str, exclude: Collection[str]) -> bool:
    """Tell if a pattern names the module of a parameter, or one around it."""
    parts = name.split(".")[:-1]
    modules = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(fnmatchcase(module, pattern) for module in modules for pattern in exclude)
