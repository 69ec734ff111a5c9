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
FRAME = {"left": 0.15, "right": 0.98, "bottom": 0.17, "top": 0.97}  # fitting it to the labels takes twice the time
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
        axes.set_ylabel(label)
        axes.yaxis.set_label_coords(-0.13, 0.5)
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        _focus(axes, [*curves.values(), *(marked or {}).values()])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return canvas.svg


def _focus(axes: Axes, curves: Sequence[Curve]) -> None:
    """Use a logarithmic axis where values are positive and cover more than three decades."""
    values = [value for curve in curves for value in curve.means]
    if values and min(values) > 0 and max(values) > 1000 * min(values):
        axes.set_yscale("log")


def load_plot(name: str, loads: Mapping[str, Load]) -> str:
    """Plot the load of each expert over batches, a strip for each layer; 1 is the uniform load.

    Args:
        name: As of :func:`drawing`.
        loads: At least one.
    """
    import numpy as np

    rows = len(loads)
    with drawing(name, 0.8 + min(1.0, 12 / rows) * rows) as canvas:
        canvas.figure.set_layout_engine("constrained")
        strips = canvas.figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
        for axes, (layer, load) in zip(strips, loads.items(), strict=True):
            values_TE = np.array(load.values)
            times, last = load.edges, 2 * load.edges[-1] - load.edges[-2] if len(load.edges) > 1 else load.edges[0] + 1
            axes.grid(False)
            image = axes.imshow(
                values_TE.T,
                cmap="RdBu_r",
                vmin=0,
                vmax=2,
                aspect="auto",
                interpolation="nearest",
                extent=(times[0], last, values_TE.shape[1] - 0.5, -0.5),
            )
            axes.set_ylabel(layer.removeprefix("layer"), rotation=0, ha="right", va="center")
            axes.set_yticks([])
            axes.xaxis.get_major_locator().set_params(integer=True)
        strips[-1].set_xlabel("batch")
        canvas.figure.supylabel("layer, a row for each expert", fontsize=7)
        canvas.figure.colorbar(image, ax=list(strips), location="top", aspect=40, label="load / uniform load")
    return canvas.svg
