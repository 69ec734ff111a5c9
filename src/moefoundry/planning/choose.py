"""Search for the mesh, micro-batch, checkpointing, chunks and precision with which an estimate is fastest.

Parameters gathered, or gradients reduced, once a step are tried where the collectives of each micro-batch do not hide.

Every candidate is a recipe that validates and fits. Its learning is that of the given recipe: only a change of
``precision`` may alter a loss by more than rounding, and such a candidate says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moefoundry.config import (
    ActivationCheckpointing,
    Auto,
    Compute,
    ConfigError,
    Gather,
    Moments,
    MuonConfig,
    Problem,
    Recipe,
    Reduce,
    check_recipe,
    flatten,
)
from moefoundry.config.advice import fit_advice
from moefoundry.config.curriculum import KEY as CURRICULUM
from moefoundry.config.schema_parts import Fp8Config, Fp8Recipe, MeshConfig, PrecisionConfig
from moefoundry.mesh import MeshDegrees, resolve_degrees
from moefoundry.planning.devices import Accelerator
from moefoundry.planning.estimate import Estimate, estimate_of
from moefoundry.planning.memory import Memory
from moefoundry.planning.micro_batch import HEADROOM, fitting_sizes, with_sizes
from moefoundry.planning.outline import Outline, ShardedOutline
from moefoundry.planning.plan import plan_of

PERMANENT_BYTES = {Moments.fp32: 16, Moments.bf16: 12, Moments.bf16_stochastic: 12}
"""Bytes of an element's parameter, gradient and two moments."""

PERMANENT_BYTES_OF_MUON = 12
"""Bytes of an element's parameter, gradient and momentum."""

TIMES = [(gather, reduce) for gather in Gather for reduce in Reduce]
"""Times of gathering parameters and of reducing gradients; the first pair is in each micro-batch."""

CHUNKS = (1, 2, 4, 8)
"""Chunks of an exchange of tokens that are tried."""


@dataclass(frozen=True)
class Candidate:
    """A recipe with other keys, and its estimate.

    Attributes:
        changes: Values of the keys that differ from the given recipe, by dotted name.
        estimate: Speed and memory.
    """

    changes: dict[str, Any]
    estimate: Estimate

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.estimate.step.total

    @property
    def same_numbers(self) -> bool:
        """Tell if the recipe's losses stay the same, to rounding."""
        return not any(key.startswith("precision.") for key in self.changes)

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values."""
        return {"changes": self.changes, "same_numbers": self.same_numbers, "estimate": self.estimate.to_json()}


@dataclass(frozen=True)
class Choice:
    """Result of a search.

    Attributes:
        given: The recipe as it is; None if it is not valid for the number of devices.
        problems: Reasons why it is not.
        advice: Overrides with which it would be, in a line; empty if it is, or none are known.
        fits: The recipe as it is fits.
        best: The fastest candidates that fit and leave the precision as it is, each with another mesh.
        other_precision: The fastest that changes the precision; None if it is not faster than the best.
        smallest: The candidate that fits with the fewest changed keys; None if the recipe fits, or nothing does.
        least: The candidate that needs least memory; None where nothing is valid.
        tried: Number of candidates.
    """

    given: Estimate | None
    problems: list[str]
    advice: str
    fits: bool
    best: list[Candidate]
    other_precision: Candidate | None
    smallest: Candidate | None
    least: Candidate | None
    tried: int

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values."""
        return {
            "given": self.given.to_json() if self.given else None,
            "problems": self.problems,
            "advice": self.advice,
            "fits": self.fits,
            "best": [candidate.to_json() for candidate in self.best],
            "other_precision": self.other_precision.to_json() if self.other_precision else None,
            "smallest_change": self.smallest.to_json() if self.smallest else None,
            "least_memory": self.least.to_json() if self.least else None,
            "tried": self.tried,
        }


def choose(
    recipe: Recipe,
    world_size: int,
    device: Accelerator,
    count: int = 3,
    keep_precision: bool = False,
    chunks: Sequence[int] = CHUNKS,
) -> Choice:
    """Search for the ``count`` fastest ways to train ``recipe`` on ``world_size`` devices.

    Args:
        recipe: The recipe. Its mesh and micro-batch need not suit the number of devices.
        world_size: Number of devices.
        device: The accelerator.
        count: Number of results.
        keep_precision: Try no other precision.
        chunks: Chunks of an exchange of tokens to try beside the recipe's own number, where experts are divided.

    Raises:
        ConfigError: The recipe has a curriculum, whose stages may each be fastest in another way.
    """
    if recipe.curriculum is not None:
        message = "its stages may each be fastest in another way; ask for one: curriculum=null, and that stage's sizes"
        raise ConfigError([Problem(CURRICULUM, message, allowed="null")])
    return _Search(recipe, world_size, device, chunks).run(count, keep_precision)


class _Search:
    """A recipe, the devices, and the candidates that were tried."""

    def __init__(self, recipe: Recipe, world_size: int, device: Accelerator, chunks: Sequence[int]) -> None:
        self.recipe, self.world_size, self.device, self.chunks = recipe, world_size, device, chunks
        self.limit = device.memory_gb * 1e9 * (1 - HEADROOM)
        self.outline = Outline(recipe)
        self.own = flatten(recipe)
        self.found: list[Candidate] = []

    def run(self, count: int, keep_precision: bool) -> Choice:
        """Try everything; BF16 moments only where nothing fits without them."""
        problems, given = check_recipe(self.recipe, self.world_size), None
        if not problems:
            degrees = resolve_degrees(self.recipe.mesh, self.world_size, self.device.linked_devices)
            sharded = self.outline.shard(self.recipe, degrees)
            as_run = with_sizes(self.recipe, fitting_sizes(self.recipe, self.world_size, sharded, self.limit))
            given = self._estimate(as_run, degrees, sharded)
            self.own |= {"device_train_microbatch_size": as_run.device_train_microbatch_size}
            self.own |= {f"mesh.{name}": getattr(degrees, name) for name in ("replicate", "shard", "expert")}
        precisions = [self.recipe.precision] if keep_precision else _precisions(self.recipe, self.device)
        self._try(precisions)
        if not keep_precision and not self._fitting() and self.recipe.precision.optimizer_moments == Moments.fp32:
            self._try([replace(each, optimizer_moments=Moments.bf16) for each in precisions])
        fitting = self._fitting()
        fits = given is not None and given.plan.memory.total <= self.limit
        best = _fastest_of_each_mesh([each for each in fitting if each.same_numbers])[:count]
        other = _fastest_of_each_mesh([each for each in fitting if not each.same_numbers])[:1]
        return Choice(
            given=given,
            problems=[str(problem) for problem in problems],
            advice=fit_advice(self.recipe, problems, self.world_size) if problems else "",
            fits=fits,
            best=best,
            other_precision=next((each for each in other if not best or each.seconds < best[0].seconds), None),
            smallest=None if fits else min(fitting, key=_size_of_change, default=None),
            least=min(self.found, key=lambda each: each.estimate.plan.memory.total, default=None),
            tried=len(self.found),
        )

    def _fitting(self, first: int = 0) -> list[Candidate]:
        return [each for each in self.found[first:] if each.estimate.plan.memory.total <= self.limit]

    def _try(self, precisions: list[PrecisionConfig]) -> None:
        """Estimate recipes that validate; micro-batches grow until one does not fit."""
        for mesh in _meshes(self.recipe, self.world_size):
            degrees = resolve_degrees(mesh, self.world_size, self.device.linked_devices)
            sharded: dict[tuple[Any, ...], ShardedOutline] = {}
            for precision in precisions:
                on_mesh = replace(self.recipe, mesh=mesh, precision=precision, device_train_microbatch_size=1)
                if check_recipe(on_mesh, self.world_size) or not self._may_fit(on_mesh, degrees):
                    continue
                first = len(self.found)
                for checkpointing in ActivationCheckpointing:
                    self._try_times(replace(on_mesh, activation_checkpointing=checkpointing), sharded, first)

    def _try_times(self, recipe: Recipe, sharded: dict[tuple[Any, ...], ShardedOutline], first: int) -> None:
        """Gather and reduce in each micro-batch and as the recipe does; if less waiting could be fastest, in every way.

        ``first`` is the first candidate with this mesh and precision.
        """
        own, may_gain = (recipe.mesh.gather, recipe.mesh.reduce), False
        for times in TIMES:
            if times not in (TIMES[0], own) and not may_gain:
                continue
            timed = replace(recipe, mesh=replace(recipe.mesh, gather=times[0], reduce=times[1]))
            degrees = resolve_degrees(timed.mesh, self.world_size, self.device.linked_devices)
            if (kind := (recipe.precision.compute, recipe.precision.fp8.recipe, *times)) not in sharded:
                sharded[kind] = self.outline.shard(timed, degrees)
            known = len(self.found)
            self._try_micro_batches(timed, degrees, sharded[kind])
            fastest = min((each.seconds for each in self._fitting(first)), default=math.inf)
            steps = [each.estimate.step for each in self.found[known:] if each.estimate.plan.micro_batches > 1]
            may_gain = may_gain or any(step.sharding > 0 and step.total - step.sharding < fastest for step in steps)

    def _try_micro_batches(self, recipe: Recipe, degrees: MeshDegrees, sharded: ShardedOutline) -> None:
        keys = flatten(recipe)
        for size in _micro_batches(self.recipe, self.world_size):
            known = None
            for chunks in self._chunks(degrees):
                changed = _with_chunks(replace(recipe, device_train_microbatch_size=size), chunks)
                estimate = self._estimate(changed, degrees, sharded, known)
                known = estimate.plan.memory
                keys |= {"device_train_microbatch_size": size, "model.moe.dispatch_chunks": chunks}
                changes = {key: value for key, value in keys.items() if self.own.get(key) != value}
                self.found.append(Candidate(changes, estimate))
                if estimate.plan.memory.total > self.limit:
                    return

    def _chunks(self, degrees: MeshDegrees) -> list[int]:
        """List numbers of chunks, the recipe's own first; others only where tokens are exchanged."""
        own = self.recipe.model.moe.dispatch_chunks
        return [own, *(chunks for chunks in self.chunks if chunks != own and degrees.expert > 1)]

    def _estimate(
        self, recipe: Recipe, degrees: MeshDegrees, sharded: ShardedOutline, known: Memory | None = None
    ) -> Estimate:
        plan = plan_of(recipe, degrees, self.device.linked_devices, self.outline, sharded, known)
        return estimate_of(recipe, self.device, plan, sharded)

    def _may_fit(self, recipe: Recipe, degrees: MeshDegrees) -> bool:
        """Tell if what is always in memory can fit. The largest degree of sharding is tried in any case."""
        if recipe.lora is not None or degrees.replicate == 1:
            return True
        muon = isinstance(recipe.optimizer, MuonConfig)
        bytes_of_element = PERMANENT_BYTES_OF_MUON if muon else PERMANENT_BYTES[recipe.precision.optimizer_moments]
        return self.outline.counts.total * bytes_of_element / degrees.shard <= self.limit


def _meshes(recipe: Recipe, world_size: int) -> Iterator[MeshConfig]:
    """Yield every mesh whose degrees divide; with most sharding first."""
    shards = [n for n in range(world_size, 0, -1) if world_size % n == 0]
    for shard in shards:
        for expert in range(1, min(shard, recipe.model.moe.num_experts) + 1):
            if shard % expert == 0 and recipe.model.moe.num_experts % expert == 0:
                yield replace(recipe.mesh, replicate=world_size // shard, shard=shard, expert=expert)


def _precisions(recipe: Recipe, device: Accelerator) -> list[PrecisionConfig]:
    """List the recipe's own precision, BF16 in place of fp32, and FP8 where the device is faster by it; or none."""
    own = recipe.precision
    found = [own]
    if own.compute == Compute.fp32:
        found.append(replace(own, compute=Compute.bf16))
    if own.fp8.recipe is None and device.fp8_tflops > device.bf16_tflops:
        fp8 = replace(own.fp8, recipe=Fp8Recipe.deepseek_v3)
        found.append(replace(own, compute=Compute.bf16, fp8=fp8))
    if own.fp8.recipe is not None:
        found.append(replace(own, fp8=Fp8Config()))
    return found


def _micro_batches(recipe: Recipe, world_size: int) -> list[int]:
    """List powers of two, the recipe's own size and all of a rank's sequences, in ascending order."""
    sequences = recipe.global_train_batch_size // world_size
    powers, own = [2**n for n in range(sequences.bit_length())], recipe.device_train_microbatch_size
    sizes = {*powers, sequences, *([] if isinstance(own, Auto) else [own])}
    return sorted(size for size in sizes if size <= sequences)


def _with_chunks(recipe: Recipe, chunks: int) -> Recipe:
    moe = replace(recipe.model.moe, dispatch_chunks=chunks)
    return replace(recipe, model=replace(recipe.model, moe=moe))


def _size_of_change(candidate: Candidate) -> tuple[bool, int, float]:
    return not candidate.same_numbers, len(candidate.changes), candidate.seconds


def _fastest_of_each_mesh(candidates: list[Candidate]) -> list[Candidate]:
    """Sort by speed; of candidates with one mesh only the fastest stays."""
    best: dict[object, Candidate] = {}
    for each in sorted(candidates, key=lambda each: (each.seconds, len(each.changes))):
        mesh = each.estimate.plan.mesh
        best.setdefault((mesh.replicate, mesh.shard, mesh.expert), each)
    return [*best.values()]
