"""A report of runs as one HTML file, from their files alone: of a finished, a running or a broken one, or of several.

Nothing in it needs a network or a script, so it can be mailed, kept beside the weights, or shown where scripts are
forbidden. A part that cannot be made is replaced by a line that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from moefoundry.config.secrets import redact
from moefoundry.config.spec import show_leaf
from moefoundry.data.summary import CORPUS_FILE, read_corpus_summary
from moefoundry.runs.facts import RunFacts, read_facts
from moefoundry.runs.figures import Plot, comparisons, plots_of
from moefoundry.runs.html import figure, folded, page, table, tag
from moefoundry.runs.metrics import LOSS_KEY, SPEED_KEY, TASK_METRIC
from moefoundry.runs.series import Series, read_series
from moefoundry.runs.table import best_held_out, differing_keys, shown_value
from moefoundry.runs.words import duration, number
from moefoundry.version import __version__

REPORT_FILE = "report.html"
HELD_OUT = "eval_loader.dataset."


def report_page(run_dirs: Sequence[Path]) -> str:
    """Write the report of one run, or of several with a comparison first.

    Args:
        run_dirs: Directories of runs, at least one.
    """
    runs = [read_facts(path) for path in run_dirs]
    series = [_part(f"{run.path}", partial(read_series, run.path)) for run in runs]
    read = [found if isinstance(found, Series) else Series() for found in series]
    problems = [found for found in series if isinstance(found, str)]
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    footer = f"Written by moefoundry {__version__} on {now}, from the files of the run{'s' if runs[1:] else ''}."
    if len(runs) == 1:
        body = [*problems, *_run(runs[0], read[0], "", heading="h1")]
        return page(redact(runs[0].name), body, footer)
    labels = _labels(runs)
    body = [tag("h1", f"{len(runs)} runs"), *problems, *_comparison(runs, read, labels)]
    for index, (run, found, label) in enumerate(zip(runs, read, labels, strict=True)):
        body.append(folded(label, "\n".join(_run(run, found, f"r{index}-", heading="h2"))))
    return page(", ".join(labels), body, footer)


def _part(name: str, make: Callable[[], Any]) -> Any:
    """Make a part of the report, or a line of HTML that says why there is none."""
    try:
        return make()
    except Exception as error:  # whatever is wrong with one part, the others are worth having
        reason = redact(" ".join(str(error).split()) or type(error).__name__)
        return tag("p", f"{name} is left out: {reason}", "problem")


def _labels(runs: Sequence[RunFacts]) -> list[str]:
    """Name runs so that no two have the same name."""
    names = [redact(run.name) for run in runs]
    places = [redact(f"{name} ({run.path})") for name, run in zip(names, runs, strict=True)]
    return [name if names.count(name) == 1 else place for name, place in zip(names, places, strict=True)]


def _figures(plots: Iterable[Plot]) -> str:
    boxes = []
    for plot in plots:
        svg = _part(plot.title, plot.draw)
        boxes.append(figure(plot.title, plot.note, svg, plot.wide) if svg.startswith("<svg") else svg)
    return '<div class="plots">\n' + "\n".join(boxes) + "\n</div>"


def _comparison(runs: Sequence[RunFacts], series: Sequence[Series], labels: Sequence[str]) -> Iterator[str]:
    headings = ("run", "state", "batch", "training loss", "held-out loss", "best", "at", "tokens/s", "time")
    rows = []
    for run, label in zip(runs, labels, strict=True):
        best, last = best_held_out(run), list(run.held_out.values())
        cells = [label, str(run.state), run.progress, run.number(LOSS_KEY)]
        cells += [last[-1] if last else None, best[1] if best else None, best[0] if best else None]
        rows.append([*cells, number(run.number(SPEED_KEY), ",.0f"), duration(run.seconds)])
    yield table(headings, rows)
    keys = differing_keys(runs)
    yield tag("h2", "Keys in which the recipes differ")
    if keys:
        yield table(["key", *labels], [[key, *(shown_value(run, key) for run in runs)] for key in keys])
    else:
        yield tag("p", "None, but for names and places.")
    yield tag("h2", "Side by side")
    yield _figures(comparisons(list(zip(labels, series, strict=True))))
    yield tag("h2", "Each run")


def _run(run: RunFacts, series: Series, prefix: str, heading: str) -> Iterator[str]:
    yield tag(heading, redact(run.name))
    reason = f" {redact(run.reason)}" if run.reason and run.state != "running" else ""
    yield f"<p>{tag('span', str(run.state), f'state {run.state}')}{tag('span', reason)}</p>"
    yield from (tag("p", redact(problem), "problem") for problem in run.problems)
    yield table(["", ""], _summary(run, series))
    yield tag("h2", "Training")
    entropy = _unigram_entropy(run)
    plots = list(plots_of(run, series, entropy, prefix))
    yield _figures(plots) if plots else tag("p", "No batch has ended.")
    scores = [
        (name.removeprefix("icl/").removeprefix("metrics/"), curve.last_batch, curve.last)
        for name, curve in series.curves.items()
        if TASK_METRIC.fullmatch(name)
    ]
    if scores:
        yield tag("h2", "Evaluation")
        yield table(["metric of task", "batch", "value"], scores)
    numbers = [(name, curve.last_batch, curve.last, curve.not_finite) for name, curve in series.curves.items()]
    yield folded("Last value of every metric", table(["metric", "batch", "value", "not finite"], numbers))
    if run.events:
        yield tag("h2", "History")
        yield table(["", "at (UTC)", "batch", ""], map(_event, run.events))
        yield from _environment([event for event in run.events if event["event"] == "start"])
    yield tag("h2", "Recipe")
    yield _recipe(run)


def _summary(run: RunFacts, series: Series) -> Iterator[tuple[str, str]]:
    """Give the facts that a person asks for first; those that are not known are left out."""
    recipe, best = run.recipe, best_held_out(run)
    last = list(run.held_out.items())
    yield "directory", redact(str(run.path.resolve()))
    yield "batch", run.progress
    if run.seconds is not None:
        yield "time in training", duration(run.seconds)
    if (loss := run.number(LOSS_KEY)) is not None:
        yield "training loss", f"{loss:.4f} nats/token"
    if best and last:
        yield "held-out loss", f"{last[-1][1]:.4f} nats/token; lowest {best[1]:.4f}, at batch {best[0]}"
    if (speed := run.number(SPEED_KEY)) is not None:
        yield "throughput", f"{speed:,.0f} tokens/s"
    if skipped := series.curves.get("skipped_steps"):
        yield "skipped steps", f"in {len(skipped.batches)} places, last in batch {skipped.last_batch}"
    if not_finite := [name for name, curve in series.curves.items() if curve.not_finite]:
        yield "not finite", ", ".join(not_finite)
    if run.checkpoints:
        yield "checkpoints", ", ".join(f"ba{batch}" for batch in run.checkpoints)
    if recipe:
        fp8 = recipe.get("precision.fp8.recipe")
        parts = [str(recipe.get("precision.compute")), *([f"FP8 {fp8}"] if fp8 else [])]
        yield "precision", f"{', '.join(parts)}; moments {recipe.get('precision.optimizer_moments')}"
        sizes = ("n_layers", "d_model", "moe.num_experts", "moe.top_k", "moe.num_shared_experts")
        yield "model", ", ".join(f"{name} {recipe.get(f'model.{name}')}" for name in sizes)
        batch = f"{recipe.get('global_train_batch_size')} x {recipe.get('max_seq_len')} tokens"
        yield "batch size", batch


def _event(event: dict[str, Any]) -> list[str | int | None]:
    at = datetime.fromisoformat(event["at"]).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    if event["event"] == "start":
        origin = f"from {event['from']}" if event.get("from") else "from the beginning"
        text = f"{origin}, {event.get('world_size', '?')} ranks on {event.get('device') or '?'}"
        return ["start", at, event.get("batch"), text]
    return [str(event.get("state")), at, event.get("batch"), str(event.get("reason", ""))]


def _environment(starts: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not starts:
        return
    last = starts[-1]
    mesh = ", ".join(f"{axis} {degree}" for axis, degree in last.get("mesh", {}).items())
    parts = [("host of rank 0", last.get("host")), ("device", last.get("device")), ("ranks", last.get("world_size"))]
    rows = [*parts, ("mesh", mesh), *last.get("versions", {}).items(), ("command", last.get("command"))]
    yield tag("h2", "Environment")
    yield table(["", "of the last start"], [(name, str(value)) for name, value in rows if value])


def _recipe(run: RunFacts) -> str:
    starts = [event for event in run.events if event["event"] == "start" and event.get("origins")]
    origins = starts[-1]["origins"] if starts else None
    default = "" if origins is None else "default"
    rows = [(key, show_leaf(value), (origins or {}).get(key, default)) for key, value in run.recipe.items()]
    headings = ("key", "value", "from")
    if said := [row for row in rows if row[2] not in ("", "default")]:
        text = table(headings, said)
    else:
        text = tag("p", "Where its values come from was not noted.", "note")
    return text + folded(f"All {len(rows)} keys", table(headings, rows))


def _unigram_entropy(run: RunFacts) -> float | None:
    """Read the unigram entropy of the held-out split, where its directory is on this machine."""
    local, split = (run.recipe.get(f"{HELD_OUT}{key}") for key in ("local", "split"))
    if not isinstance(local, str) or not Path(local, CORPUS_FILE).exists():
        return None
    found = _part("unigram entropy", lambda: read_corpus_summary(local).splits.get(str(split)))
    return None if found is None or isinstance(found, str) else found.unigram_entropy_nats
