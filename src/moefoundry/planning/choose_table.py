"""Result of a search as text."""

from __future__ import annotations

from moefoundry.config.spec import show_leaf
from moefoundry.planning.choose import Candidate, Choice
from moefoundry.planning.devices import Accelerator
from moefoundry.planning.estimate import Estimate
from moefoundry.planning.micro_batch import HEADROOM
from moefoundry.planning.table import GIB, columns


def choose_table(choice: Choice, world_size: int, device: Accelerator) -> str:
    """Format a search as text, with the overrides of each result ready to be copied."""
    limit = f"{device.memory_gb * 1e9 * (1 - HEADROOM) / GIB:,.1f} GiB"
    lines = [f"{choice.tried} candidates on {world_size:,} devices; {limit} of memory may be planned for each", ""]
    named: list[tuple[str, Candidate]] = [(str(rank), each) for rank, each in enumerate(choice.best, start=1)]
    if choice.other_precision is not None:
        named.append(("other precision", choice.other_precision))
    if choice.smallest is not None:
        named.append(("smallest change", choice.smallest))
    if choice.least is not None and not named:
        named.append(("least memory", choice.least))
    rows = [(name, *_figures(each.estimate)) for name, each in named]
    if choice.given is not None:
        rows.insert(0, ("as it is" + ("" if choice.fits else ", does not fit"), *_figures(choice.given)))
    if rows:
        lines += columns([("", "tokens/s", "a device", "MFU", "step s", "GiB", "days"), *rows])
    for name, each in named:
        lines += ["", f"{name}: {overrides(each)}"]
        if not each.same_numbers:
            lines.append("   changes precision, and so the losses")
    return "\n".join([*lines, *_verdict(choice)])


def overrides(candidate: Candidate) -> str:
    """Write the changes as overrides of a command line; nothing is changed where there are none."""
    changes = candidate.changes.items()
    words = [f"{key}={value if isinstance(value, str) else show_leaf(value)}" for key, value in changes]
    return " ".join(words) or "(the recipe as it is)"


def _figures(estimate: Estimate) -> tuple[str, ...]:
    plan = estimate.plan
    return (
        f"{estimate.tokens_per_second * plan.mesh.world_size:,.0f}",
        f"{estimate.tokens_per_second:,.0f}",
        f"{estimate.mfu:.1%}",
        f"{estimate.step.total:,.3f}",
        f"{plan.memory.total / GIB:,.1f}",
        "-" if estimate.days is None else f"{estimate.days:,.1f}",
    )


def _verdict(choice: Choice) -> list[str]:
    unsuited = ["", "as it is, the recipe does not suit this number of devices:", *choice.problems]
    unsuited += [choice.advice] if choice.advice else []
    if choice.least is None:
        return [*unsuited, "no other mesh, micro-batch or precision makes it suit"]
    if choice.best or choice.smallest:
        return unsuited if choice.problems else []
    return ["", "nothing fits: take more devices, or devices with more memory"]
