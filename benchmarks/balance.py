"""Three ways to balance experts on the quickstart, paired by seed: nothing, the auxiliary loss, the expert bias.

    python -m benchmarks.balance                # 3 ways x 3 seeds, two at a time; writes results/studies/balance.json
    python -m benchmarks.balance --plot         # from the last results: docs/balance.png, the table of docs/balance.md

Each run is ``configs/quickstart.yaml`` in one process of one thread, with nothing changed but the seed, the keys of
:data:`WAYS`, and Composer's timing of the schedule, with which the committed results were measured. Compared are the
mean max violation over the last 50 steps and the held-out loss at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.harness import RESULTS, ROOT, replace_table

WAYS = {
    "none": ["model.moe.balance.aux_loss_weight=0"],
    "auxiliary loss": [],
    "expert bias": ["model.moe.balance.aux_loss_weight=0", "model.moe.balance.bias_update_rate=0.003"],
}
SEEDS = (17, 18, 19)
LAST_STEPS = 50
RECORD = RESULTS / "studies" / "balance.json"
PLOT, PAGE = ROOT.parent / "docs" / "balance.png", ROOT.parent / "docs" / "balance.md"
VIOLATION, HELD_OUT = "moe/max_violation", "metrics/eval/LanguageCrossEntropy"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balance", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--plot", action="store_true", help="train nothing")
    args = parser.parse_args()
    if not args.plot:
        cases = [(way, seed) for seed in SEEDS for way in WAYS]
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = list(pool.map(lambda case: train(*case), cases))
        RECORD.write_text(json.dumps(runs, indent=1) + "\n")
    runs = json.loads(RECORD.read_text())
    plot(runs)
    replace_table(PAGE, "benchmarks/balance.py", table(runs))


def train(way: str, seed: int) -> dict[str, Any]:
    """One run, from its ``metrics.jsonl``."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "scripts/train.py", "configs/quickstart.yaml", f"run_dir={scratch}/run"]
        command += [f"seed={seed}", "callbacks.report=null", "save_interval=1000ba", "progress_bar=false"]
        command += ["scheduler.timing=composer", *WAYS[way]]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT.parent, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line[HELD_OUT] for line in lines if HELD_OUT in line][-1]
    return {"way": way, "seed": seed, "held_out": held_out, "max_violation": [line[VIOLATION] for line in lines]}


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds, and the paired differences that count."""
    heads = ("", "max violation, last 50 steps", "against none", "held-out loss", "against the auxiliary loss")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for way in WAYS:
        own, none, aux = (by_seed(runs, name) for name in (way, "none", "auxiliary loss"))
        violation = [late(run) for run in own]
        ratio = [late(run) / late(other) for run, other in zip(own, none, strict=True)]
        change = [100 * (run["held_out"] / other["held_out"] - 1) for run, other in zip(own, aux, strict=True)]
        cells = [
            way,
            f"{mean(violation):.2f} ({min(violation):.2f} .. {max(violation):.2f})",
            f"{mean(ratio):.2f} ({min(ratio):.2f} .. {max(ratio):.2f})",
            f"{mean(run['held_out'] for run in own):.3f}",
            f"{mean(change):+.2f}% ({min(change):+.2f} .. {max(change):+.2f})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_seed(runs: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
    """The runs of one way, in the order of seeds."""
    return sorted((run for run in runs if run["way"] == way), key=lambda run: run["seed"])


def late(run: dict[str, Any]) -> float:
    """Mean max violation over the last steps."""
    return mean(run["max_violation"][-LAST_STEPS:])


def plot(runs: list[dict[str, Any]]) -> None:
    """Max violation over training, one line a run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, way in enumerate(WAYS):
        for number, run in enumerate(by_seed(runs, way)):
            label = None if number else way
            axes.plot(range(1, len(run["max_violation"]) + 1), run["max_violation"], f"C{index}", lw=0.9, label=label)
    axes.set(xlabel="step", ylabel="max violation", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(PLOT, dpi=150)


if __name__ == "__main__":
    main()
