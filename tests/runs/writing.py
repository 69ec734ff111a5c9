"""Write the files of a run without training: quick, and of any state."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moefoundry.config import dump_recipe, load_recipe
from moefoundry.runs.history import FILE_NAME
from tests.conftest import TINY

START = {"event": "start", "at": "2031-01-31T12:00:00+00:00", "batch": 0, "from": "", "host": "h", "world_size": 2}
END = {"event": "end", "at": "2031-01-31T12:10:05+00:00", "batch": 20, "state": "finished", "reason": ""}


def line_of(batch: int) -> dict[str, Any]:
    """A line of metrics with everything that a report shows; held-out losses fall until batch 15, then rise."""
    load = [0.25 + 0.01 * math.sin(batch + expert) for expert in range(4)]
    line: dict[str, Any] = {
        "batch": batch,
        "data/wait_seconds": 0.01 / batch,
        "loss/train/total": 6.1 / math.sqrt(batch),
        "loss/train/lm": 6.0 / math.sqrt(batch),
        "loss/train/balance": 0.02,
        "loss/train/source/code": 5.0 / math.sqrt(batch),
        "loss/train/source/books": 7.0 / math.sqrt(batch),
        "grad_norm": 1.0 + 0.1 * (batch % 7),
        "lr": 0.01,
        "throughput/tokens_per_sec": 1000.0 + batch,
        "moe/max_violation": 0.5 / batch,
        "moe/router_entropy": 1.3,
        "moe/dropped_fraction": 0.0,
        "moe/load/layer1": [share / sum(load) for share in load],
        "moe/load/layer2": [0.7, 0.1, 0.1, 0.1],
        "memory/peak_host_gib": 1.5,
    }
    if batch % 5 == 0:
        line["metrics/eval/LanguageCrossEntropy"] = 3.0 + abs(batch - 15) / 10
        line["metrics/arithmetic/0-shot/accuracy"] = batch / 100
        line["checkpoint/stall_seconds"] = 0.5
    return line


def write_run(
    run_dir: Path, *changes: str, batches: int = 20, history: Sequence[dict[str, Any]] = (START, END)
) -> Path:
    """Write a run of a tiny recipe; ``changes`` are overrides."""
    run_dir.mkdir(parents=True)
    overrides = [*TINY, "train_loader.dataset.local=data/tiny", "max_duration=20ba", f"run_dir={run_dir}"]
    recipe = load_recipe(None, [*overrides, f"run_name={run_dir.name}", *changes])
    (run_dir / "config.yaml").write_text(dump_recipe(recipe))
    lines = [json.dumps(line_of(batch)) + "\n" for batch in range(1, batches + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))
    if history:
        (run_dir / FILE_NAME).write_text("".join(json.dumps(event) + "\n" for event in history))
    return run_dir
