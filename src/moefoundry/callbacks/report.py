"""The report of a finished run: page, plots, scores, a completion, the last checkpoint, the command that goes on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moefoundry.checkpoint.run_dir import store_of
from moefoundry.config import Recipe, redacted
from moefoundry.data.summary import CORPUS_FILE, read_corpus_summary
from moefoundry.runs.metrics import EVAL_KEY, read_metrics, task_scores
from moefoundry.runs.report import REPORT_FILE, report_page

LOSS_PLOT = "loss.png"
LOAD_PLOT = "expert_load.png"
TASK_PLOT = "tasks.png"
LOAD_WINDOW = 20  # batches that the load plot averages


@contextmanager
def unless_it_fails(part: str) -> Iterator[None]:
    """Go on behind this block when a part of the report fails, with a line that says why.

    The run itself has ended well, and is saved.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"warning: the report has no {part}: {reason}", file=sys.stderr, flush=True)


def write_report(recipe: Recipe, completion: str | None, command: Sequence[str]) -> None:
    """Write plots and ``report.html`` into ``run_dir`` and print the rest; one rank calls it, when all else is written.

    A part that fails is left out, with a line on standard error.

    Args:
        recipe: Recipe of the run.
        completion: A prompt and its completion by the trained model; None leaves it out.
        command: Command that started the run.
    """
    run_dir = Path(recipe.run_dir)
    metrics: list[dict[str, Any]] = []
    entropy: float | None = None
    with unless_it_fails("metrics"):
        metrics = read_metrics(run_dir)
    with unless_it_fails("unigram entropy"):
        entropy = unigram_entropy(recipe)
    plots: dict[str, Callable[[Path], bool]] = {
        LOSS_PLOT: lambda path: plot_loss(metrics, entropy, path),
        LOAD_PLOT: lambda path: plot_load(metrics, path),
        TASK_PLOT: lambda path: plot_tasks(metrics, path),
    }
    drawn = {}
    for name, plot in plots.items():
        with unless_it_fails(name):
            drawn[name] = plot(run_dir / name)
    lines = []
    losses = [line[EVAL_KEY] for line in metrics if EVAL_KEY in line]
    if losses:
        lines.append(f"held-out loss    {losses[-1]:.4f} nats/token")
    if losses and entropy is not None:
        lines.append(f"unigram entropy  {entropy:.4f} nats/token; the model is {compared(losses[-1], entropy)}")
    lines += [f"task             {name} {values[-1][1]:.4f}" for name, values in task_scores(metrics).items()]
    if completion is not None:
        lines += ["completion", *("    | " + line for line in redacted(completion, "").splitlines())]
    with unless_it_fails(REPORT_FILE):
        (run_dir / REPORT_FILE).write_text(report_page([run_dir]))
        drawn[REPORT_FILE] = True
    labels = {REPORT_FILE: "report", LOSS_PLOT: "loss curve", LOAD_PLOT: "expert load", TASK_PLOT: "tasks"}
    lines += [f"{labels[name]:17}{run_dir / name}" for name, done in drawn.items() if done]
    with unless_it_fails("checkpoint"):
        if checkpoint := store_of(run_dir).latest():
            lines.append(f"checkpoint       {checkpoint}")
    lines.append(f"go on with       {next_command(command, recipe.max_duration)}")
    print("\n".join(lines), flush=True)


def compared(loss: float, entropy: float) -> str:
    """Compare a loss with that of the best model that ignores context: ``0.2500 better`` or ``0.2500 worse``."""
    return f"{abs(loss - entropy):.4f} {'better' if loss <= entropy else 'worse'}"


def next_command(command: Sequence[str], max_duration: str) -> str:
    """Change a command so that it trains twice as long, from where the run stopped."""
    number = "".join(filter(str.isdigit, max_duration))
    longer = str(2 * int(number)) + max_duration.removeprefix(number)
    kept = [word for word in command if not word.startswith(("autoresume=", "max_duration="))]
    return shlex.join([*kept, "autoresume=true", f"max_duration={longer}"])


def unigram_entropy(recipe: Recipe) -> float | None:
    """Read the entropy of the held-out split's token frequencies, nats a token, as ``moefoundry prepare`` wrote it.

    There is none of several streams together.
    """
    loader = recipe.eval_loader
    if loader is None or loader.dataset.streams or not (Path(loader.dataset.local) / CORPUS_FILE).exists():
        return None
    split = read_corpus_summary(loader.dataset.local).splits.get(loader.dataset.split)
    return split.unigram_entropy_nats if split else None


def plot_loss(metrics: list[dict[str, Any]], entropy: float | None, path: Path) -> bool:
    """Plot training and held-out loss over batches. Returns whether there was any."""
    training = [(line["batch"], line["loss/train/lm"]) for line in metrics if "loss/train/lm" in line]
    if not training:
        return False

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), label="training")
    held_out = [(line["batch"], line[EVAL_KEY]) for line in metrics if EVAL_KEY in line]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held out")
    if entropy is not None:
        axes.axhline(entropy, linestyle="--", color="gray", label="unigram entropy, held out")
    axes.set(xlabel="batch", ylabel="cross entropy, nats/token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def plot_tasks(metrics: list[dict[str, Any]], path: Path) -> bool:
    """Plot the metrics of tasks over batches. Returns whether there were any."""
    scores = task_scores(metrics)
    if not scores:
        return False

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3 + 0.25 * len(scores)), layout="constrained")
    axes = figure.subplots()
    for name, values in scores.items():
        axes.plot(*zip(*values, strict=True), "o-", label=name)
    axes.set(xlabel="batch", ylabel="metric of task")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def plot_load(metrics: list[dict[str, Any]], path: Path) -> bool:
    """Plot the load of each expert of each layer over the last batches, as a multiple of the uniform load.

    Returns:
        Whether there were layers with experts.
    """
    recent = metrics[-LOAD_WINDOW:]
    names = [name for name in recent[-1] if name.startswith("moe/load/")] if recent else []
    if not names:
        return False

    from matplotlib.figure import Figure

    load_LE = torch.tensor([[line[name] for line in recent if name in line] for name in names]).mean(dim=1)
    figure = Figure(figsize=(7, 0.5 * len(names) + 1.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(load_LE * load_LE.shape[1], cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set(xlabel="expert", title=f"expert load, last {len(recent)} batches (1 = uniform)")
    axes.set_yticks(range(len(names)), [name.removeprefix("moe/load/") for name in names])
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
    return True
