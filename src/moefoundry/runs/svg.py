"""Plots as SVG that belongs into a page: its lines and texts have the page's colors, light or dark, and no ids clash.

Matplotlib draws with a color that stands for the page's own; in the SVG it becomes ``currentColor``. Text stays text.
Figures are as wide as a phone and grow with the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moefoundry.runs.series import Curve, Load

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # stands for the page's color of text
COLORS = ("#3b82f6", "#f97316", "#10a37f", "#d946a6", "#a3861a", "#8b5cf6", "#ef4444", "#64748b")  # on white and black
WIDTH, HEIGHT = 4.0, 2.6  # inches
FRAME = {"left": 0.15, "right": 0.98, "bottom": 0.17, "top": 0.92}  # fitting it to the labels takes twice the time
SHARP = "image-rendering:crisp-edges;image-rendering:pixelated"  # as matplotlib writes it
MAX_SHARP_ROWS = 300
MAX_CELLS = 200_000  # dots of an image
MAX_LAYER_LABELS = 32
STYLE: dict[str, Any] = {
    "font.size": 8,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 7,
}
_ID = re.compile(r'(\bid="|href="#|url\(#)')


class Canvas:
    """A figure that becomes SVG.

    Attributes:
        figure: Figure to draw on.
        svg: The text, once the figure is complete.
    """

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.svg = ""


@contextmanager
def drawing(name: str, height: float = HEIGHT) -> Iterator[Canvas]:
    """Give a canvas to draw on; behind the block it has its SVG.

    Args:
        name: Name that no other plot of the page has: letters, digits and dashes.
        height: Inches.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        canvas = Canvas(Figure(figsize=(WIDTH, height)))
        yield canvas
        file = io.StringIO()
        canvas.figure.savefig(
            file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    canvas.svg = _ID.sub(rf"\g<1>{name}-", text).replace(INK, "currentColor")


def line_plot(
    name: str,
    label: str,
    curves: Mapping[str, Curve],
    marked: Mapping[str, Curve] | None = None,
    levels: Mapping[str, float] | None = None,
    resumed: Sequence[int] = (),
) -> str:
    """Plot metrics over batches.

    Args:
        name: As of :func:`drawing`.
        label: Quantity and unit.
        curves: Lines by their names, with a band from the least to the most of a bin.
        marked: Metrics of some batches only; each value has a dot.
        levels: Horizontal lines.
        resumed: Batches after which the run was resumed.
    """
    with drawing(name) as canvas:
        axes = canvas.figure.subplots(gridspec_kw=FRAME)
        for number, (title, curve) in enumerate({**curves, **(marked or {})}.items()):
            color = COLORS[number % len(COLORS)]
            style = "o-" if marked and title in marked else "-"
            axes.plot(curve.batches, curve.means, style, color=color, label=title, markersize=2.5)
            if title in curves and curve.lows != curve.highs:
                axes.fill_between(curve.batches, curve.lows, curve.highs, color=color, alpha=0.2, linewidth=0)
        for number, (title, level) in enumerate((levels or {}).items()):
            axes.axhline(level, linestyle=(0, (4, 2 + number)), color=INK, linewidth=0.8, label=title)
        for batch in resumed:
            axes.axvline(batch, linestyle=":", color=INK, linewidth=0.8)
        axes.set_xlabel("batch")
        axes.set_title(label, loc="left", fontsize=7)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        _focus(axes, [*curves.values(), *(marked or {}).values()])
        _whole_batches(axes)
        axes.legend()
    return canvas.svg


def _whole_batches(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def _focus(axes: Axes, curves: Sequence[Curve]) -> None:
    """Use a logarithmic axis where values are positive and cover more than three decades."""
    values = [value for curve in curves for value in curve.means]
    if values and min(values) > 0 and max(values) > 1000 * min(values):
        axes.set_yscale("log")


def load_plot(name: str, loads: Mapping[str, Load]) -> str:
    """Plot the load of each expert over batches, layer above layer; 1 is the uniform load.

    Args:
        name: As of :func:`drawing`.
        loads: At least one.
    """
    import numpy as np

    times = max((load.edges for load in loads.values()), key=len)
    step = -(-len(times) * sum(len(load.values[0]) for load in loads.values()) // MAX_CELLS)
    images = [np.array(joined(load, step)).T for load in loads.values()]
    width = max(image.shape[1] for image in images)
    images = [np.pad(image, ((0, 0), (width - image.shape[1], 0)), constant_values=np.nan) for image in images]
    ends = np.cumsum([len(image) for image in images])
    last = 2 * times[-1] - times[-2] if len(times) > 1 else times[0] + 1
    with drawing(name, 0.9 + min(6.0, max(1.5, ends[-1] / 40))) as canvas:
        axes = canvas.figure.subplots()
        canvas.figure.set_layout_engine("constrained")
        axes.grid(False)
        extent = (times[0], last, ends[-1], 0)
        look: dict[str, Any] = {"cmap": "RdBu_r", "vmin": 0, "vmax": 2, "aspect": "auto", "interpolation": "none"}
        image = axes.imshow(np.concatenate(images), extent=extent, **look)
        for end in ends[:-1]:
            axes.axhline(end, color=INK, linewidth=0.8)
        middles = [end - len(each) / 2 for end, each in zip(ends, images, strict=True)]
        shown = slice(None, None, -(-len(loads) // MAX_LAYER_LABELS))
        axes.set_yticks(middles[shown], [layer.removeprefix("layer") for layer in loads][shown])
        axes.set(xlabel="batch", ylabel="layer")
        _whole_batches(axes)
        canvas.figure.colorbar(image, ax=axes, location="top", aspect=40, label="load / uniform load")
    if ends[-1] > MAX_SHARP_ROWS:  # the browser takes means of rows rather than leaving some out
        return canvas.svg.replace(SHARP, "")
    return canvas.svg


def joined(load: Load, step: int) -> list[list[float]]:
    """Join bins of a load by their means: fewer columns where an image would have too many dots."""
    groups = [load.values[first : first + step] for first in range(0, len(load.values), step)]
    return [[sum(values) / len(group) for values in zip(*group, strict=True)] for group in groups]
