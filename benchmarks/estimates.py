"""Estimates beside published runs: how far ``moefoundry estimate`` is off, with its one set of constants.

    python -m benchmarks.estimates

prints the table of ``docs/plan.md``. The published systems share a model and devices with the recipe here, not its
code: some use pipelines where the recipe shards, most force an even gate. Meshes and micro-batches are ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from moefoundry.config import load_recipe
from moefoundry.planning import traffic
from moefoundry.planning.devices import ACCELERATORS, Accelerator
from moefoundry.planning.estimate import Estimate, estimate

RECIPES = Path(__file__).parents[1] / "configs" / "pretrain"
H800 = replace(ACCELERATORS["h100"], link_gb_per_s=200)
UNITS: dict[str, Callable[[Estimate], float]] = {
    "tokens/s": lambda found: found.tokens_per_second,
    "TFLOP/s": lambda found: found.tokens_per_second * found.flops_per_token / 1e12,
    "MFU": lambda found: found.mfu,
}
BF16 = ("precision={compute: bf16, fp8: {recipe: null}}", "activation_checkpointing=none")
ADAMW = "optimizer.name=adamw"
MIXTRAL_8X22B = (
    *("model.d_model=6144", "model.n_layers=56", "model.attention.n_heads=48", "model.attention.n_kv_heads=8"),
    *("model.moe.expert_hidden_size=16384", "model.vocab_size=32768", "activation_checkpointing=full"),
)
QWEN2_57B = (
    *("model.d_model=3584", "model.n_layers=28", "model.attention.n_heads=28", "model.attention.n_kv_heads=4"),
    *("model.attention.head_dim=128", "model.moe.num_experts=64", "model.moe.expert_hidden_size=2560"),
    "model.moe.num_shared_experts=8",
)


@dataclass(frozen=True)
class Run:
    """A published run, and a recipe for it.

    Attributes:
        name: Model, devices, system.
        recipe: Name of a file of ``configs/pretrain``.
        overrides: What the model or its training has otherwise.
        mesh: Replicate, shard, expert.
        batch: Sequences of a step, and of a micro-batch of a device.
        device: The accelerator.
        published: The figure, of one device.
        unit: Its unit.
        source: Where it was published.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    mesh: tuple[int, int, int]
    batch: tuple[int, int]
    device: Accelerator
    published: float
    unit: str
    source: str


H100, B200, GB200 = (ACCELERATORS[name] for name in ("h100", "b200", "gb200"))
FULL = ("precision={compute: bf16, fp8: {recipe: null}}",)
AUTOMODEL, MEGATRON = "AutoModel performance summary", "Megatron-Core, arXiv 2504.14960"
QWEN3, MOONLIGHT, DEEPSEEK = "qwen3-30b-a3b", "moonlight-16b-a3b", "deepseek-v3-671b"
OSS, KIMI = "gpt-oss-20b", "kimi-k2-1026b"
MIXTRAL, QWEN2 = BF16 + MIXTRAL_8X22B, BF16 + QWEN2_57B
V3_2048 = "DeepSeek-V3, 2048 H800, FP8"
RUNS = (
    Run("Qwen3-30B-A3B, 8 H100", QWEN3, BF16, (1, 8, 8), (256, 4), H100, 12040, "tokens/s", AUTOMODEL),
    Run("GPT-OSS-20B, 8 H100", OSS, BF16, (1, 8, 8), (256, 4), H100, 279, "TFLOP/s", AUTOMODEL),
    Run("DeepSeek-V3, 256 H100", DEEPSEEK, FULL, (1, 256, 64), (2048, 2), H100, 250, "TFLOP/s", AUTOMODEL),
    Run(
        "Kimi K2, 256 H100",
        KIMI,
        (*FULL, ADAMW),
        (1, 256, 64),
        (2048, 2),
        H100,
        189,
        "TFLOP/s",
        AUTOMODEL,
    ),
    Run(
        "OLMoE-1B-7B, 256 H100", "olmoe-1b-7b", BF16, (32, 8, 1), (1024, 4), H100, 23600, "tokens/s", "arXiv 2409.02060"
    ),
    Run(
        "DeepSeek-V3-16B, 8 H100",
        MOONLIGHT,
        ("precision={compute: bf16, fp8: {recipe: null}}", "activation_checkpointing=full", ADAMW),
        (1, 8, 8),
        (32, 4),
        H100,
        11500,
        "tokens/s",
        "torchtitan issue 1789",
    ),
    Run(
        "Mixtral 8x22B, 128 H100",
        "mixtral-8x7b",
        MIXTRAL,
        (1, 128, 8),
        (1024, 4),
        H100,
        0.493,
        "MFU",
        MEGATRON,
    ),
    Run("Qwen2-57B-A14B, 64 H100", QWEN3, QWEN2, (1, 64, 4), (256, 4), H100, 0.390, "MFU", MEGATRON),
    Run(
        "DeepSeek-V3, 2048 H800, FP8",
        DEEPSEEK,
        (),
        (8, 256, 64),
        (14336, 7),
        H800,
        1543,
        "tokens/s",
        "arXiv 2412.19437",
    ),
    Run(
        "DeepSeek-V3, 256 B200",
        DEEPSEEK,
        FULL,
        (1, 256, 32),
        (2048, 4),
        B200,
        859,
        "tokens/s",
        "PyTorch blog",
    ),
    Run(
        "DeepSeek-V3, 256 GB200, FP8",
        DEEPSEEK,
        (),
        (1, 256, 64),
        (2048, 2),
        GB200,
        4912,
        "tokens/s",
        "Megatron-Bridge performance summary 26.08",
    ),
)


def estimated(run: Run) -> float:
    """Estimate a run's figure."""
    replicate, shard, expert = run.mesh
    batch, micro_batch = run.batch
    overrides = [
        *("max_seq_len=4096", *run.overrides, f"mesh={{replicate: {replicate}, shard: {shard}, expert: {expert}}}"),
        *(f"global_train_batch_size={batch}", f"device_train_microbatch_size={micro_batch}"),
    ]
    ranks = replicate * shard
    recipe = load_recipe(str(RECIPES / f"{run.recipe}.yaml"), overrides, world_size=ranks)
    # others send back what they recompute
    with patch.object(traffic, "block_ends_with_experts", lambda _: False):
        return UNITS[run.unit](estimate(recipe, ranks, run.device))


def ratios() -> Iterator[tuple[Run, float, float]]:
    """Yield each run, its estimate, and what share of the published figure that is."""
    for run in RUNS:
        found = estimated(run)
        yield run, found, found / run.published


def main() -> None:
    print("| run | unit | published | estimate | estimate / published | source |\n|---|---|---|---|---|---|")
    off: list[float] = []
    factors: list[float] = []
    for run, found, ratio in ratios():
        digits = 3 if run.unit == "MFU" else 0
        off.append(abs(ratio - 1))
        factors.append(max(ratio, 1 / ratio))
        figures = f"{run.published:,.{digits}f} | {found:,.{digits}f} | {ratio:.2f}"
        print(f"| {run.name} | {run.unit} | {figures} | {run.source} |")
    print(f"\nMedian error {statistics.median(off):.0%}, largest factor {max(factors):.2f}.")


if __name__ == "__main__":
    main()
