"""Memory and time of converting a model from and to a Hugging Face directory.

    python -m benchmarks.conversion [--gigabytes 2]

Writes a Mixtral, converts it with each command in a process of its own, and prints JSON: of each the seconds, and the
most anonymous memory above what the process had when it began, its libraries imported. Anonymous memory is what the
process needs for itself; pages of the mapped files can be dropped at any time. It is read from ``/proc`` (Linux) every
two milliseconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.out_of_core import row_ranges
from moefoundry.cli import main as cli
from moefoundry.config import GqaConfig, ModelConfig, MoEConfig
from moefoundry.conversion.families import FAMILIES
from moefoundry.conversion.safetensors_io import write_safetensors
from moefoundry.conversion.tensor_map import TensorMap

POLL_SECONDS = 0.002
SHARD_BYTES = 500 * 10**6


def model(nbytes: int) -> ModelConfig:
    """A Mixtral of about ``nbytes`` in BF16, with eight experts in each of twelve layers."""
    width = 64 * round((nbytes / (12 * 8 * 3 * 3.5 * 2)) ** 0.5 / 64)
    return ModelConfig(
        vocab_size=32_000,
        d_model=width,
        n_layers=12,
        n_dense_layers=0,
        attention=GqaConfig(n_heads=16, n_kv_heads=4),
        moe=MoEConfig(num_experts=8, top_k=2, expert_hidden_size=7 * width // 2, num_shared_experts=0),
    )


def write_model(directory: Path, cfg: ModelConfig) -> None:
    """Write the Hugging Face directory."""
    directory.mkdir()
    family = FAMILIES["mixtral"]
    (directory / "config.json").write_text(json.dumps(family.write_config(cfg, max_seq_len=4096)))
    shapes = TensorMap(family, cfg).their_shapes
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}
    write_safetensors(directory, specs, partial(_rows, specs), SHARD_BYTES)


def _rows(specs: dict[str, TensorSpec], name: str) -> Iterator[Tensor]:
    for start, stop in row_ranges(specs[name]):
        yield torch.full((stop - start, *specs[name].shape[1:]), 0.02, dtype=torch.bfloat16)


def measure(command: list[str]) -> dict[str, float]:
    """Run ``moefoundry convert`` with these arguments in this process.

    Raises:
        RuntimeError: It failed.
    """
    done = threading.Event()
    baseline, start = _anonymous_bytes(), time.perf_counter()
    with ThreadPoolExecutor(1) as watcher:
        peak = watcher.submit(_watch, done)
        try:
            with redirect_stdout(sys.stderr):
                status = cli.main(["convert", *command])
        finally:
            done.set()
    if status:
        raise RuntimeError(f"{command}: exit status {status}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "anonymous_mb": round((peak.result() - baseline) / 1e6, 1),
    }


def _watch(done: threading.Event) -> int:
    peak = 0
    while not done.wait(POLL_SECONDS):
        peak = max(peak, _anonymous_bytes())
    return peak


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def commands(root: Path) -> dict[str, list[str]]:
    """What is measured, in order: each reads what one before it has written."""
    texts = {
        "import": "import {0}/hf -o {0}/checkpoint",
        "import to fp32": "import {0}/hf -o {0}/checkpoint-fp32 --dtype fp32",
        "export": "export {0}/checkpoint -o {0}/back",
        "export to bf16": "export {0}/checkpoint-fp32 -o {0}/back-bf16 --dtype bf16",
        "consolidate": "consolidate {0}/checkpoint -o {0}/weights",
    }
    return {name: text.format(root).split() for name, text in texts.items()}


def run(nbytes: int) -> dict[str, object]:
    """Convert a model of about ``nbytes`` in each way."""
    with tempfile.TemporaryDirectory(prefix="conversion-") as scratch:
        write_model(Path(scratch) / "hf", model(nbytes))
        size = sum(file.stat().st_size for file in (Path(scratch) / "hf").iterdir())
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
            results = {name: processes.submit(measure, command) for name, command in commands(Path(scratch)).items()}
            measured = {name: result.result() for name, result in results.items()}
    return {"model_mb": round(size / 1e6), **measured}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of conversions.")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the model in BF16 (default 2)")
    print(json.dumps(run(int(parser.parse_args().gigabytes * 1e9)), indent=2))


if __name__ == "__main__":
    main()
