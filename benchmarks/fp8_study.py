"""What FP8 does to training: held-out loss, routing and tensors of ``configs/examples/fp8-twin.yaml``.

    python -m benchmarks.fp8_study                 # 6 cases x 5 seeds, two at a time; then as with --plot
    python -m benchmarks.fp8_study --seeds 22 23   # adds seeds to results/studies/fp8.json
    python -m benchmarks.fp8_study --plot          # from the last results: the plots and tables of docs/fp8.md
    python -m benchmarks.fp8_study --quick         # does everything run? two batches of one seed; writes nothing

A run is a training of one thread, under two minutes on a core of its own; nothing differs but the seed and the keys of
:data:`CASES`. Every seed has initial weights and an order of data of its own, and all are evaluated on the same text.
What is said about tensors (``fp8_tensors.py``) comes from the run ``deepseek_v3`` of the first seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, repeat
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from scipy.stats import t as student
from torch import Tensor

from benchmarks.fp8_tensors import FACTORS, LONG, TENSORS, accuracies, breaks, observe, with_precision
from benchmarks.harness import RESULTS, ROOT, replace_table
from moefoundry.build import build_trainer
from moefoundry.config import Recipe, load_recipe
from moefoundry.data.loader import build_loader
from moefoundry.model.transformer import MoETransformer
from moefoundry.parallel import moe_layers
from moefoundry.trainer import EXPECTED_WARNINGS

RECIPE = ROOT.parent / "configs" / "examples" / "fp8-twin.yaml"
BASELINE, OBSERVED = "bf16_emulated", "deepseek_v3"
FP32_MOMENTS, NO_FP8 = "precision.optimizer_moments=fp32", "precision.fp8.recipe=null"
CASES = {
    OBSERVED: [FP32_MOMENTS],
    "deepseek_v3, BF16 moments": [],
    "tensorwise": [FP32_MOMENTS, "precision.fp8.recipe=tensorwise"],
    "rowwise": [FP32_MOMENTS, "precision.fp8.recipe=rowwise"],
    BASELINE: [FP32_MOMENTS, NO_FP8],
    "fp32": [FP32_MOMENTS, NO_FP8, "precision.compute=fp32"],
}
OTHERS = [case for case in CASES if case != BASELINE]
SWITCHES = ("fp32", OBSERVED, "tensorwise", "rowwise")
SEEDS = (17, 18, 19, 20, 21)
MOMENTS = (0, 20, 80)  # batches after which tensors are looked at
HELD_OUT, PROBED = 48, 8  # sequences of the held-out split: for the loss; for routing and tensors
RECORD = RESULTS / "studies" / "fp8.json"
DOCS = ROOT.parent / "docs"

Run = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_study", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--plot", action="store_true", help="train nothing")
    parser.add_argument("--quick", action="store_true", help="two batches of one seed; prints, writes nothing")
    parser.add_argument("--changes", nargs="+", default=[], metavar="KEY=VALUE", help="of every recipe, with --quick")
    args = parser.parse_args(arguments)
    if args.quick:
        changes = ["max_duration=2ba", *args.changes]
        runs = compared(train(case, SEEDS[0], (0, 2) * (case == OBSERVED), changes) for case in CASES)
        print("\n".join(tables(runs).values()))
        with tempfile.TemporaryDirectory() as folder:
            plot(runs, Path(folder))
        return
    if not args.plot:
        os.environ["OMP_NUM_THREADS"] = "1"
        with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
            for seed in args.seeds:
                moments = [MOMENTS if (case, seed) == (OBSERVED, SEEDS[0]) else () for case in CASES]
                new = compared(pool.map(train, CASES, repeat(seed), moments))
                old = json.loads(RECORD.read_text()) if RECORD.exists() else []
                runs = [run for run in old if run["seed"] != seed] + new
                RECORD.write_text(json.dumps(sorted(runs, key=lambda run: run["seed"]), indent=1) + "\n")
    runs = json.loads(RECORD.read_text())
    plot(runs, DOCS)
    for name, table in tables(runs).items():
        replace_table(DOCS / "fp8.md", f"fp8_study, {name}", table)


# ------------------------------------------------------------------------------------------------------------- one run


def train(case: str, seed: int, moments: Sequence[int] = (), changes: Sequence[str] = ()) -> Run:
    """One run: the loss and routing at its end, and at ``moments`` the accuracy of its tensors."""
    torch.set_num_threads(1)
    start = time.process_time()
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(case, [*changes, f"seed={seed}", f"run_dir={folder}/run"])
        text_NS = held_out_text(recipe)
        trainer = build_trainer(replace(recipe, eval_loader=None))
        model, probe = trainer.state.model.model, Probe(text_NS[:PROBED], moments)
        trainer.state.callbacks.append(probe)
        trainer.fit()
        trainer.close()
    run: Run = {"case": case, "seed": seed, "held_out": evaluate(model, text_NS)[0]}
    _, run["chosen"] = evaluate(model, text_NS[:PROBED])
    if case == BASELINE:
        run["switched"] = switched(model, text_NS[:PROBED], changes)
    if moments:
        run |= {"sqnr": probe.seen, "breaks": breaks(observe(model, text_NS[:PROBED]), text_NS.shape[1])}
    return run | {"cpu_seconds": round(time.process_time() - start)}


def recipe_of(case: str, changes: Sequence[str]) -> Recipe:
    """The twin, as ``case`` has it."""
    common = ["callbacks.report=null", "progress_bar=false", "log_to_console=false", "save_interval=1000ba"]
    common += ["scheduler.timing=composer", "eval_loader.dataset.shuffle=true", "eval_loader.dataset.shuffle_seed=0"]
    return load_recipe(RECIPE, [*CASES[case], *common, *changes])


def held_out_text(recipe: Recipe) -> Tensor:
    """int64 [N, S], at most ``HELD_OUT`` sequences."""
    assert recipe.eval_loader is not None, "the twin has one"
    loader = build_loader(recipe.eval_loader, batch_size=1, model_vocab_size=recipe.model.vocab_size)
    return torch.cat([batch["input_ids"] for batch in islice(loader, HELD_OUT)])


class Probe(Callback):
    """At ``moments``, the accuracies of the model's products."""

    def __init__(self, text_NS: Tensor, moments: Sequence[int]) -> None:
        self.text_NS, self.moments = text_NS, moments
        self.seen: dict[str, dict[str, dict[str, float]]] = {}

    def fit_start(self, state: State, logger: Logger) -> None:
        self.batch_end(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        batch = state.timestamp.batch.value
        if batch in self.moments:
            products = observe(state.model.model, self.text_NS)
            self.seen[str(batch)] = {name: accuracies(name, product) for name, product in products.items()}


@torch.no_grad()
def evaluate(model: MoETransformer, text_NS: Tensor) -> tuple[float, Tensor]:
    """Mean loss (nats a token), and the experts that tokens chose, int64 [L, T, K]."""
    chosen: list[list[Tensor]] = [[] for _ in moe_layers(model)]
    hooks = [
        layer.router.register_forward_hook(lambda *call, ids=ids: ids.append(call[2].topk_expert_ids))
        for layer, ids in zip(moe_layers(model), chosen, strict=True)
    ]
    losses = [model.eval()(batch, batch).lm.item() for batch in text_NS.split(PROBED)]
    for hook in hooks:
        hook.remove()
    return mean(losses), torch.stack([torch.cat(ids) for ids in chosen])


def switched(model: MoETransformer, text_NS: Tensor, changes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Trained weights in other precisions, against their own: relative loss (percent), routing overlap by layer."""
    loss, chosen_LTK = evaluate(model, text_NS)
    found = {}
    for case in SWITCHES:
        other = evaluate(with_precision(model, recipe_of(case, changes).precision), text_NS)
        found[case] = {"loss": 100 * (other[0] / loss - 1), "overlap": overlap(chosen_LTK, other[1])}
    return found


def overlap(a_LTK: Tensor, b_LTK: Tensor) -> list[float]:
    """By layer, the share of the (token, expert) choices of ``a`` that ``b`` makes too."""
    return (a_LTK.unsqueeze(3) == b_LTK.unsqueeze(2)).any(3).double().mean((1, 2)).tolist()


def compared(runs: Iterable[Run]) -> list[Run]:
    """The runs of one seed, with the overlap with the baseline's routing in place of every token's experts."""
    chosen = {run["case"]: (run, run.pop("chosen")) for run in runs}
    return [run | {"overlap": overlap(chosen[BASELINE][1], own)} for run, own in chosen.values()]


# ------------------------------------------------------------------------------------------------------------- reports


def tables(runs: list[Run]) -> dict[str, str]:
    """Markdown tables by their names in the page."""
    (observed,) = (run for run in runs if "sqnr" in run)
    return {
        "loss": loss_table(runs),
        "routing": routing_table(runs),
        "sqnr": sqnr_table(observed["sqnr"]),
        "scales": scales_table(observed["breaks"]),
        "tiles": tiles_table(observed["breaks"]),
        "sums": sums_table(observed["breaks"]),
    }


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, ["---"] * len(heads), *lines))


def differences(runs: list[Run], case: str) -> list[float]:
    """Held-out loss against the baseline of the same seed, percent, in the order of seeds."""
    own, baseline = ({run["seed"]: run["held_out"] for run in runs if run["case"] == name} for name in (case, BASELINE))
    return [100 * (own[seed] / baseline[seed] - 1) for seed in sorted(baseline)]


def half_interval(values: list[float]) -> float:
    """Half of the 95% confidence interval of the mean, by Student's t; NaN for a single value."""
    n = len(values)
    return student.ppf(0.975, n - 1) * stdev(values) / math.sqrt(n) if n > 1 else math.nan


def loss_table(runs: list[Run]) -> str:
    same = [run["switched"] for run in runs if run["case"] == BASELINE]
    lines = []
    for case in (BASELINE, *OTHERS):
        losses = [run["held_out"] for run in runs if run["case"] == case]
        cells = [case, f"{mean(losses):.4f} ({min(losses):.4f} .. {max(losses):.4f})"]
        if case != BASELINE:
            change = differences(runs, case)
            cells.append(f"{mean(change):+.2f}% ± {half_interval(change):.2f}")
            cells.append(", ".join(f"{each:+.2f}" for each in change))
        cells += [f"{mean(seed[case]['loss'] for seed in same):+.3f}%"] if case in SWITCHES else []
        lines.append(cells + [""] * (5 - len(cells)))
    return markdown(("", "held-out loss", "against the baseline", "each seed, %", "same weights, switched"), lines)


def routing_table(runs: list[Run]) -> str:
    same = [run["switched"] for run in runs if run["case"] == BASELINE]
    overlaps = {("same weights", case): [seed[case]["overlap"] for seed in same] for case in SWITCHES}
    overlaps |= {("trained", case): [run["overlap"] for run in runs if run["case"] == case] for case in OTHERS}
    lines = [
        [*names, *(f"{100 * mean(layer):.1f}%" for layer in zip(*of_seeds, strict=True))]
        for names, of_seeds in overlaps.items()
    ]
    return markdown(("", "", *(f"MoE layer {index + 1}" for index in range(len(lines[0]) - 2))), lines)


def sqnr_table(seen: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = []
    for tensor in TENSORS:
        columns = [[found[tensor] for found in products.values() if tensor in found] for products in seen.values()]
        lines.append([tensor, *(f"{mean(column):.1f} ({min(column):.1f} .. {max(column):.1f})" for column in columns)])
    return markdown(("dB", *(f"batch {moment}" for moment in seen)), lines)


def scales_table(found: dict[str, Any]) -> str:
    lines = [
        [name, way, f"{ratio:.1f} dB", f"{flushed:.2f}%", f"{lost:.2f}%"]
        for operand, name in (("x", "x"), ("grad", "dY"))
        for way, (ratio, flushed, lost) in found["scales"][operand].items()
    ]
    lines.append(["dY", "128x128: those that begin or end a sequence", "", "", f"{found['lost at ends']:.0f}% of them"])
    return markdown(("of", "a scale for each", "SQNR", "values lost to zero", "rows below 20 dB"), lines)


def tiles_table(found: dict[str, Any]) -> str:
    rows = {"from fresh values": found["fresh"], "re-tiled from kept FP8": found["kept"]}
    lines = [[name, *(f"{ratio:.2f}" for ratio in row.values())] for name, row in rows.items()]
    return markdown(("SQNR of dW, dB", "power-of-two scales", "FP32 scales"), lines)


def sums_table(found: dict[str, Any]) -> str:
    lines = [["dW of layer 2, K the tokens: SQNR of sums", *(f"{ratio:.1f} dB" for ratio in found["sums"].values())]]
    for length, lost in zip(LONG, zip(*found["shortfall"].values(), strict=True), strict=True):
        lines.append([f"sums of one sign, K = {length}: too small by", *(f"{percent:.3f}%" for percent in lost)])
    return markdown(("", *found["sums"]), lines)


def plot(runs: list[Run], folder: Path) -> None:
    """Loss differences, ratios by layer, outliers."""
    (observed,) = (run for run in runs if "sqnr" in run)
    with panels(folder / "fp8.png", 1, 1, (7, 2.8)) as (axes,):
        for place, case in enumerate(OTHERS):
            change = differences(runs, case)
            axes.plot(change, [place] * len(change), "C0o", ms=4, alpha=0.5)
            axes.errorbar(mean(change), place, xerr=half_interval(change), fmt="kD", ms=4, capsize=4)
        axes.axvspan(-0.25, 0.25, color="0.9", zorder=0)
        axes.axvline(0, color="0.5", lw=0.8)
        axes.set(yticks=range(len(OTHERS)), yticklabels=OTHERS, xlabel=f"held-out loss against {BASELINE}, %")
    with panels(folder / "fp8_sqnr.png", 2, 3, (9, 4.5)) as grid:
        for axes, tensor in zip(grid, TENSORS[:6], strict=True):
            for moment, products in observed["sqnr"].items():
                layers, ratios = by_layer(products, tensor)
                (line,) = axes.plot(layers, [mean(each) for each in ratios], "o-", ms=3, label=f"batch {moment}")
                axes.plot(layers, [min(each) for each in ratios], ":", color=line.get_color())
            axes.set(title=tensor, xticks=layers, xlabel="layer", ylabel="SQNR, dB")
        grid[0].legend(frameon=False, fontsize="small")
    with panels(folder / "fp8_outliers.png", 1, 2, (8, 3.2)) as grid:
        for axes, (title, ways) in zip(grid, observed["breaks"]["outliers"].items(), strict=True):
            for way, ratios in ways.items():
                axes.semilogx(FACTORS, ratios, "o-", ms=3, base=2, label=f"a scale for each {way}")
            axes.set(title=title, xlabel="times as large", ylabel="SQNR of the rest, dB")
        grid[0].legend(frameon=False, fontsize="small")


def by_layer(products: dict[str, dict[str, float]], tensor: str) -> tuple[list[int], list[list[float]]]:
    """Layers, and the ratios of ``tensor`` in each."""
    found: dict[int, list[float]] = {}
    for name, ratios in products.items():
        found.setdefault(int(re.findall(r"\d+", name)[0]), []).append(ratios[tensor])
    return sorted(found), [found[layer] for layer in sorted(found)]


@contextmanager
def panels(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on, then saved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
