"""A whole run through moefoundry's own ``train``: data made by ``prepare``, BF16, a save, and a resume that repeats it.

whole    BATCHES batches, with a checkpoint in the middle
first    the same run, ended in the middle
second   goes on from there; its losses have to be those of ``whole``, bit for bit
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import Figures, NotRunError, Part
from benchmarks.gpu.gpu_tests import QUICKSTART
from benchmarks.gpu.steps import Options

BATCHES = 30
WORDS = [a + b + c for a in ("ka", "lo", "mi", "ne") for b in ("ra", "so", "tu") for c in ("n", "s", "", "x")]
SIZES = {
    False: ("model.d_model=512", "model.n_layers=6", "model.moe.expert_hidden_size=512", "global_train_batch_size=16"),
    True: ("model.d_model=32", "model.n_layers=2", "model.moe.expert_hidden_size=32", "global_train_batch_size=4"),
}
SETTINGS = (
    "model.vocab_size=1024",
    "model.ffn_hidden_size=512",
    "model.attention={n_heads: 4, n_kv_heads: 4}",
    "model.moe.num_experts=8",
    "scheduler={name: constant_with_warmup, t_warmup: 2ba}",
    "callbacks.report=null",
    "progress_bar=false",
    "eval_loader=null",
    "save_num_checkpoints_to_keep=-1",
)


def preload() -> None:
    """Import before the time counts; what cannot be imported is said when it is needed."""
    with contextlib.suppress(ImportError):
        import moefoundry.trainer  # noqa: F401


def run(figures: Figures, options: Options) -> None:
    """One part: its figures depend on each other."""
    figures.run("train and resume", measure, options)


def measure(part: Part, options: Options) -> None:
    """Train twice and compare."""
    try:
        import moefoundry.trainer  # noqa: F401
    except ImportError as error:
        raise NotRunError(f"moefoundry.trainer cannot be imported: {error}") from None
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        start = time.perf_counter()
        corpus = prepare(root, options)
        part.put(prepare_seconds=round(time.perf_counter() - start, 2))
        batches = 6 if options.tiny else BATCHES
        lines = {}
        for name, run_dir, end in (
            ("whole", root / "whole", batches),
            ("first", root / "halves", batches // 2),
            ("second", root / "halves", batches),
        ):
            start = time.perf_counter()
            lines[name] = train(run_dir, corpus, batches // 2, end, options)
            part.put(**{f"{name}_seconds": round(time.perf_counter() - start, 2)})
        part.put(**compare(lines["whole"], lines["second"], batches))
        part.put(**summary(lines["whole"], lines["second"], batches // 2))


def prepare(root: Path, options: Options) -> Path:
    """A corpus of generated text."""
    from moefoundry.data.options import PrepareOptions
    from moefoundry.data.prepare import prepare as prepare_corpus

    text, corpus = root / "text", root / "corpus"
    text.mkdir()
    draw = random.Random(0)
    for number in range(40):
        lines = (f"{draw.choice(WORDS)} {draw.choice(WORDS)} {draw.randrange(1000)}." for _ in range(1500))
        (text / f"{number}.txt").write_text("\n".join(lines))
    prepare_corpus(PrepareOptions(str(text), corpus, sequence(options), vocab_size=1024, val_fraction=0.2))
    return corpus


def sequence(options: Options) -> int:
    """Tokens of a sample."""
    return 64 if options.tiny else 512


def train(run_dir: Path, corpus: Path, save_at: int, end: int, options: Options) -> dict[int, dict[str, Any]]:
    """Train to batch ``end``, from the newest checkpoint if there is one; the metrics by batch."""
    from moefoundry.config import load_recipe
    from moefoundry.runs.metrics import read_metrics
    from moefoundry.trainer import train as train_recipe

    overrides = [
        *SETTINGS,
        *SIZES[options.tiny],
        f"run_name={run_dir.name}",
        f"run_dir={run_dir}",
        f"train_loader.dataset.local={corpus}",
        f"max_seq_len={sequence(options)}",
        f"max_duration={end}ba",
        f"save_interval={save_at}ba",
        "device_train_microbatch_size=4",
        "precision.compute=bf16",
        "autoresume=true",
    ]
    train_recipe(load_recipe(QUICKSTART, overrides))
    return {line["batch"]: line for line in read_metrics(run_dir)}


def compare(whole: dict[int, Any], second: dict[int, Any], batches: int) -> dict[str, Any]:
    """Whether the losses after the resume are those of the run that went through."""
    keys = ("loss/train/total", "loss/train/lm", "grad_norm")
    after = range(batches // 2 + 1, batches + 1)
    different = [batch for batch in after if any(whole[batch].get(key) != second[batch].get(key) for key in keys)]
    found: dict[str, Any] = {"compared_batches": len(after), "bit_equal": not different}
    return found | ({"wrong": f"losses differ from batch {different[0]} on"} if different else {})


def summary(whole: dict[int, Any], second: dict[int, Any], saved_at: int) -> dict[str, Any]:
    """Losses, speed, and what the save and the resume cost."""
    last = max(whole)
    rates = [line["throughput/tokens_per_sec"] for line in whole.values() if "throughput/tokens_per_sec" in line]
    resumed = second[saved_at + 1]
    return {
        "loss": {batch: whole[batch]["loss/train/total"] for batch in (1, saved_at, last)},
        "tokens_per_second": rates[-1] if rates else None,
        "stall_seconds": whole[saved_at].get("checkpoint/stall_seconds"),
        "resume_seconds": {key: value for key, value in resumed.items() if key.startswith("resume/")},
        "peak_device_gib": whole[last].get("memory/peak_device_gib"),
    }
