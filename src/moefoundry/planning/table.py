"""Plan as text: aligned columns, GiB of 2**30 bytes."""

from __future__ import annotations

from collections.abc import Sequence

from moefoundry.planning.plan import Plan

GIB = 2**30


def plan_table(plan: Plan, memory_gb: float) -> str:
    """Format a plan as text; ``memory_gb`` is the memory of a device in GB of 1e9 bytes."""
    return "\n".join([*_summary(plan), "", *_memory(plan, memory_gb), "", *_traffic(plan)])


def _summary(plan: Plan) -> list[str]:
    mesh = plan.mesh
    stage = [f"stage {plan.stage} of the curriculum, which needs most memory"] if plan.stage else []
    return [
        f"{plan.run_name}: {plan.parameters}",
        f"{mesh.world_size:,} ranks, {plan.gpus_per_node} a node: replicate {mesh.replicate} x shard {mesh.shard}, "
        f"expert {mesh.expert}",
        f"a rank's step: {plan.tokens_per_step:,} tokens, micro-batches of {plan.tokens_per_micro_batch:,} (x "
        f"{plan.micro_batches}), each {plan.rows_per_expert:,.0f} rows an expert",
        *stage,
    ]


def _memory(plan: Plan, memory_gb: float) -> list[str]:
    memory, peak = plan.memory, plan.memory.peak
    rows = [
        ("parameters (fp32)", memory.parameters, "exact"),
        ("gradients (fp32)", memory.gradients, "exact"),
        ("optimizer state", memory.optimizer, "exact"),
        ("gathered parameters", peak.gathered_parameters, "estimate"),
        ("unreduced gradients", peak.unreduced_gradients, "estimate"),
        ("activations", peak.activations, "estimate"),
        ("logits", peak.logits, "estimate"),
        ("total", memory.total, f"largest in {peak.moment}"),
    ]
    verdict = "fits" if plan.fits(memory_gb) else "does not fit"
    return [
        *columns([("memory of a rank", "GiB", ""), *((name, _gib(size), note) for name, size, note in rows if size)]),
        f"{verdict} {memory_gb:g} GB ({_gib(memory_gb * 1e9)} GiB)",
        *([f"and of the host's memory, for the moving average: {_gib(memory.host)} GiB"] if memory.host else []),
    ]


def _traffic(plan: Plan) -> list[str]:
    if not plan.traffic:
        return ["one rank: nothing is sent"]
    header = ("sent by a rank in a step", "axis", "ranks", "calls", "GiB", "across nodes")
    rows = [
        (
            entry.collective.replace("_", "-"),
            entry.axis,
            str(entry.ranks),
            f"{entry.calls:,}",
            _gib(entry.sent),
            _gib(entry.across_nodes) if entry.across_nodes else "-",
        )
        for entry in plan.traffic
    ]
    return columns([header, *rows])


def _gib(size: float) -> str:
    return f"{size / GIB:,.3f}"


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align rows in columns: numbers to the right, words to the left, by the first row below the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_the_right = [column[1][-1:].isdigit() for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_the_right, strict=True)
        ).rstrip()
        for row in rows
    ]
