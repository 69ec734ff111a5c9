"""Estimate of a step's time and of a run's length, on devices that are not there.

A roofline: products take their FLOPs over a share of the peak, other operations their bytes over a share of the
memory's bandwidth, collectives their bytes over a share of the slower of link and network, and a call's latency. A
block that launches its kernels more slowly than they run takes the time of the launches. FSDP's collectives are hidden
behind the rest of the step up to a share; those of once a step behind one micro-batch's pass. Experts are used evenly.

Exchanges of tokens are hidden behind the shared experts, and where the tokens go in N chunks also behind the others.
Then in each pass the first chunk on its way to the experts, and the last on its way back, are waited for: 1/N of the
exchange; what remains of it hides behind the experts' products. Each chunk has its own calls, launches its own kernels,
and reads the experts' weights anew.

The shares are one set of constants for all devices, models and meshes. ``benchmarks/estimates.py`` compares them with
published runs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moefoundry.config import ActivationCheckpointing, Compute, Gather, MuonConfig, Recipe, Reduce
from moefoundry.config.curriculum import batches_until, of_stage, stages_of
from moefoundry.mesh import EXPERT, EXPERT_NODE, EXPERT_PLACE, resolve_degrees
from moefoundry.planning.devices import Accelerator
from moefoundry.planning.ffn_stages import block_ends_with_experts
from moefoundry.planning.matrices import Matrices
from moefoundry.planning.outline import Outline, ShardedOutline
from moefoundry.planning.plan import Plan, plan_of
from moefoundry.planning.traffic import Traffic
from moefoundry.planning.units import compute_bytes
from moefoundry.planning.work import Work, head_work, model_flops

SHARE_OF_PEAK = {"linear": 0.5, "experts": 0.57, "attention": 0.42, "masked": 0.21, "orthogonalization": 0.5}
"""Shares of the peak that products reach. Attention by a kernel that takes a mask runs at half the rate of the causal
one (arXiv 2307.08691, figures 4 to 6: xFormers' beside FlashAttention-2)."""

TILE_ROWS = 128
"""Rows of a tile of grouped products: an expert's last tile is half empty, in the mean."""

FP8_SHARE = 0.75
"""Factor of those shares for FP8 products, with their casts and scales."""

MEMORY_SHARE, LINK_SHARE, NETWORK_SHARE = 0.4, 0.82, 0.82
"""Shares of the bandwidths. On NVLink NCCL reaches 370 of 450 GB/s (NVIDIA/nccl-tests, issue 212)."""

HIDDEN_SHARE = 0.6
"""Share of the step's computation behind which FSDP's collectives hide."""

CALL_SECONDS = 20e-6
"""Latency of a collective."""

LAUNCH_SECONDS, LAUNCHES = 4.5e-6, 125
"""A kernel's launch, and the launches of a block in one pass (``tests/model/step_counts.json``)."""

CHUNK_LAUNCHES = 55
"""Further launches of an MoE block in one pass for each chunk of tokens after the first."""

OPTIMIZER_BYTES = 16
"""Bytes of fp32 parameters and gradients that AdamW reads and writes for an element, beside its moments."""

TOKEN_AXES = (EXPERT, EXPERT_NODE, EXPERT_PLACE)
"""Axes on which all-to-alls exchange tokens; on others they exchange rows of Muon's updates."""

PASSES = {ActivationCheckpointing.none: 3, ActivationCheckpointing.selective: 3, ActivationCheckpointing.full: 4}
"""Forward passes that the products of a block cost: a backward pass counts as two. ``full`` computes the last of an
expert's three products once where its result is not read again."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step of the slowest rank, by kind; they add up.

    Attributes:
        products: Products with dense weights, and of attention.
        experts: Products with the experts' weights.
        other: Norms, routing, activations, and whatever else moves memory.
        launches: Time in which the device waits for launches.
        exchange: Exchange of tokens among the ranks of ``mesh.expert`` that nothing hides.
        sharding: Collectives of FSDP that nothing hides.
        optimizer: The optimizer's update.
    """

    products: float
    experts: float
    other: float
    launches: float
    exchange: float
    sharding: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Estimate:
    """Speed of a run.

    Attributes:
        plan: Memory and traffic of the same recipe and mesh.
        device: The accelerator.
        step: Time of a step.
        flops_per_token: FLOPs of the model, forward and backward, without recomputation.
        mfu: Model FLOPs utilization: those FLOPs a second, as a share of the peak of the products' format.
        run_tokens: Tokens of the whole run; None if its length is given in epochs.
        run_seconds: Seconds of the whole run, where its steps are not all alike.
    """

    plan: Plan
    device: Accelerator
    step: StepTime
    flops_per_token: float
    mfu: float
    run_tokens: int | None
    run_seconds: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of one device."""
        return self.plan.tokens_per_step / self.step.total

    @property
    def days(self) -> float | None:
        """Days of the whole run; None if its length is not known."""
        if self.run_tokens is None:
            return None
        if self.run_seconds is not None:
            return self.run_seconds / 86400
        return self.run_tokens / (self.tokens_per_second * self.plan.mesh.world_size) / 86400

    def to_json(self) -> dict[str, Any]:
        """Convert to plain values."""
        return {
            **self.plan.to_json(self.device.memory_gb),
            "device": asdict(self.device),
            "seconds": asdict(self.step) | {"step": self.step.total},
            "tokens_per_second": {
                "device": self.tokens_per_second,
                "all": self.tokens_per_second * self.plan.mesh.world_size,
            },
            "flops_per_token": self.flops_per_token,
            "mfu": self.mfu,
            "run_tokens": self.run_tokens,
            "days": self.days,
        }


def estimate(recipe: Recipe, world_size: int, device: Accelerator) -> Estimate:
    """Estimate the speed of ``recipe`` on ``world_size`` devices.

    Raises:
        ConfigError: The mesh does not fit the world size.
    """
    degrees, outline = resolve_degrees(recipe.mesh, world_size, device.linked_devices), Outline(recipe)
    sharded = outline.shard(recipe, degrees)
    found, stages = [], stages_of(recipe)
    for stage in stages:
        alike = of_stage(recipe, stage)
        plan = replace(plan_of(alike, degrees, device.linked_devices, outline, sharded), stage=stage.name)
        found.append(estimate_of(alike, device, plan, sharded))
    largest, counts = max(found, key=lambda each: each.plan.memory.total), batches_until(stages, recipe.max_duration)
    if recipe.curriculum is None or counts is None:
        return largest
    seconds = sum(batches * each.step.total for batches, each in zip(counts, found, strict=True))
    return replace(largest, run_tokens=_run_tokens(recipe), run_seconds=seconds)


def estimate_of(recipe: Recipe, device: Accelerator, plan: Plan, sharded: ShardedOutline) -> Estimate:
    """Estimate the speed of a plan, whose model is ``sharded``."""
    c, seq_len = compute_bytes(recipe.precision), recipe.max_seq_len
    works = sharded.outline.works(seq_len, c)
    head, peak = head_work(recipe.model), _peak(recipe, device)
    step = _step(recipe, device, plan, works, head, peak)
    if isinstance(recipe.optimizer, MuonConfig):
        step = replace(step, optimizer=step.optimizer + _orthogonalization(device, plan, sharded.matrices))
    flops = model_flops(works, head)
    mfu = flops * plan.tokens_per_step / (step.total * peak)
    return Estimate(plan, device, step, flops, mfu, _run_tokens(recipe))


def _step(recipe: Recipe, device: Accelerator, plan: Plan, works: Sequence[Work], head: Work, peak: float) -> StepTime:
    tokens, passes = plan.tokens_per_step, PASSES[recipe.activation_checkpointing]
    chunks = recipe.model.moe.dispatch_chunks if plan.mesh.expert > 1 else 1
    bandwidth = MEMORY_SHARE * device.memory_tb_per_s * 1e12
    narrow = FP8_SHARE if recipe.precision.fp8.recipe else 1.0
    linear = sum(work.linear for work in works) * passes / (peak * SHARE_OF_PEAK["linear"] * narrow)
    head_seconds = 3 * head.linear / (_bf16(device) * SHARE_OF_PEAK["linear"])
    attention = sum(map(_attention_seconds, works)) * (passes + 0.5) / _bf16(device)
    padded = 1 + TILE_ROWS / 2 * chunks / plan.rows_per_expert
    expert_passes = passes - (passes - 3) / 3 * block_ends_with_experts(recipe.model)
    experts = sum(work.experts for work in works) * expert_passes * padded
    experts /= peak * SHARE_OF_PEAK["experts"] * narrow
    reads = chunks * plan.micro_batches * expert_passes * _expert_bytes(recipe, plan, works) / bandwidth
    recomputed = 1 if recipe.activation_checkpointing != ActivationCheckpointing.none else 0
    moved = sum(work.moved for work in works) * (3 + recomputed) / bandwidth
    computed = tokens * (linear + head_seconds + attention + moved) + max(tokens * experts, reads)
    launches = len(works) * LAUNCHES + _sparse(works) * (chunks - 1) * CHUNK_LAUNCHES
    launched = plan.micro_batches * passes * launches * LAUNCH_SECONDS * 2 / 3
    exchange = sum(_seconds(entry, device) for entry in _all_to_alls(plan, TOKEN_AXES))
    exposed = _exposed(exchange, max(tokens * experts, reads), chunks, passes)
    shared = tokens * sum(work.shared for work in works) / (peak * SHARE_OF_PEAK["linear"] * narrow)
    moments = plan.memory.optimizer
    optimizer = (OPTIMIZER_BYTES * plan.memory.parameters // 4 + 2 * moments) / bandwidth
    return StepTime(
        products=tokens * (linear + head_seconds + attention),
        experts=max(tokens * experts, reads),
        other=tokens * moved,
        launches=max(0.0, launched - computed),
        exchange=exposed - _behind_shared_experts(exposed, shared, passes - 2),
        sharding=_sharding(recipe, device, plan, HIDDEN_SHARE * computed, passes),
        optimizer=optimizer,
    )


def _orthogonalization(device: Accelerator, plan: Plan, matrices: Matrices) -> float:
    """Seconds in which Muon orthogonalizes matrices and exchanges rows.

    The exchanges of an axis hide behind its products, but the first rows on their way there and the last on their way
    back are waited for.
    """
    speed = _bf16(device) * SHARE_OF_PEAK["orthogonalization"]
    seconds = matrices.flops / speed
    for each in matrices.exchanges:
        exchange = sum(_seconds(entry, device) for entry in _all_to_alls(plan, (each.axis,)))
        seconds += exchange / each.number + max(each.flops / speed, exchange * (1 - 1 / each.number))
    return seconds


def _all_to_alls(plan: Plan, axes: Collection[str]) -> Iterator[Traffic]:
    return (entry for entry in plan.traffic if entry.collective == "all_to_all" and entry.axis in axes)


def _sharding(recipe: Recipe, device: Accelerator, plan: Plan, hiding: float, passes: int) -> float:
    """Seconds of FSDP's collectives that nothing hides.

    Those of each micro-batch hide behind ``hiding`` seconds of the step. What is gathered once a step hides behind the
    first forward pass; what is reduced once, and between copies, behind the last backward pass.
    """
    gathers_once, reduces_once = recipe.mesh.gather == Gather.each_step, recipe.mesh.reduce == Reduce.each_step
    once_forward, once_backward, often = 0.0, 0.0, 0.0
    for entry in plan.traffic:
        seconds = _seconds(entry, device)
        match entry.collective:
            case "all_gather" if gathers_once:
                once_forward += seconds
            case "reduce_scatter" if reduces_once:
                once_backward += seconds
            case "all_reduce":
                once_backward += seconds
            case "all_gather" | "reduce_scatter":
                often += seconds
    forward = hiding / plan.micro_batches / passes
    hidden = min(once_forward, forward) + min(once_backward, 2 * forward)
    return once_forward + once_backward - hidden + max(0.0, often - (hiding - hidden))


def _exposed(exchange: float, experts: float, chunks: int, passes: int) -> float:
    """Seconds of the exchanges of a step that the experts' products do not hide."""
    recomputed = passes - 3
    forward, backward = (1 + recomputed) / (2 + recomputed), 1 / (2 + recomputed)  # shares of the exchanges
    exposed = 0.0
    for sent, computed in ((forward, (1 + recomputed) / passes), (backward, 2 / passes)):
        exposed += sent * exchange / chunks + max(0.0, sent * exchange * (1 - 1 / chunks) - computed * experts)
    return exposed


def _sparse(works: Sequence[Work]) -> int:
    """Count the blocks with experts."""
    return sum(work.experts > 0 for work in works)


def _attention_seconds(work: Work) -> float:
    """Seconds of a token's attention in a forward pass, times the device's peak."""
    if work.masked:
        return work.masked / SHARE_OF_PEAK["masked"]
    return work.attention / SHARE_OF_PEAK["attention"]


def _behind_shared_experts(exchange: float, shared: float, forward_passes: int) -> float:
    """Seconds of exchanges that shared experts hide.

    Rows go to the experts and back in each forward pass, and in the backward pass. While they go, and while their
    gradients come back, shared experts compute; ``shared`` is the time of their forward pass.
    """
    leg = exchange / (2 * (forward_passes + 1))
    return forward_passes * min(leg, shared) + min(leg, 2 * shared)


def _bf16(device: Accelerator) -> float:
    return device.bf16_tflops * 1e12


def _peak(recipe: Recipe, device: Accelerator) -> float:
    """Give the peak of the products' format; fp32 is exact, without tensor cores."""
    if recipe.precision.fp8.recipe:
        return device.fp8_tflops * 1e12
    return _bf16(device) * (1 / 16 if recipe.precision.compute == Compute.fp32 else 1.0)


def _expert_bytes(recipe: Recipe, plan: Plan, works: Sequence[Work]) -> float:
    """Bytes of the experts' weights that a pass over all blocks reads on one rank."""
    moe = recipe.model.moe
    elements = 3 * moe.expert_hidden_size * recipe.model.d_model * moe.num_experts / plan.mesh.expert
    return _sparse(works) * elements * compute_bytes(recipe.precision)


def _seconds(entry: Traffic, device: Accelerator) -> float:
    """Time of a collective in a step: the slower of link and network, and the latency of its calls.

    Collectives in rings use the network of every rank of the group on a node; exchanges send each pair's rows directly.
    """
    remote = entry.across_nodes * (entry.ranks - 1) / entry.sent if entry.sent else 0.0
    on_node = max(1.0, entry.ranks - remote)
    across = entry.across_nodes / (1.0 if entry.collective == "all_to_all" else on_node)
    inside = (entry.sent - entry.across_nodes) / (LINK_SHARE * device.link_gb_per_s * 1e9)
    return max(inside, across / (NETWORK_SHARE * device.network_gb_per_s * 1e9)) + entry.calls * CALL_SECONDS


def _run_tokens(recipe: Recipe) -> int | None:
    """Count the positions of a whole run; None if its length is given in epochs."""
    stages = stages_of(recipe)
    counts = batches_until(stages, recipe.max_duration)
    if counts is None:
        return None
    return sum(batches * stage.tokens_per_batch for batches, stage in zip(counts, stages, strict=True))
