"""The live view of runs on a terminal, drawn by rich."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from moefoundry.config.secrets import redact
from moefoundry.runs.metrics import LOAD_PREFIX, LOSS_KEY, SPEED_KEY
from moefoundry.runs.table import best_held_out
from moefoundry.runs.watching import Watched
from moefoundry.runs.words import duration

BLOCKS = "▁▂▃▄▅▆▇█"
PANEL_WIDTH = 64  # columns of the terminal that a run needs
MAX_EXPERTS = 48  # bars in a line; of more experts, each bar is the fullest of some
MAX_LAYERS = 8
MAX_EVENTS = 5
COLORS = {"running": "blue", "finished": "green", "stopped": "yellow", "failed": "red", "stale": "red"}
FIGURES = (
    ("loss", LOSS_KEY, "{:.4f}"),
    ("tokens/s", SPEED_KEY, "{:,.0f}"),
    ("MFU", "throughput/device/mfu", "{:.1%}"),
    ("gradient norm", "grad_norm", "{:.3f}"),
    ("learning rate", "lr", "{:.2e}"),
    ("max violation", "moe/max_violation", "{:.2f}"),
    ("router entropy", "moe/router_entropy", "{:.3f} nats"),
    ("dropped", "moe/dropped_fraction", "{:.2%}"),
    ("host memory", "memory/peak_host_gib", "{:.1f} GiB"),
    ("GPU memory", "memory/peak_device_gib", "{:.1f} GiB"),
)


def can_draw(console: Console) -> bool:
    """Tell if a view can stay in its place: on a terminal of a person, which moves its cursor and shows the bars."""
    terminal = console.file.isatty() and console.is_terminal and not console.is_dumb_terminal
    return terminal and console.encoding.startswith("utf") and not os.environ.get("CI")


class Drawing:
    """A view of runs that stays in its place while the context lasts, below all that this process prints.

    Its last state is left at the end. The cursor stays visible, on an empty line below the view: the terminal is in
    order also after a process that ends at once, and a line that another process or a C library writes begins there.
    Nothing draws but the caller and what is printed; there is no thread.

    Args:
        runs: At least one.
        console: Of a terminal for which :func:`can_draw` holds.
    """

    def __init__(self, runs: Sequence[Watched], console: Console) -> None:
        self._live = Live(
            get_renderable=lambda: _Fitting(view(runs, console.width)),
            console=console,
            auto_refresh=False,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._stack = ExitStack()

    def __enter__(self) -> Drawing:
        plain = sys.stderr
        self._stack.enter_context(self._live)
        self._stack.enter_context(_handlers_write_to(plain, sys.stderr))
        self._live.console.show_cursor(True)
        self.draw()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def draw(self) -> None:
        """Draw anew, in place of the last drawing."""
        self._live.refresh()

    def let_go(self) -> None:
        """Leave the last drawing where it is, as another process has written below it; the next begins there."""
        self._live._live_render._shape = None  # the height that the cursor goes up by; rich has no other way


@contextmanager
def _handlers_write_to(old: TextIO, new: TextIO) -> Iterator[None]:
    """Let the handlers of logging that write to one stream write to another, above the view."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = {handler for logger in loggers if isinstance(logger, logging.Logger) for handler in logger.handlers}
    moved = [each for each in found if isinstance(each, logging.StreamHandler) and each.stream is old]
    for handler in moved:
        handler.setStream(new)
    try:
        yield
    finally:
        for handler in moved:
            handler.setStream(old)


class _Fitting:
    """A drawing, cut to the height of the terminal, and an empty line below it."""

    def __init__(self, drawing: RenderableType) -> None:
        self.drawing = drawing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self.drawing, options, pad=False)[: console.height - 1]:
            yield from line
            yield Segment.line()
        yield Segment.line()


def view(runs: Sequence[Watched], width: int) -> RenderableType:
    """Draw runs side by side, as many in a row as fit.

    Args:
        runs: At least one.
        width: Columns of the terminal.
    """
    in_a_row = min(len(runs), max(1, width // PANEL_WIDTH))
    grid = Table.grid(expand=True)
    for _ in range(in_a_row):
        grid.add_column(ratio=1)
    for first in range(0, len(runs), in_a_row):
        grid.add_row(*(_panel(run) for run in runs[first : first + in_a_row]))
    return grid


def _panel(run: Watched) -> Panel:
    state = run.facts.state
    parts = [_progress(run), _figures(run), *_curve(run), *_loads(run), *_events(run)]
    title = Text(run.name, "bold").append(f" {state}", COLORS.get(str(state), ""))
    return Panel(Group(*parts), title=title, title_align="left", border_style="dim")


def _progress(run: Watched) -> RenderableType:
    facts, whole = run.facts, run.facts.max_batches
    left = run.seconds_left() if run.running else None
    words = [f"batch {facts.batch} of {whole if whole is not None else facts.max_duration or '?'}"]
    words += [f"{duration(facts.seconds)} in training"] * (facts.seconds is not None)
    words += [f"{duration(left)} left"] * (left is not None)
    text = Text(", ".join(words))
    if whole is None:
        return text
    row = Table.grid(expand=True)  # a bar ends no line by itself
    row.add_row(ProgressBar(total=whole, completed=min(facts.batch, whole)))
    return Group(text, row)


def _figures(run: Watched) -> Table:
    """Lay the last numbers out in two columns of names and values."""
    facts = run.facts
    cells = [(name, form.format(value)) for name, key, form in FIGURES if (value := facts.number(key)) is not None]
    best = best_held_out(facts)
    if best and (last := list(facts.held_out.values())):
        cells[1:1] = [("held out", f"{last[-1]:.4f}"), ("lowest", f"{best[1]:.4f} at {best[0]}")]
    waits = [line["data/wait_seconds"] for line in run.lines if "data/wait_seconds" in line]
    if waits:
        cells.append(("data wait", f"{sum(waits) / len(waits):.3f} s a batch"))
    stalls = [line["checkpoint/stall_seconds"] for line in run.lines if "checkpoint/stall_seconds" in line]
    if stalls:
        cells.append(("save wait", f"{stalls[-1]:.2f} s"))
    table = Table.grid(padding=(0, 2))
    for first in range(0, len(cells), 2):
        pairs = cells[first : first + 2]
        table.add_row(*(part for name, value in pairs for part in (Text(name, "dim"), Text(value))))
    return table


def _curve(run: Watched) -> Iterator[Text]:
    losses = [line[LOSS_KEY] for line in run.lines if isinstance(line.get(LOSS_KEY), (int, float))]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if len(losses) > 1:
        shown = chunks(losses, MAX_EXPERTS, lambda part: sum(part) / len(part))
        low, high = min(shown), max(shown)
        yield Text("loss  ", "dim").append("".join(bar(loss - low, high - low) for loss in shown), "blue")


def _loads(run: Watched) -> Iterator[Text]:
    """Draw a bar for each expert, by layer; half the height is the uniform load."""
    loads = {name: value for name, value in run.facts.last.items() if name.startswith(LOAD_PREFIX)}
    if not loads:
        return
    worst = sorted(loads, key=lambda name: -max(loads[name]) * len(loads[name]))[:MAX_LAYERS]
    more = f"; the {len(worst)} least even of {len(loads)} layers" if len(loads) > len(worst) else ""
    yield Text(f"expert load (half a bar is uniform{more})", "dim")
    for name in (name for name in loads if name in worst):
        ratios = [share * len(loads[name]) for share in loads[name]]
        line = Text(f"{name.removeprefix(LOAD_PREFIX):>8} ", "dim")
        for ratio in chunks(ratios, MAX_EXPERTS, max):
            line.append(bar(ratio, 2.0), "red" if ratio > 1.5 else "yellow" if ratio < 0.5 else "green")
        yield line.append(f" most {max(ratios):.2f}", "dim")


def _events(run: Watched) -> Iterator[Text]:
    facts = run.facts
    events = [(batch, f"held-out loss {loss:.4f}") for batch, loss in facts.held_out.items()]
    events += [(batch, "saved") for batch in facts.checkpoints]
    events += [(line["batch"], "step skipped: not finite") for line in run.lines if line.get("skipped_steps")]
    for event in facts.events:
        begun = f"begun on {event.get('world_size', '?')} ranks"
        text = begun if event["event"] == "start" else f"{event.get('state')} {event.get('reason', '')}"
        events.append((event.get("batch") or 0, text.strip()))
    for batch, text in sorted(events, key=lambda pair: pair[0])[-MAX_EVENTS:]:
        yield Text(f"batch {batch}: ", "dim").append(redact(text))
    yield from (Text(redact(problem), "red") for problem in facts.problems)


def bar(value: float, most: float) -> str:
    """Draw a value between 0 and ``most`` as one letter."""
    share = value / most if most > 0 else 0.0
    if not math.isfinite(share):
        return BLOCKS[-1]
    return BLOCKS[min(len(BLOCKS) - 1, max(0, int(share * len(BLOCKS))))]


def chunks(values: Sequence[float], most: int, join: Callable[[Sequence[float]], float]) -> list[float]:
    """Join neighbors, so that there are at most ``most`` values."""
    size = math.ceil(len(values) / most)
    return [join(values[first : first + size]) for first in range(0, len(values), size)]
