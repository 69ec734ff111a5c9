"""Draw ``docs/architecture.png``: how a recipe becomes a run. Repeat with ``make docs``."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).with_suffix(".png")
BLUE, GREEN, ORANGE, GRAY = "#d6e4f5", "#d9f0dc", "#fbe5cc", "#eeeeee"

BOXES: dict[str, tuple[float, float, float, float, str, str]] = {
    # name: x, y, width, height, colour, text
    "recipe": (0.0, 4.6, 2.2, 0.9, GRAY, "recipe.yaml\nkey=value ..."),
    "config": (0.0, 3.1, 2.2, 0.9, BLUE, "config/\ntyped, every error at once"),
    "corpus": (0.0, 1.2, 2.2, 0.9, GRAY, "text, JSONL, source"),
    "data": (0.0, -0.3, 2.2, 0.9, BLUE, "data/\ntokenizer, MDS shards,\npacked batches"),
    "model": (3.2, 4.6, 2.9, 0.9, GREEN, "model/  on meta, one device\nattention, norm, head + loss"),
    "moe": (3.2, 3.1, 2.9, 0.9, GREEN, "moe/  route, dispatch,\nexperts, combine, shared"),
    "ops": (3.2, 1.6, 2.9, 0.9, GREEN, "ops/  permute, grouped GEMM,\nSwiGLU, cross entropy, fp8/"),
    "precision": (7.1, 4.6, 2.6, 0.9, ORANGE, "precision.py\nfp32, bf16, emulated, FP8"),
    "mesh": (7.1, 3.1, 2.6, 0.9, ORANGE, "mesh.py\nreplicate, shard, expert"),
    "parallel": (7.1, 1.6, 2.6, 0.9, ORANGE, "parallel.py\nexperts, checkpointing, FSDP"),
    "trainer": (
        3.2,
        -0.3,
        6.5,
        0.9,
        BLUE,
        "build.py  parts of the run, from their tables\ntrainer.py  Composer Trainer: micro-batches, evaluation",
    ),
    "conversion": (10.7, 4.6, 2.5, 0.9, BLUE, "conversion/  evaluation/\nHugging Face, generation"),
    "checkpoint": (10.7, 3.1, 2.5, 0.9, BLUE, "checkpoint/\nhashed, on any mesh"),
    "callbacks": (10.7, 1.6, 2.5, 0.9, BLUE, "callbacks/\nmetrics, checkpoints, report"),
    "run_dir": (10.7, -0.3, 2.5, 0.9, GRAY, "run_dir\nmetrics.jsonl, plots,\ncheckpoints"),
}
ARROWS = [
    ("recipe", "config"),
    ("config", "model"),
    ("corpus", "data"),
    ("data", "trainer"),
    ("model", "moe"),
    ("moe", "ops"),
    ("model", "precision"),
    ("precision", "mesh"),
    ("mesh", "parallel"),
    ("parallel", "trainer"),
    ("trainer", "run_dir"),
    ("callbacks", "checkpoint"),
    ("checkpoint", "conversion"),
    ("callbacks", "run_dir"),
]


def main() -> None:
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.3, 13.5), ylim=(-0.7, 5.9))
    axes.axis("off")
    for start, end in ARROWS:
        _arrow(axes, start, end)
    for x, y, width, height, colour, text in BOXES.values():
        axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.05", facecolor=colour, edgecolor="#444444")
        )
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9.5)
    figure.savefig(OUT, dpi=110)


def _arrow(axes: Axes, start: str, end: str) -> None:
    """From the edge of one box to the nearest edge of another."""
    (x0, y0, w0, h0, *_), (x1, y1, w1, h1, *_) = BOXES[start], BOXES[end]
    if x0 + w0 < x1:
        tail, head = (x0 + w0 + 0.05, y0 + h0 / 2), (x1 - 0.08, y1 + h1 / 2)
    elif y0 > y1:
        x = x0 + w0 / 2
        tail, head = (x, y0 - 0.05), (min(max(x, x1), x1 + w1), y1 + h1 + 0.08)
    else:
        x = x0 + w0 / 2
        tail, head = (x, y0 + h0 + 0.05), (x, y1 - 0.08)
    axes.annotate("", xy=head, xytext=tail, arrowprops={"arrowstyle": "-|>", "color": "#444444"})


if __name__ == "__main__":
    main()
