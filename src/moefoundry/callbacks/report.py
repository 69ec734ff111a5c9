"""What a finished run shows: two plots, a completion, where the checkpoint is and how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moefoundry.callbacks.metrics_file import read_metrics
from moefoundry.checkpoint.run_dir import store_of
from moefoundry.config import Recipe, redacted
from moefoundry.data.summary import CORPUS_FILE, read_corpus_summary

LOSS_PLOT = "loss.png"
LOAD_PLOT = "expert_load.png"
LOAD_WINDOW = 20  # batches that the load plot averages
EVAL_KEY = "metrics/eval/LanguageCrossEntropy"


def write_report(recipe: Recipe, completion: str, command: Sequence[str]) -> None:
    """Write the plots into ``run_dir`` and print the rest; one rank calls it, when everything else is written.

    Args:
        recipe: The run's recipe.
        completion: A prompt and what the trained model made of it.
        command: The command that started the run, to be repeated for the next.
    """
    run_dir = Path(recipe.run_dir)
    metrics = read_metrics(run_dir)
    entropy = unigram_entropy(recipe)
    plot_loss(metrics, entropy, run_dir / LOSS_PLOT)
    plot_load(metrics, run_dir / LOAD_PLOT)
    lines = []
    losses = [line[EVAL_KEY] for line in metrics if EVAL_KEY in line]
    if losses:
        lines.append(f"held-out loss    {losses[-1]:.4f} nats/token")
    if losses and entropy is not None:
        lines.append(f"unigram entropy  {entropy:.4f} nats/token; the model is {compared(losses[-1], entropy)}")
    lines += [
        "completion",
        *("    | " + line for line in redacted(completion, "").splitlines()),
        f"loss curve       {run_dir / LOSS_PLOT}",
        f"expert load      {run_dir / LOAD_PLOT}",
        f"checkpoint       {store_of(run_dir).latest()}",
        f"go on with       {next_command(command, recipe.max_duration)}",
    ]
    print("\n".join(lines), flush=True)


def compared(loss: float, entropy: float) -> str:
    """``0.2500 better`` or ``0.2500 worse`` than the best model that ignores context."""
    return f"{abs(loss - entropy):.4f} {'better' if loss <= entropy else 'worse'}"


def next_command(command: Sequence[str], max_duration: str) -> str:
    """The same command, to train twice as long, from where the run stopped."""
    number = "".join(filter(str.isdigit, max_duration))
    longer = str(2 * int(number)) + max_duration.removeprefix(number)
    kept = [word for word in command if not word.startswith(("autoresume=", "max_duration="))]
    return shlex.join([*kept, "autoresume=true", f"max_duration={longer}"])


def unigram_entropy(recipe: Recipe) -> float | None:
    """Entropy of the held-out split's token frequencies, nats a token, as ``moefoundry prepare`` recorded it."""
    loader = recipe.eval_loader
    if loader is None or not (Path(loader.dataset.local) / CORPUS_FILE).exists():
        return None
    split = read_corpus_summary(loader.dataset.local).splits.get(loader.dataset.split)
    return split.unigram_entropy_nats if split else None


def plot_loss(metrics: list[dict[str, Any]], entropy: float | None, path: Path) -> None:
    """Training and held-out loss over batches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["batch"] for line in metrics], [line["loss/train/lm"] for line in metrics], label="training")
    held_out = [(line["batch"], line[EVAL_KEY]) for line in metrics if EVAL_KEY in line]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held out")
    if entropy is not None:
        axes.axhline(entropy, linestyle="--", color="gray", label="unigram entropy, held out")
    axes.set(xlabel="batch", ylabel="cross entropy, nats/token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_load(metrics: list[dict[str, Any]], path: Path) -> None:
    """Load of each expert of each layer over the last batches, as a multiple of the uniform load."""
    from matplotlib.figure import Figure

    recent = metrics[-LOAD_WINDOW:]
    names = [name for name in recent[-1] if name.startswith("moe/load/")] if recent else []
    if not names:
        return
    load_LE = torch.tensor([[line[name] for line in recent if name in line] for name in names]).mean(dim=1)
    figure = Figure(figsize=(7, 0.5 * len(names) + 1.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(load_LE * load_LE.shape[1], cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
    axes.set(xlabel="expert", title=f"expert load, last {len(recent)} batches (1 = uniform)")
    axes.set_yticks(range(len(names)), [name.removeprefix("moe/load/") for name in names])
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
