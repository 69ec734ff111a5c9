"""Check: FP8 stays near BF16, by losses of a few steps and by the gradients of the first.

For the gradients, experts are dealt in turn in both precisions: a choice between experts whose scores are nearly equal
flips by any rounding, and a flipped choice is another gradient, not a worse one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moefoundry.config import Assignment, Compute, Fp8Config, MeshConfig, Recipe
from moefoundry.verify.meshes import gradient_difference
from moefoundry.verify.ranks import World
from moefoundry.verify.result import Difference, Result, difference, within
from moefoundry.verify.steps import Step, train
from moefoundry.verify.twin import Twin, without_draws

STEPS = 4
LOSS_BOUND = 2.5e-3
"""Relative: what DeepSeek-V3 found for losses of training (arXiv 2412.19437, section 3.3)."""
GRADIENT_BOUND = 0.3
"""Relative, of all together. A product of FP8 operands has noise of 4%, and some 25 of them, forward and backward, lie
between the ends of a twin: together 20%. A wrong scale makes more than 100%."""


def check(twin: Twin) -> Iterator[Result]:
    """Compare both precisions on one rank."""
    recipe = replace(without_draws(twin.recipe), mesh=MeshConfig(1, 1, 1))
    kind = recipe.precision.fp8.recipe
    if kind is None:
        yield Result("FP8 stays near BF16", None, detail="precision.fp8.recipe is null")
        return
    with World(in_both, recipe, ranks=1, room=twin.room, gpu=twin.gpu) as world:
        fp8, bf16, fp8_dealt, bf16_dealt = world.results()[0]
    mine, theirs = (sum(step.losses["total"].item() for step in steps) for steps in (fp8, bf16))
    size = abs(mine / theirs - 1)
    mean = Difference(f"the mean loss of {STEPS} steps", size, size)
    yield within(f"losses in FP8 ({kind}) are near those in BF16", mean, LOSS_BOUND, f"mean of {STEPS} steps")
    whole = gradient_difference(fp8_dealt, bf16_dealt)
    each = difference(fp8_dealt[0].gradients, bf16_dealt[0].gradients, GRADIENT_BOUND)
    detail = f"all together; most in {each.name}, {each.worst:.1e}"
    yield within("so are gradients", replace(each, worst=whole), GRADIENT_BOUND, detail)


def in_both(recipe: Recipe) -> list[list[Step]]:
    """Train in FP8 and in BF16, with the router's choice, then with experts dealt in turn."""
    precision = recipe.precision
    compute = Compute.bf16_emulated if precision.compute == Compute.fp32 else precision.compute
    plain = replace(recipe, precision=replace(precision, compute=compute, fp8=Fp8Config()))
    found = [train(each, STEPS) for each in (recipe, plain)]
    return found + [train(dealt(each), 1) for each in (recipe, plain)]


def dealt(recipe: Recipe) -> Recipe:
    """Deal experts in turn."""
    moe = recipe.model.moe
    moe = replace(moe, router=replace(moe.router, assignment=Assignment.uniform))
    return replace(recipe, model=replace(recipe.model, moe=moe))
