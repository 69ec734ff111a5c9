"""The plots of a report: of one run, and of several together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from moefoundry.runs.facts import RunFacts
from moefoundry.runs.metrics import EVAL_KEY, LOSS_KEY, SPEED_KEY, TASK_METRIC
from moefoundry.runs.series import Curve, Series
from moefoundry.runs.svg import line_plot, load_plot

TERMS = "loss/train/"
SOURCES = "loss/train/source/"


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        title: Heading.
        note: Sentence below it; may be empty.
        draw: Gives the SVG.
        wide: True if it takes the whole width of the page.
    """

    title: str
    note: str
    draw: Callable[[], str]
    wide: bool = False


def plots_of(facts: RunFacts, series: Series, entropy: float | None, prefix: str) -> Iterator[Plot]:
    """List the plots for which the run has metrics.

    Args:
        facts: The run.
        series: Its metrics.
        entropy: Unigram entropy of the held-out data, nats a token, if it is known.
        prefix: Name of the run within its page, which the names of plots begin with.
    """
    resumed = [event["batch"] for event in facts.events if event["event"] == "start" and event.get("batch")]
    curves = series.curves

    def lines(name: str, label: str, found: Mapping[str, Curve], marked: Mapping[str, Curve] | None = None) -> str:
        return line_plot(f"{prefix}{name}", label, found, marked, resumed=resumed)

    held_out = {"held out": curves[EVAL_KEY]} if EVAL_KEY in curves else {}
    training = {"training": curves[LOSS_KEY]} if LOSS_KEY in curves else {}
    if training or held_out:
        levels = {} if entropy is None else {"unigram entropy": entropy}
        name, label = f"{prefix}loss", "cross entropy, nats/token"
        yield Plot("Loss", "", partial(line_plot, name, label, training, held_out, levels, resumed))
    if by_source := series.under(SOURCES):
        yield Plot("Loss by source", "", partial(lines, "source-loss", "nats/token", by_source))
    if tokens := series.under("tokens/"):
        yield Plot("Tokens by source", "", partial(lines, "source-tokens", "tokens so far", tokens))
    own = {"total", "lm"}
    terms = {name: each for name, each in series.under(TERMS).items() if "/" not in name and name not in own}
    if terms:
        yield Plot("Other terms of the loss", "", partial(lines, "terms", "nats/token, weighted", terms))
    if speed := series.of(SPEED_KEY):
        note = "All ranks, without evaluation and checkpoints."
        yield Plot("Throughput", note, partial(lines, "speed", "tokens/s", {"all ranks": speed[SPEED_KEY]}))
    if mfu := series.of("throughput/device/mfu"):
        yield Plot("MFU", "The model's FLOPs, as a share of the peak.", partial(lines, "mfu", "share", mfu))
    yield from _routing(series, prefix, lines)
    if norm := series.of("grad_norm"):
        yield Plot("Gradient norm", "Before clipping.", partial(lines, "norm", "L2 norm", norm))
    if rate := series.of("lr"):
        yield Plot("Learning rate", "", partial(lines, "lr", "rate", rate))
    yield from _machine(series, lines)
    if preference := series.under("preference/"):
        yield Plot("Preferences", "", partial(lines, "preference", "", preference))
    tasks = {name: curve for name, curve in curves.items() if TASK_METRIC.fullmatch(name)}
    if tasks:
        short = {name.removeprefix("icl/").removeprefix("metrics/"): curve for name, curve in tasks.items()}
        yield Plot("Tasks", "", partial(lines, "tasks", "metric", {}, short))


def _routing(series: Series, prefix: str, lines: Callable[..., str]) -> Iterator[Plot]:
    if series.loads:
        note = "A row for each expert, by layer: 1 (white) is the uniform share."
        yield Plot("Expert load", note, partial(load_plot, f"{prefix}load", series.loads), wide=len(series.loads) > 4)
    if violation := series.of("moe/max_violation"):
        note = "Largest load / mean load - 1, mean over layers; 0 is balanced."
        yield Plot("Violation of balance", note, partial(lines, "violation", "max violation", violation))
    if entropy := series.of("moe/router_entropy"):
        yield Plot("Router entropy", "Mean over tokens and layers.", partial(lines, "entropy", "nats", entropy))
    if any(curve.highs and max(curve.highs) for curve in series.of("moe/dropped_fraction").values()):
        dropped = series.of("moe/dropped_fraction")
        yield Plot("Dropped slots", "", partial(lines, "dropped", "share of slots", dropped))
    if bias := series.of("moe/expert_bias_max_abs"):
        yield Plot("Expert bias", "", partial(lines, "bias", "largest, absolute", bias))


def _machine(series: Series, lines: Callable[..., str]) -> Iterator[Plot]:
    if memory := series.under("memory/"):
        note = "Host: all ranks together. Device: the rank that has most."
        short = {name.removesuffix("_gib").replace("_", " "): curve for name, curve in memory.items()}
        yield Plot("Memory", note, partial(lines, "memory", "peak, GiB", short))
    names = {"data/wait_seconds": "for data", "checkpoint/stall_seconds": "for checkpoints"}
    waits, stalls = ({names[key]: curve for key, curve in series.of(name).items()} for name in names)
    if waits or stalls:
        note = "Time that training stood still."
        yield Plot("Waits", note, partial(lines, "waits", "seconds a batch", waits, stalls))
    if system := series.under("system/"):
        yield Plot("Machine", "", partial(lines, "system", "percent, W, °C", system))


def comparisons(runs: Sequence[tuple[str, Series]]) -> Iterator[Plot]:
    """List the plots that show several runs together; each has its label."""
    for name, key, title, label in (
        ("loss", LOSS_KEY, "Training loss", "cross entropy, nats/token"),
        ("held-out", EVAL_KEY, "Held-out loss", "cross entropy, nats/token"),
        ("speed", SPEED_KEY, "Throughput", "tokens/s"),
        ("violation", "moe/max_violation", "Violation of balance", "max violation"),
        ("norm", "grad_norm", "Gradient norm", "L2 norm"),
        ("entropy", "moe/router_entropy", "Router entropy", "nats"),
    ):
        found = {of: series.curves[key] for of, series in runs if key in series.curves}
        if found:
            marked = found if key == EVAL_KEY else {}
            shown = {} if marked else found
            yield Plot(title, "", partial(line_plot, f"all-{name}", label, shown, marked))
