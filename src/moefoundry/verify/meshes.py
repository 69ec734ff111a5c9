"""Check: losses, gradients and the step after them are the same on every factorization of the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moefoundry.config import AuxLossScope, Compute, MeshConfig, MoEConfig, MuonConfig, Recipe
from moefoundry.verify.ranks import World
from moefoundry.verify.result import Difference, Result, difference, within
from moefoundry.verify.steps import STEPS, Step, rows_at_once, train_on
from moefoundry.verify.twin import Twin, exact, without_draws

LOSS_BOUND, GRADIENT_BOUND, LATER_BOUND, MUON_BOUND = 1e-6, 2e-5, 1e-5, 1e-3
"""Relative, in fp32: sums in another order, forward, through a backward pass, and through an optimizer step; the last
through one of Muon, where they are rounded to BF16."""
ROUNDINGS, NOISE = 2.0, 0.3
"""Roundings of two meshes differ by no more than this many times what they change of the fp32 result; nor by more than
this share: a few choices between experts of nearly equal scores flip."""
ONE = MeshConfig(1, 1, 1)


def check(twin: Twin) -> Iterator[Result]:
    """Compare every mesh with one rank, in fp32; then in the recipe's precision."""
    worlds = [2**power for power in range(1, twin.ranks.bit_length()) if 2**power <= twin.ranks]
    recipe = comparable(exact(twin.recipe), twin.ranks)
    single = steps_on(twin, recipe, 1, [ONE])[0]
    found = {mesh: steps for size in worlds for mesh, steps in on_all_meshes(twin, recipe, size)}
    yield loss_result("losses are those of one rank", found, single)
    yield gradient_result("gradients are those of one rank", found, single, GRADIENT_BOUND)
    later = MUON_BOUND if isinstance(recipe.optimizer, MuonConfig) else LATER_BOUND
    yield loss_result("losses after the optimizer's step, too", found, single, 1, later)
    precision = twin.recipe.precision
    if precision.compute == Compute.fp32 and precision.fp8.recipe is None:
        return
    recipe = comparable(without_draws(twin.recipe), twin.ranks)
    rounded = steps_on(twin, recipe, 1, [ONE], 1)[0]
    meshes = mixed(factorizations(twin.ranks, recipe.model.moe.num_experts))
    steps = steps_on(twin, recipe, twin.ranks, meshes, 1)
    largest = dict(zip(map(named, meshes), steps, strict=True))
    bound = min(NOISE, ROUNDINGS * gradient_difference(rounded, single))
    name = f"{precision.compute}" + (f" and FP8 {precision.fp8.recipe}" if precision.fp8.recipe else "")
    yield whole_result(f"gradients in {name} differ by no more than by rounding", largest, rounded, bound)


def comparable(recipe: Recipe, ranks: int) -> Recipe:
    """Drop no slots, where micro-batches are not the same on every mesh: a capacity depends on them by definition."""
    if recipe.model.moe.balance.aux_loss_scope != AuxLossScope.global_batch:
        return recipe
    moe: MoEConfig = replace(recipe.model.moe, capacity_factor=None)
    return replace(recipe, model=replace(recipe.model, moe=moe))


def factorizations(ranks: int, num_experts: int) -> list[MeshConfig]:
    """List every mesh of so many ranks, and those whose experts span two pretended nodes."""
    degrees = [n for n in range(1, ranks + 1) if ranks % n == 0]
    meshes = [
        MeshConfig(ranks // shard, shard, expert)
        for shard in degrees
        for expert in degrees
        if shard % expert == 0 and num_experts % expert == 0
    ]
    return meshes + [replace(mesh, ranks_per_node=mesh.expert // 2) for mesh in meshes if mesh.expert >= 4]


def mixed(meshes: list[MeshConfig]) -> list[MeshConfig]:
    """Choose few meshes that have all axes: the one with the most of them, and the last."""
    most = max(
        meshes, key=lambda mesh: ((mesh.replicate > 1) + (mesh.shard > mesh.expert) + (mesh.expert > 1), mesh.expert)
    )
    return [most, *([meshes[-1]] if meshes[-1] != most else [])]


def on_all_meshes(twin: Twin, recipe: Recipe, ranks: int) -> Iterator[tuple[str, list[Step]]]:
    """Train on all meshes of a world, which is started once; give the name of each and its steps."""
    meshes = factorizations(ranks, recipe.model.moe.num_experts)
    for mesh, steps in zip(meshes, steps_on(twin, recipe, ranks, meshes), strict=True):
        yield named(mesh), steps


def steps_on(twin: Twin, recipe: Recipe, ranks: int, meshes: list[MeshConfig], steps: int = STEPS) -> list[list[Step]]:
    """Run a world that trains on meshes."""
    rows = rows_at_once(recipe, ranks)
    with World(train_on, recipe, meshes, rows, steps, ranks=ranks, room=twin.room, gpu=twin.gpu) as world:
        found: list[list[Step]] = world.results()[0]
        return found


def named(mesh: MeshConfig) -> str:
    """Name a mesh by its degrees."""
    hops = " in two hops" if mesh.ranks_per_node else ""
    return f"replicate {mesh.replicate} x shard {mesh.shard}, expert {mesh.expert}{hops}"


def loss_result(
    claim: str, found: dict[str, list[Step]], single: list[Step], step: int = 0, bound: float = LOSS_BOUND
) -> Result:
    """Compare the losses of a step."""
    scale = max(1.0, single[step].losses["total"].abs().item())
    worst, where = Difference("total", 0.0, 0.0), ""
    for mesh, steps in found.items():
        for name, loss in single[step].losses.items():
            size = (steps[step].losses[name] - loss).abs().item() / max(loss.abs().item(), LOSS_BOUND * scale)
            if not size <= worst.worst:
                worst, where = Difference(f"loss {name}", size, size), mesh
    return within(claim, worst, bound, f"{len(found)} meshes", where)


def gradient_result(claim: str, found: dict[str, list[Step]], single: list[Step], bound: float) -> Result:
    """Compare every gradient of the first step."""
    worst, where = Difference("none", 0.0, 0.0), ""
    for mesh, steps in found.items():
        size = difference(steps[0].gradients, single[0].gradients, bound)
        if not size.worst <= worst.worst:
            worst, where = size, mesh
    return within(claim, worst, bound, f"{len(single[0].gradients)} tensors, {len(found)} meshes", where)


def whole_result(claim: str, found: dict[str, list[Step]], single: list[Step], bound: float) -> Result:
    """Compare all gradients together: a flipped choice of experts is large beside single ones."""
    sizes = {mesh: gradient_difference(steps, single) for mesh, steps in found.items()}
    mesh = max(sizes, key=sizes.__getitem__)
    first = difference(found[mesh][0].gradients, single[0].gradients, bound)
    return within(claim, replace(first, worst=sizes[mesh]), bound, f"{len(found)} meshes", mesh)


def gradient_difference(steps: list[Step], expected: list[Step]) -> float:
    """Divide the norm of the difference of all gradients by the norm of all."""
    mine, theirs = steps[0].gradients, expected[0].gradients
    square = sum((mine[name].double() - theirs[name].double()).square().sum().item() for name in theirs)
    norm = sum(theirs[name].double().square().sum().item() for name in theirs)
    return float((square / norm) ** 0.5)
