"""Results as Markdown: a table for each kind of figure, and what was not run, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Json = dict[str, Any]

NO_FIGURES = {"state", "reason", "error", "where", "kind", "lost"}
"""Keys of a part that say how it went."""


def render(records: Sequence[Json]) -> str:
    """The page of one or more runs."""
    lines = [
        "# On a GPU",
        "",
        "Made by `python -m benchmarks.gpu --render`; every single time is in the JSON files.",
        "",
    ]
    for record in records:
        lines += _run(record)
    return "\n".join(lines).rstrip() + "\n"


def _run(record: Json) -> Iterator[str]:
    versions = record.get("versions", {})
    about = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if versions.get(name))
    yield f"## {versions.get('device', record['device'])}, {record['started'][:10]}"
    yield ""
    yield f"{about or 'versions unknown'}; Python {versions.get('python', 'unknown')}."
    if record["tiny"]:
        yield "Tiny sizes: the figures mean nothing."
    yield ""
    for name, entry in record["steps"].items():
        parts = entry.get("parts", {})
        if done := {part: figures for part, figures in parts.items() if _has_figures(figures)}:
            yield f"### {name}"
            yield ""
            yield from TABLES.get(name, _plain)(done)
            yield ""
    yield from _not_run(record)


def _has_figures(figures: Json) -> bool:
    return bool(set(figures) - NO_FIGURES)


def _not_run(record: Json) -> Iterator[str]:
    yield "### Not run, failed, or wrong"
    yield ""
    rows = []
    for name, entry in record["steps"].items():
        if entry["state"] not in ("done", "running"):
            rows.append((name, "the step", f"{entry['state']}{_because(entry)}"))
        for part, figures in entry.get("parts", {}).items():
            if figures["state"] in ("not run", "failed"):
                rows.append((name, part, f"{figures['state']}{_because(figures)}"))
            if "wrong" in figures:
                rows.append((name, part, f"wrong: {figures['wrong']}"))
    yield from _table(("step", "part", "why"), rows) if rows else ["Nothing."]
    yield ""


def _because(figures: Json) -> str:
    text = figures.get("reason") or figures.get("error")
    return f": {text}" if text else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    names = list(head)
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(_cell(value) for value in row)} |"


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")[:300]


def _gib(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 2**30:.2f}"


def _syncs(figures: Json) -> str:
    places = figures.get("syncs")
    return "" if places is None else str(sum(places.values()))


def _layers(parts: dict[str, Json]) -> Iterator[str]:
    head = ("layer", "forward, TFLOP/s", "backward, TFLOP/s", "forward, ms", "both, ms", "kept, GiB", "peak, GiB")
    rows = [
        (
            name,
            figures.get("tflops_forward"),
            figures.get("tflops_backward"),
            figures.get("forward", {}).get("ms"),
            figures.get("both", {}).get("ms"),
            _gib(figures.get("kept_bytes")),
            _gib(figures.get("peak_bytes")),
            figures.get("output_error"),
            figures.get("input_gradient_error"),
            figures.get("busiest_over_mean"),
            _syncs(figures),
        )
        for name, figures in parts.items()
    ]
    yield from _table((*head, "error of the output", "of dX", "busiest expert over mean", "host syncs"), rows)


def _peers(parts: dict[str, Json]) -> Iterator[str]:
    """Those with a router, then those that are given experts."""
    for router, title in ((True, "With a router:"), (False, "Given experts and their weights, without a router:")):
        if not router:
            yield ""
        yield from (title, "")
        yield from _layers({name: figures for name, figures in parts.items() if figures.get("router") == router})


def _training(parts: dict[str, Json]) -> Iterator[str]:
    head = ("model", "tokens/s", "TFLOP/s", "MFU", "MFU of 989", "ms a step", "forward / backward / optimizer, ms")
    rows = [
        (
            name,
            figures.get("tokens_per_second"),
            figures.get("tflops"),
            figures.get("mfu"),
            figures.get("mfu_of_989"),
            figures.get("ms"),
            " / ".join(str(ms) for ms in (figures.get("phases_ms") or {}).values()),
            _gib(figures.get("peak_bytes_later")),
            _syncs(figures),
        )
        for name, figures in parts.items()
    ]
    yield from _table((*head, "peak, GiB", "host syncs"), rows)


def _attention(parts: dict[str, Json]) -> Iterator[str]:
    head = ("heads, kernel", "chosen", "forward, TFLOP/s", "backward, TFLOP/s")
    keys = ("node", "tflops_forward", "tflops_backward")
    yield from _table(head, [(name, *(figures.get(key) for key in keys)) for name, figures in parts.items()])


def _router(parts: dict[str, Json]) -> Iterator[str]:
    yield "Device: microseconds of all kernels. Events: milliseconds between two, where the host may be what is slow."
    yield ""
    calls = ("forward", "both", "order")
    head = [f"{call}, {unit}" for unit in ("device", "events") for call in calls]
    rows = [
        (
            name,
            *(figures.get(call, {}).get(key) for key in ("device_us", "ms") for call in calls),
            figures.get("same_ids"),
            figures.get("same_order"),
            figures.get("logits_error"),
            figures.get("tokens_gradient_error"),
            _syncs(figures),
        )
        for name, figures in parts.items()
    ]
    checks = ("same ids", "same order", "error of logits", "of dX", "host syncs")
    yield from _table(("part", *head, *checks), rows)


def _plain(parts: dict[str, Json]) -> Iterator[str]:
    """Any figures: name and value, without lists of times."""
    rows = []
    for name, figures in parts.items():
        for key, value in figures.items():
            if key in (*NO_FIGURES, "runs_ms", "kernels_us", "wrong"):
                continue
            if isinstance(value, dict):
                value = "; ".join(f"{k}: {v}" for k, v in value.items() if k not in ("runs_ms", "kernels_us"))
            rows.append((name, key, value))
    yield from _table(("part", "figure", "value"), rows)


def _mixed(parts: dict[str, Json]) -> Iterator[str]:
    """Layers, then the rest."""
    layers = {name: figures for name, figures in parts.items() if "tflops_forward" in figures}
    rest = {name: figures for name, figures in parts.items() if name not in layers}
    if layers:
        yield from _layers(layers)
        yield ""
    if rest:
        yield from _plain(rest)


TABLES = {
    "layer": _layers,
    "peers": _peers,
    "train": _training,
    "train_fp8": _training,
    "router": _router,
    "attention": _attention,
    "fp8": _mixed,
}
