"""Estimate as text."""

from __future__ import annotations

from dataclasses import asdict

from moefoundry.planning.estimate import Estimate
from moefoundry.planning.table import columns, plan_table

NAMES = {
    "products": "products with dense weights, attention",
    "experts": "products with experts' weights",
    "other": "norms, routing, activations",
    "launches": "waiting for launches",
    "exchange": "exchange of tokens",
    "sharding": "collectives of FSDP, not hidden",
    "optimizer": "optimizer",
}


def estimate_table(found: Estimate, price: float | None = None) -> str:
    """Format an estimate as text; ``price`` is that of a device's hour."""
    step, ranks = found.step, found.plan.mesh.world_size
    rows = [
        (NAMES[name], f"{seconds:,.3f}", f"{seconds / step.total:.0%}")
        for name, seconds in asdict(step).items()
        if seconds
    ]
    speed = [
        f"{found.tokens_per_second:,.0f} tokens/s a device, {found.tokens_per_second * ranks:,.0f} in all; "
        f"{found.flops_per_token * found.tokens_per_second / 1e12:,.0f} TFLOP/s a device, MFU {found.mfu:.1%}"
    ]
    if found.days is not None and found.run_tokens is not None:
        cost = "" if price is None else f", {found.days * 24 * ranks * price:,.0f} at {price:g} a device and hour"
        speed.append(f"{found.run_tokens:,} tokens: {_duration(found.days)}{cost}")
    time_table = columns([("time of a step", "s", "share"), *rows, ("total", f"{step.total:,.3f}", "100%")])
    return "\n".join([plan_table(found.plan, found.device.memory_gb), "", *time_table, "", *speed])


def _duration(days: float) -> str:
    return f"{days:,.1f} days" if days >= 2 else f"{days * 24:,.1f} hours"
