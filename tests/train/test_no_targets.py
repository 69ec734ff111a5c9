"""Batches without anything to predict: prompts that fill their rows, so that no response is left in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.cli.main import main
from moefoundry.config import Recipe
from moefoundry.data.options import Kind, PrepareOptions
from moefoundry.data.prepare import prepare
from tests.train.runs import run_recipe

Tiny = Callable[..., Recipe]


@pytest.fixture(scope="module")
def prompts(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with a prompt that fills several rows of 64 tokens, and a response in the last of them."""
    root = tmp_path_factory.mktemp("prompts")
    records = [{"prompt": "why " * 40, "response": f" as {number}"} for number in range(20)]
    (root / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer, kind = tiny_corpus / "tokenizer", Kind.instructions
    prepare(PrepareOptions(str(root / "in.jsonl"), root / "data", tokenizer=tokenizer, kind=kind, val_fraction=0.2))
    return root / "data"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_batch_without_targets_is_a_step(
    tiny_recipe: Tiny, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    """Its loss is 0, that of others is not. An evaluation without targets has no loss."""
    recipe = tiny_recipe(
        tmp_path / "run",
        f"train_loader.dataset.local={prompts}",
        f"tokenizer.name={prompts}/tokenizer",
        *("train_loader.dataset.packing.method=none", "eval_loader.dataset.packing.method=none"),
        *("model.mtp.depth=1", "max_duration=10ba", "eval_interval=5ba", "scheduler.t_warmup=1ba"),
        *("global_train_batch_size=2", "device_train_microbatch_size=1"),
        *("device_eval_batch_size=1", "eval_subset_num_batches=1"),
    )
    run = run_recipe(recipe, ranks)
    for key in ("loss/train/lm", "loss/train/mtp"):
        losses = list(run.column(key).values())
        assert losses.count(0.0) >= 2
        assert sum(loss > 0 for loss in losses) == 10 - losses.count(0.0) >= 2
    assert all(norm > 0 for norm in run.column("grad_norm").values()), "tokens are balanced all the same"
    assert not run.column("metrics/eval/LanguageCrossEntropy")
    if ranks == 1:
        assert main(["eval", str(run.run_dir), "--device", "cpu"]) == 2
        assert f"{prompts}/val: no target in rows of 64 tokens, so there is no loss: " in capsys.readouterr().err
