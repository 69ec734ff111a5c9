"""Message of a rank whose memory has ended: plan and use side by side, and the smallest change that fits.

The change is sought on the run's own mesh: a smaller micro-batch, more activation checkpointing, or both. Where the
run has used more than the plan says, so it is taken to do with the change. ``moefoundry recommend`` tries other meshes.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moefoundry.config import ActivationCheckpointing, Auto, Recipe
from moefoundry.config.curriculum import KEY as CURRICULUM
from moefoundry.config.curriculum import of_stage, stage_at, stages_of
from moefoundry.mesh import MeshDegrees
from moefoundry.planning.memory import Memory, memory
from moefoundry.planning.micro_batch import divisions
from moefoundry.planning.outline import Outline, ShardedOutline
from moefoundry.planning.table import GIB, columns
from moefoundry.planning.this_device import RECORD
from moefoundry.retry import forget_step

LARGE = 0.1
"""Share of the device's memory above which gaps, or the memory of others, are named as the cause."""

BEYOND = 1.05
"""Factor above the plan from which a kind is named as the cause."""


@dataclass(frozen=True)
class Allocator:
    """Bytes of a device, as its allocator and its driver have them.

    Attributes:
        peak: Most that tensors of this process have had at a time.
        reserved: Held by this process.
        free: Free on the device.
        total: Of the device.
    """

    peak: int
    reserved: int
    free: int
    total: int


@dataclass(frozen=True)
class Usage:
    """Bytes of a device when its memory ended, by kind.

    Attributes:
        parameters, gradients, optimizer: Shards of this rank.
        transient: All other tensors at their peak: activations, gathered parameters, unreduced gradients, logits.
        gaps: Held by the allocator, and in no tensor at the peak.
        others: Of CUDA itself and of other processes.
        total: Of the device.
    """

    parameters: int
    gradients: int
    optimizer: int
    transient: int
    gaps: int
    others: int
    total: int


def allocator(device: torch.device) -> Allocator:
    """Read the figures of a device; for the CPU those of this process and its host."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Allocator(torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device), free, total)
    host, peak = psutil.virtual_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Allocator(peak, peak, host.available, host.total)


def measure(model: nn.Module, optimizer: Optimizer, device: torch.device) -> Usage:
    """Measure what a run uses whose step has failed for want of memory; the step is forgotten."""
    found = allocator(device)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = _bytes(parameter.grad for parameter in trained if parameter.grad is not None)
    state = _bytes(value for slots in optimizer.state.values() for value in slots.values() if isinstance(value, Tensor))
    forget_step(model, release=False)
    parameters = _bytes(model.parameters())
    return Usage(
        parameters=parameters,
        gradients=gradients,
        optimizer=state,
        transient=max(0, found.peak - parameters - gradients - state),
        gaps=max(0, found.reserved - found.peak),
        others=max(0, found.total - found.free - found.reserved),
        total=found.total,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def explain(recipe: Recipe, degrees: MeshDegrees, batch: int, used: Usage) -> str:
    """Put the plan beside what was used, and name the kind that is beyond and the smallest change that fits.

    Args:
        recipe: The recipe, with the size of its micro-batch.
        degrees: Degrees of the run's mesh.
        batch: Batch in which memory ended, from 0.
        used: What was used.
    """
    stage = stage_at(stages_of(recipe), batch)
    alike = of_stage(recipe, stage)
    sharded = Outline(recipe).shard(recipe, degrees)
    planned = memory(sharded, alike, _size(alike))
    changes = smallest_change(alike, sharded, degrees.world_size, used)
    key = f"{CURRICULUM}.{stage.name}." if stage.name else ""
    words = " ".join(f"{key if name.startswith('device') else ''}{name}={value}" for name, value in changes.items())
    more = f"moefoundry recommend RECIPE --world-size {degrees.world_size}"
    change = f"smallest change that fits: {words}" if words else f"on this mesh nothing fits; others: {more}"
    return "\n".join([*_table(planned, used), cause(planned, used), change])


def _table(planned: Memory, used: Usage) -> list[str]:
    rows = [
        ("parameters", planned.parameters, used.parameters),
        ("gradients", planned.gradients, used.gradients),
        ("optimizer state", planned.optimizer, used.optimizer),
        ("activations, gathered parameters, logits", planned.peak.total, used.transient),
        ("gaps in the allocator", 0, used.gaps),
        ("CUDA, other processes", 0, used.others),
    ]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    shown = [(name, *(f"{value / GIB:,.2f}" for value in values)) for name, *values in rows]
    return columns([(f"of {used.total / GIB:,.2f} GiB", "planned", "used"), *shown])


def cause(planned: Memory, used: Usage) -> str:
    """Name what takes more than it should."""
    if used.others > LARGE * used.total:
        return f"other processes have {used.others / GIB:,.2f} GiB of this device"
    kinds = {
        "parameters": (planned.parameters, used.parameters),
        "gradients": (planned.gradients, used.gradients),
        "optimizer state": (planned.optimizer, used.optimizer),
        "activations, gathered parameters and logits": (planned.peak.total, used.transient),
    }
    over = {name: (was, now) for name, (was, now) in kinds.items() if now > BEYOND * was}
    if over:
        name, (was, now) = max(over.items(), key=lambda item: item[1][1] - item[1][0])
        return f"beyond the plan: {name}, by {(now - was) / GIB:,.2f} GiB"
    if used.gaps > LARGE * used.total:
        return "the allocator's gaps are large: set PYTORCH_ALLOC_CONF=expandable_segments:True"
    return "nothing is beyond the plan: it does not fit this device"


def smallest_change(recipe: Recipe, sharded: ShardedOutline, world_size: int, used: Usage) -> dict[str, object]:
    """Find the keys to change, with their values: as few as possible, and the largest micro-batch; empty if none do."""
    size, mode = _size(recipe), recipe.activation_checkpointing
    planned = memory(sharded, recipe, size)
    ratio = max(1.0, used.transient / planned.peak.total)
    room = used.total - used.others - used.gaps
    modes = [*ActivationCheckpointing]
    later, smaller = modes[modes.index(mode) + 1 :], divisions(recipe.global_train_batch_size // world_size)
    smaller = [each for each in smaller if each < size]
    tries = [(mode, each) for each in smaller]
    tries += [(more, size) for more in later]
    tries += [(more, each) for more in later for each in smaller]
    for tried_mode, tried in tries:
        found = memory(sharded, replace(recipe, activation_checkpointing=tried_mode), tried)
        if found.total - found.peak.total + ratio * found.peak.total <= room:
            keys: dict[str, object] = {"activation_checkpointing": tried_mode} if tried_mode != mode else {}
            return keys | ({"device_train_microbatch_size": tried} if tried != size else {})
    return {}


def _size(recipe: Recipe) -> int:
    size = recipe.device_train_microbatch_size
    assert not isinstance(size, Auto), "training has chosen it"
    return size


def record(run_dir: Path, rank: int, recipe: Recipe, batch: int, size: int, used: Usage) -> None:
    """Write down that memory has ended: a run that chooses its micro-batch begins with a smaller one the next time.

    Nothing is said where the file cannot be written: there is worse to say.
    """
    facts = {"batch": batch + 1, "stage": stage_at(stages_of(recipe), batch).name, "size": size, "used": asdict(used)}
    with suppress(OSError):
        (run_dir / RECORD.format(rank=rank)).write_text(json.dumps(facts, indent=2) + "\n")
