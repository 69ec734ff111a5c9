"""Rules of the mesh: its degrees, the world size, and the experts. Recipes, meshes and plans follow them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moefoundry.config.errors import Problem
from moefoundry.config.schema_parts import MeshConfig


def degree_problems(mesh: MeshConfig, world_size: int | None) -> Iterator[Problem]:
    """List why ``replicate`` and ``shard`` do not make up the world size."""
    degrees = {"mesh.replicate": mesh.replicate, "mesh.shard": mesh.shard}
    for path, degree in degrees.items():
        if degree == 0 or degree < -1:
            yield Problem(path, f"got {degree}", allowed="a positive integer, or -1 for the ranks that remain")
    if any(degree == 0 or degree < -1 for degree in degrees.values()):
        return
    if mesh.replicate == mesh.shard == -1:
        yield Problem("mesh.shard", "mesh.replicate and mesh.shard are both -1", allowed="at most one -1")
        return
    if world_size is None:
        return
    product = mesh.replicate * mesh.shard
    if product < 0 and world_size % -product:
        path, known = ("mesh.replicate", mesh.replicate) if mesh.shard == -1 else ("mesh.shard", mesh.shard)
        yield Problem(path, f"{known} does not divide the world size {world_size}", allowed=divisors(world_size))
    if product > 0 and product != world_size:
        message = f"mesh.replicate * mesh.shard is {mesh.replicate} * {mesh.shard} = {product}"
        yield Problem("mesh.shard", message, allowed=f"the world size, {world_size}")


def expert_problems(mesh: MeshConfig, world_size: int | None, sizes: dict[str, int]) -> Iterator[Problem]:
    """List why experts are not divided evenly among ranks that share one copy of the model.

    ``expert`` has to divide ``shard`` and ``sizes``, which are named by their keys.
    """
    expert, sizes = mesh.expert, dict(sizes)
    if expert < 1:
        yield Problem("mesh.expert", f"got {expert}", allowed="a positive integer")
        return
    if (shard := shard_degree(mesh, world_size)) is not None:
        sizes[f"mesh.shard, {shard}" + (f" of {world_size} ranks" if world_size else "")] = shard
    broken = [name for name, size in sizes.items() if size % expert]
    if broken:
        message = f"{expert} does not divide {', nor '.join(broken)}"
        yield Problem("mesh.expert", message, allowed=divisors(math.gcd(*sizes.values())))


def shard_degree(mesh: MeshConfig, world_size: int | None) -> int | None:
    """``mesh.shard``, inferred from the world size if it is -1; None if that cannot be."""
    replicate, shard = mesh.replicate, mesh.shard
    if shard > 0:
        return shard
    if shard == -1 and replicate > 0 and world_size and world_size % replicate == 0:
        return world_size // replicate
    return None


def divisors(number: int) -> str:
    """List the divisors of ``number``, for a message."""
    if number > 10_000:
        return f"a divisor of {number}"
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
