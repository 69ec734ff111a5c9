"""What a finished run shows: two plots, a completion, where the checkpoint is and how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.utils import dist
from tokenizers import Tokenizer

from moefoundry.callbacks.metrics_file import read_metrics
from moefoundry.checkpoint.run_dir import store_of
from moefoundry.config import Recipe, ReportConfig
from moefoundry.data.summary import CORPUS_FILE, read_corpus_summary
from moefoundry.evaluation.generation import greedy

LOSS_PLOT = "loss.png"
LOAD_PLOT = "expert_load.png"
LOAD_WINDOW = 20  # batches that the load plot averages
EVAL_KEY = "metrics/eval/LanguageCrossEntropy"


def write_report(state: State, recipe: Recipe, command: Sequence[str]) -> None:
    """Write the plots into ``run_dir`` and print the rest, after training; every rank calls it.

    Args:
        state: The trainer's, after the last evaluation and the last checkpoint.
        recipe: The run's recipe; its ``callbacks.report`` must be set.
        command: The command that started the run, to be repeated for the next.
    """
    assert recipe.callbacks.report is not None, "the caller checks"
    prompt, completion = recipe.callbacks.report.prompt, complete(state, recipe, recipe.callbacks.report)
    if dist.get_global_rank() != 0:
        return
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
        lines.append(f"unigram entropy  {entropy:.4f} nats/token; the model is {entropy - losses[-1]:.4f} better")
    lines += [
        "completion",
        *("    | " + line for line in (prompt + completion).splitlines()),
        f"loss curve       {run_dir / LOSS_PLOT}",
        f"expert load      {run_dir / LOAD_PLOT}",
        f"checkpoint       {store_of(run_dir).latest()}",
        f"go on with       {next_command(command, recipe.max_duration)}",
    ]
    print("\n".join(lines), flush=True)


def complete(state: State, recipe: Recipe, cfg: ReportConfig) -> str:
    """The model's continuation of the prompt. Every rank takes part: a sharded model runs on all or on none."""
    tokenizer = Tokenizer.from_file(str(Path(recipe.tokenizer.name) / "tokenizer.json"))
    prompt_ids = torch.tensor(tokenizer.encode(cfg.prompt).ids, device=next(state.model.parameters()).device)
    state.model.eval()
    return tokenizer.decode(greedy(state.model.model, prompt_ids, cfg.max_new_tokens).tolist())


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
