"""Runs from end to end: what they compute, on every split of the work, and what they write."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moefoundry.config import Recipe
from tests.train.runs import LOSSES, Run, run_recipe

Tiny = Callable[..., Recipe]
EVAL = "metrics/eval/LanguageCrossEntropy"
STALL = "checkpoint/stall_seconds"
EVERY_BATCH = {
    *LOSSES,
    "batch",
    "grad_norm",
    "lr",
    "moe/max_violation",
    "moe/router_entropy",
    "moe/dropped_fraction",
    "moe/load/layer1",
    "moe/load/layer2",
    "memory/peak_host_gib",
    "data/wait_seconds",
}
FROM_THE_SECOND_BATCH = {"throughput/tokens_per_sec", "throughput/device/tokens_per_sec"}


@pytest.fixture(scope="module")
def run(tiny_recipe: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eight batches on two ranks; evaluation and checkpoints at intervals that the end meets, and does not."""
    changes = ["max_duration=8ba", "eval_interval=3ba", "save_interval=2ba", "save_num_checkpoints_to_keep=2"]
    return run_recipe(tiny_recipe(tmp_path_factory.mktemp("run"), *changes, "console_log_interval=3ba"), 2)


def test_every_batch_has_a_line_with_every_metric(run: Run) -> None:
    assert [line["batch"] for line in run.metrics] == list(range(1, 9))
    for line in run.metrics:
        batch = line["batch"]
        expected = EVERY_BATCH | (FROM_THE_SECOND_BATCH if batch > 1 else set())
        expected |= {EVAL} if batch in (3, 6, 8) else set()
        expected |= {STALL} if batch % 2 == 0 else set()
        assert line.keys() == expected, f"batch {batch}"


def test_metrics_hold_together(run: Run) -> None:
    for line in run.metrics:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        total, *parts = (line[name] for name in LOSSES)
        assert total == pytest.approx(sum(parts), rel=1e-6)
        assert line["grad_norm"] > 0
        assert line["moe/dropped_fraction"] == 0
        assert 0 < line["moe/router_entropy"] <= math.log(4) + 1e-6
        loads = [line[f"moe/load/layer{layer}"] for layer in (1, 2)]
        assert all(len(load) == 4 and sum(load) == pytest.approx(1) for load in loads)
        violation = sum(4 * max(load) - 1 for load in loads) / 2
        assert line["moe/max_violation"] == pytest.approx(violation)
    assert run.metrics[0]["loss/train/lm"] == pytest.approx(math.log(384), rel=0.02)


def test_the_newest_checkpoints_are_kept(run: Run) -> None:
    assert run.checkpoints() == ["ba6", "ba8"]


def test_console_lines_are_for_people(run: Run) -> None:
    lines = [line for line in run.err.splitlines() if line.startswith("batch ")]
    assert any("parameters" in line and "active; " in line for line in run.err.splitlines())
    shown = {line["batch"]: line for line in run.metrics}
    expected = []
    for batch in (1, 3, 6, 8):
        expected.append(f"batch {batch}/8  loss {shown[batch]['loss/train/lm']:.4f}  balance ")
        if EVAL in shown[batch]:
            expected.append(f"batch {batch}: held-out loss {shown[batch][EVAL]:.4f} nats/token")
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
    for word in ("z ", "grad norm ", "lr ", "tokens/s ", "max violation "):
        assert f"  {word}" in lines[1]
    assert "\r" not in run.err, "no progress bar where there is no terminal"
    assert run.out == ""
    assert "Warning" not in run.err


def test_loss_falls(tiny_recipe: Tiny, tmp_path: Path) -> None:
    run = run_recipe(tiny_recipe(tmp_path, "max_duration=30ba", "eval_interval=30ba"))
    losses = run.column("loss/train/lm")
    assert losses[30] < losses[1] - 1.5
    assert run.column(EVAL)[30] < losses[1] - 1.5, "held-out text too"


def values(run: Run) -> dict[str, list[float]]:
    """Everything that must not depend on how the work is split."""
    names = [*LOSSES, "grad_norm", "lr", "moe/max_violation", "moe/router_entropy", EVAL]
    series = {name: list(run.column(name).values()) for name in names}
    for layer in (1, 2):
        series[f"load{layer}"] = [share for load in run.column(f"moe/load/layer{layer}").values() for share in load]
    return series


def test_values_do_not_depend_on_ranks_and_micro_batches(tiny_recipe: Tiny, tmp_path: Path) -> None:
    def train(world_size: int, micro_batch: int, *changes: str) -> dict[str, list[float]]:
        run_dir = Path(tempfile.mkdtemp(dir=tmp_path))
        changes = (*changes, f"device_train_microbatch_size={micro_batch}", f"device_eval_batch_size={micro_batch}")
        return values(run_recipe(tiny_recipe(run_dir, "max_duration=3ba", "eval_interval=2ba", *changes), world_size))

    expected = train(1, 8)
    assert len(expected[EVAL]) == 2
    runs = {
        "micro 1": train(1, 1),
        "micro 3, which leaves a smaller one": train(1, 3),
        "2 ranks that share the experts": train(2, 1, "mesh={replicate: 1, shard: 2, expert: 2}"),
        "2 replicas, checkpointing": train(2, 2, "mesh={replicate: 2, shard: 1}", "activation_checkpointing=full"),
    }
    for label, series in runs.items():
        for name, column in series.items():
            assert column == pytest.approx(expected[name], rel=2e-5), f"{label}: {name}"


def ignore_many_labels() -> None:
    """Samples differ in how many of their targets count: from nearly none to all."""
    from moefoundry.data.token_dataset import TokenDataset

    get_item = TokenDataset.get_item

    def with_ignored(self: TokenDataset, sample_id: int, retry: int = 7) -> dict[str, Any]:
        sample = get_item(self, sample_id, retry)
        sample["labels"][: sample_id * 7 % 63] = -100
        return sample

    TokenDataset.get_item = with_ignored  # type: ignore[method-assign]


@pytest.mark.slow
def test_each_target_counts_once_however_unevenly_they_lie(tiny_recipe: Tiny, tmp_path: Path) -> None:
    def train(world_size: int, micro_batch: int) -> dict[str, list[float]]:
        changes = ["model.moe.balance={aux_loss_weight: 0.0, z_loss_weight: 0.0}", "eval_interval=2ba"]
        changes += [f"device_train_microbatch_size={micro_batch}", f"device_eval_batch_size={micro_batch}"]
        recipe = tiny_recipe(tmp_path / f"{world_size}-{micro_batch}", *changes)
        return values(run_recipe(recipe, world_size, ignore_many_labels))

    expected = train(1, 8)
    for world_size, micro_batch in ((1, 2), (2, 1)):
        for name, column in train(world_size, micro_batch).items():
            assert column == pytest.approx(expected[name], rel=2e-5), f"{world_size} ranks, micro {micro_batch}: {name}"


@pytest.mark.slow
def test_narrow_compute_trains_close_to_fp32(tiny_recipe: Tiny, tmp_path: Path) -> None:
    def train(name: str, world_size: int, compute: str) -> dict[int, float]:
        recipe = tiny_recipe(tmp_path / name, f"precision.compute={compute}", "max_duration=8ba")
        return run_recipe(recipe, world_size).column("loss/train/lm")

    exact = train("fp32", 1, "fp32")
    narrow = {
        "bf16": train("bf16", 1, "bf16"),
        "bf16 on 2 ranks": train("bf16-2", 2, "bf16"),
        "emulated": train("emulated", 1, "bf16_emulated"),
    }
    for name, losses in narrow.items():
        assert losses != exact, name
        assert list(losses.values()) == pytest.approx(list(exact.values()), rel=0.02), name
        assert losses[8] < losses[1] - 0.3, name


def stored_dtypes(run_dir: Path) -> set[str]:
    from moefoundry.checkpoint.format import read_metadata

    entries = read_metadata(run_dir / "checkpoints" / "ba2").state_dict_metadata
    return {str(entry.properties.dtype) for name, entry in entries.items() if not name.startswith("rng/")}


@pytest.mark.parametrize("compute", ["bf16", "bf16_emulated"])
def test_master_weights_and_moments_are_fp32(tiny_recipe: Tiny, tmp_path: Path, compute: str) -> None:
    from tests.distributed import run_distributed

    run_recipe(tiny_recipe(tmp_path, f"precision.compute={compute}", "max_duration=2ba"))
    assert run_distributed(stored_dtypes, 1, tmp_path) == [{"torch.float32"}]


def test_intervals_in_epochs_and_tokens(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """An epoch has 6 batches of 512 tokens."""
    changes = ["max_duration=2ep", "eval_interval=1ep", "save_interval=3072tok", "save_num_checkpoints_to_keep=-1"]
    run = run_recipe(tiny_recipe(tmp_path, *changes, "console_log_interval=1ep", "scheduler.t_warmup=0.1dur"))
    assert len(run.metrics) == 12
    assert list(run.column(EVAL)) == [6, 12]
    assert run.checkpoints() == ["ba12", "ba6"]
