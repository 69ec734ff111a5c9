"""Paired timing, the machine it ran on, and the records that results are kept in.

Contenders run in turn, A B C A B C ..., so that a slow minute of the machine hits all of them; a ratio is taken within
each round and reported as the median over rounds with the smallest and largest (its spread).
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
TABLE = ROOT / "RESULTS.md"
PACKAGES = ("torch", "mosaicml", "llm-foundry", "transformers")
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    # glibc keeps large blocks instead of returning them: their pages are faulted in once, not at every allocation
    "reuse": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)},
}


@dataclass(frozen=True)
class Comparison:
    """moefoundry and one peer, measured in turn.

    Attributes:
        benchmark, case: What was measured, and with which sizes or settings.
        unit: Of ``ours`` and ``theirs``; a rate (``tokens/s``) is better high, a time better low.
        peer: Who ``theirs`` belongs to.
        ours, theirs: One value for each round.
        target: What the median ratio has to reach, or None.
    """

    benchmark: str
    case: str
    unit: str
    peer: str
    ours: list[float]
    theirs: list[float]
    target: float | None = None

    @property
    def ratios(self) -> list[float]:
        """By round, how many times as fast moefoundry is."""
        pairs = zip(self.ours, self.theirs, strict=True)
        return [ours / theirs if self.unit.endswith("/s") else theirs / ours for ours, theirs in pairs]


@dataclass(frozen=True)
class Record:
    """One benchmark on one machine, as it is written to ``results/``."""

    name: str
    machine: dict[str, Any]
    comparisons: list[Comparison]
    notes: list[str] = field(default_factory=list)


def in_turn(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int,
    ready: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round, after ``warmup`` rounds that do not count.

    The garbage collector runs between the calls, never inside one; then, still untimed, ``ready``: where ranks wait for
    each other. ``time.process_time`` as clock gives CPU seconds of this process, which a busy machine hardly changes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(warmup + rounds):
        for name, contender in contenders.items():
            gc.collect()
            gc.disable()
            ready()
            start = clock()
            contender()
            elapsed = clock() - start
            gc.enable()
            if index >= warmup:
                seconds[name].append(elapsed)
    return seconds


def replace_table(page: Path, name: str, table: str) -> None:
    """Put a table where a page has ``<!-- table: NAME -->`` and ``<!-- end of table -->``."""
    first, last = f"<!-- table: {name} -->\n", "<!-- end of table -->"
    before, _, rest = page.read_text().partition(first)
    _, found, after = rest.partition(last)
    if not found:
        raise ValueError(f"{page}: no table {name}")
    page.write_text(before + first + table + last + after)


def machine(threads: int, allocator: str, device: str = "cpu") -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "allocator": allocator,
        "load_average": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    try:
        models = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def write(record: Record) -> Path:
    """Write the record and regenerate ``RESULTS.md`` from all records."""
    about = record.machine
    place = about["cpu"] if about["device"] == "cpu" else about["device"]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{place} {about['cores']} cores".lower()).strip("-")
    suffix = "" if about["allocator"] == "default" else f"-{about['allocator']}"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{record.name}-{slug}{suffix}.json"
    path.write_text(json.dumps(asdict(record), indent=1) + "\n")
    TABLE.write_text(render([read(file) for file in sorted(RESULTS.glob("*.json"))]))
    return path


def read(path: Path) -> Record:
    """A record from its file."""
    fields = json.loads(path.read_text())
    fields["comparisons"] = [Comparison(**comparison) for comparison in fields["comparisons"]]
    return Record(**fields)


HEADER = """# Results

Written by `python -m benchmarks.run`; do not edit. `ratio` is how many times as fast moefoundry is: the median over
paired rounds, with the smallest and the largest. What each benchmark measures: [README.md](README.md).

"""
COLUMNS = ("benchmark", "case", "moefoundry", "peer", "its value", "ratio (min .. max)", "target", "machine")


def render(records: Sequence[Record]) -> str:
    """One Markdown table of all records, and below it the machines and the notes."""
    machines: list[str] = []
    lines = [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
    for record in records:
        about = _describe(record.machine)
        if about not in machines:
            machines.append(about)
        lines += [_row([*cells(c), str(machines.index(about) + 1)]) for c in record.comparisons]
    lines += ["", *(f"{number}. {about}" for number, about in enumerate(machines, start=1))]
    notes = dict.fromkeys(note for record in records for note in record.notes)
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    return HEADER + "\n".join(lines) + "\n"


def cells(comparison: Comparison) -> list[str]:
    """A comparison as the first cells of its row."""
    ratios, unit = comparison.ratios, comparison.unit
    median = statistics.median(ratios)
    verdict = "" if comparison.target is None else "met" if median >= comparison.target else "missed"
    return [
        comparison.benchmark,
        comparison.case,
        f"{_short(statistics.median(comparison.ours))} {unit}",
        comparison.peer,
        f"{_short(statistics.median(comparison.theirs))} {unit}",
        f"**{median:.2f}** ({min(ratios):.2f} .. {max(ratios):.2f})",
        f"{comparison.target:g}: {verdict}" if verdict else "",
    ]


def _describe(about: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    device = "" if about["device"] == "cpu" else f"{about['device']}, "
    return (
        f"{device}{about['cpu']}, {about['cores']} cores, {about['threads']} threads, Python {about['python']}, "
        f"{versions}, allocator {about['allocator']}"
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"
