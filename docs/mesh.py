"""Draw ``docs/mesh.png``: eight ranks, and who shares what. Repeat with ``make docs``."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).with_suffix(".png")
REPLICATE, SHARD, EXPERT = 2, 4, 2
EXPERT_COLOURS = ["#fbe5cc", "#d6e4f5"]


def main() -> None:
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-1.6, 4.3), ylim=(-0.55, 2.35))
    axes.axis("off")
    for row in range(REPLICATE):
        y = REPLICATE - 1 - row
        axes.add_patch(_box(-0.08, y + 0.02, SHARD + 0.06, 0.96, "none", "#888888"))
        axes.text(-0.2, y + 0.5, f"copy {row}\n(replicate {row})", ha="right", va="center", fontsize=10)
        for shard in range(SHARD):
            rank, expert = row * SHARD + shard, shard % EXPERT
            axes.add_patch(_box(shard + 0.08, y + 0.12, 0.78, 0.74, EXPERT_COLOURS[expert], "#444444"))
            lines = [f"rank {rank}", f"dense: part {shard} of {SHARD}", f"experts: half {expert}"]
            lines.append(f"(its part {shard // EXPERT} of {SHARD // EXPERT})")
            axes.text(shard + 0.47, y + 0.49, "\n".join(lines), ha="center", va="center", fontsize=8.5)
    for group in range(SHARD // EXPERT):
        left, right = group * EXPERT + 0.1, (group + 1) * EXPERT - 0.16
        arrow = {"arrowstyle": "<|-|>", "color": "#b05a00"}
        axes.annotate("", xy=(right, 2.08), xytext=(left, 2.08), arrowprops=arrow)
        axes.text((left + right) / 2, 2.14, "all-to-all of tokens (expert)", ha="center", fontsize=9, color="#b05a00")
    arrow = {"arrowstyle": "<|-|>", "color": "#22558a"}
    axes.annotate("", xy=(SHARD - 0.14, -0.12), xytext=(0.08, -0.12), arrowprops=arrow)
    text = "all-gather and reduce-scatter of dense parameters (shard); of experts between ranks of one colour"
    axes.text(SHARD / 2, -0.32, text, ha="center", fontsize=9, color="#22558a")
    axes.annotate("", xy=(SHARD + 0.12, 1.6), xytext=(SHARD + 0.12, 0.4), arrowprops={"arrowstyle": "<|-|>"})
    axes.text(SHARD + 0.17, 1.0, "all-reduce\nof gradients", va="center", fontsize=9, rotation=90)
    figure.savefig(OUT, dpi=110)


def _box(x: float, y: float, width: float, height: float, face: str, edge: str) -> FancyBboxPatch:
    return FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", facecolor=face, edgecolor=edge)


if __name__ == "__main__":
    main()
