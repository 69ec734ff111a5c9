"""Check: a run that is killed goes on as if it had not been, and its state fits every mesh, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moefoundry.build import build_trainer
from moefoundry.checkpoint.out_of_core import StoredTensors
from moefoundry.checkpoint.run_dir import store_of
from moefoundry.checkpoint.state import optimizer_tensors, trained_tensors
from moefoundry.config import Compute, MeshConfig, MuonConfig, Recipe
from moefoundry.verify.meshes import named
from moefoundry.verify.ranks import World
from moefoundry.verify.result import Result, located
from moefoundry.verify.runs import (
    SHARED,
    first_difference,
    metrics,
    prepared,
    recipe_of_run,
    run,
    train_quietly,
    wait_for_batch,
)
from moefoundry.verify.twin import BATCHES, Twin

KILLED_AFTER = 3
FROM = 4
MESHES = ((1, MeshConfig(1, 1, 1)), (2, MeshConfig(2, 1, 1)), (2, MeshConfig(1, 2, 1)))
"""Other meshes than that of the run."""
EXACT_BOUND, ROUNDED_BOUND = 1e-4, 2e-2
"""Relative, of losses some steps after a resume on another mesh: in fp32, and where products or updates are rounded."""
FOLLOWED = ("loss/train/total", "loss/train/lm", "loss/train/dpo")


def check(twin: Twin) -> Iterator[Result]:
    """Train, kill and go on; then go on from a checkpoint on other meshes."""
    prepared(twin)
    whole = recipe_of_run(twin, "whole", SHARED)
    run(twin, whole)
    yield after_a_kill(twin, Path(whole.run_dir))
    yield from on_other_meshes(twin, Path(whole.run_dir))


def after_a_kill(twin: Twin, whole: Path) -> Result:
    """Kill a run with SIGKILL in the middle, go on, and compare every batch since the checkpoint."""
    claim = "after SIGKILL every later batch has the same bits"
    recipe = recipe_of_run(twin, "killed", SHARED, autoresume=True)
    run_dir = Path(recipe.run_dir)
    with World(train_quietly, recipe, ranks=2, room=twin.room, gpu=twin.gpu) as world:
        wait_for_batch(world, run_dir, KILLED_AFTER)
        world.kill()
    saved = store_of(run_dir).batches()[-1]
    if saved >= BATCHES:
        return Result(claim, False, detail="the run had ended before it was killed")
    run(twin, recipe)
    expected = {batch: values for batch, values in metrics(whole).items() if batch > saved}
    first, _ = first_difference(metrics(run_dir), expected)
    detail = first or f"batches {saved + 1} to {BATCHES}, killed in one after batch {KILLED_AFTER}"
    return Result(claim, not first, detail=detail)


def on_other_meshes(twin: Twin, whole: Path) -> Iterator[Result]:
    """Go on from a checkpoint on other meshes."""
    checkpoint = store_of(whole).path(FROM)
    differing, worst, losses = "", 0.0, ""
    exact = twin.recipe.precision.compute == Compute.fp32 and twin.recipe.precision.fp8.recipe is None
    exact = exact and not isinstance(twin.recipe.optimizer, MuonConfig)
    bound = EXACT_BOUND if exact else ROUNDED_BOUND
    expected = followed(metrics(whole))
    for number, (ranks, mesh) in enumerate(MESHES):
        recipe = recipe_of_run(twin, f"mesh{number}", mesh, ranks, load_path=str(checkpoint))
        with World(resumed, recipe, checkpoint, ranks=ranks, room=twin.room, gpu=twin.gpu) as world:
            found = world.results()[0]
        differing = differing or (f"{named(mesh)}: {found}" if found else "")
        first, size = first_difference(followed(metrics(Path(recipe.run_dir))), expected, bound)
        losses, worst = losses or (f"{named(mesh)}: {first}" if first else ""), max(worst, size)
    meshes = f"{len(MESHES)} other meshes"
    yield Result("its state is the same on other meshes, bit for bit", not differing, detail=differing or meshes)
    claim = "training goes on there with the same losses"
    if drawn := draws(twin.recipe):
        yield Result(claim, None, detail=f"{drawn} draws other numbers on other ranks")
    else:
        detail = losses or f"batches {FROM + 1} to {BATCHES} on {meshes}"
        yield Result(claim, not losses, worst, bound, detail)


def followed(batches: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Keep the losses of the batches after the checkpoint."""
    return {
        batch: {name: value for name, value in values.items() if name in FOLLOWED}
        for batch, values in batches.items()
        if batch > FROM
    }


def draws(recipe: Recipe) -> str:
    """Name the key with which ranks draw random numbers in training; empty if none does."""
    router = recipe.model.moe.router
    if router.draws:
        return f"model.moe.router.{'input_jitter' if router.input_jitter else 'sampled'}"
    return "lora.dropout" if recipe.lora is not None and recipe.lora.dropout else ""


def resumed(recipe: Recipe, checkpoint: Path) -> str:
    """Load a checkpoint and train on; name the first tensor that is not what the checkpoint holds."""
    trainer = build_trainer(recipe)
    state = trainer.state
    tensors = {**trained_tensors(state.model), **optimizer_tensors(state.model, state.optimizers[0])}
    stored = StoredTensors(checkpoint)
    first = ""
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0 and not first and not torch.equal(whole.cpu(), stored.read(name)):
            first = located(name)
    trainer.fit()
    trainer.close()
    return first
