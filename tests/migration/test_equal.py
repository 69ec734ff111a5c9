"""Migrated values do what they did: against parts of Composer and LLM Foundry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moefoundry.config import load_recipe
from moefoundry.migration.lora import our_targets
from moefoundry.migration.migrate import migrate_recipe
from tests.distributed import run_distributed
from tests.llm_foundry import recipes
from tests.migration.recipes import axolotl, exact_mpt, hf_directory


def weights_after_steps(lr: float, there: float, here: float) -> list[Any]:
    """Weights after some steps of Composer's optimizer, of torch's with the migrated decay, and without one."""
    import torch
    from composer.optim import DecoupledAdamW
    from torch import nn

    results = []
    for cls, decay in ((DecoupledAdamW, there), (torch.optim.AdamW, here), (DecoupledAdamW, 0.0)):
        torch.manual_seed(0)
        layer = nn.Linear(8, 8, bias=False)
        optimizer = cls(layer.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for _ in range(10):
            layer(torch.randn(4, 8)).square().sum().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        results.append(layer.weight.detach())
    return results


@pytest.mark.slow
def test_the_decay_of_composers_optimizer(tmp_path: Path) -> None:
    lr, decay = 3e-2, 4e-3
    optimizer = {"name": "decoupled_adamw", "lr": lr, "weight_decay": decay}
    found = migrate_recipe(Path(recipes.write(tmp_path, recipes.recipe(exact_mpt(), optimizer=optimizer))))
    (tmp_path / "new.yaml").write_text(found.text)
    migrated: Any = load_recipe(tmp_path / "new.yaml").optimizer
    theirs, ours, plain = run_distributed(weights_after_steps, 1, lr, decay, migrated.weight_decay)[0]
    assert (theirs - ours).abs().max() < 1e-6
    assert (theirs - plain).abs().max() > 1e-3, "the decay is seen"


@pytest.mark.parametrize(
    ("names", "ours", "unknown"),
    [
        (["q_proj", "model.layers.0.self_attn.o_proj"], ["attention.q_proj", "attention.o_proj"], []),
        (["Wqkv", "gate"], ["attention.q_proj", "attention.k_proj", "attention.v_proj"], ["gate"]),
        (["w1", "w2", "w3"], ["experts.gate_proj", "experts.down_proj", "experts.up_proj"], []),
        (["lm_head"], [], ["lm_head"]),
    ],
)
def test_targets_of_lora(names: list[str], ours: list[str], unknown: list[str]) -> None:
    assert our_targets(names) == (ours, unknown)


def test_lora_of_axolotl(tmp_path: Path) -> None:
    keys = {
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "lora_target_modules": ["q_proj", "w1"],
    }
    tree = axolotl(hf_directory(tmp_path / "hf"), **keys)
    found = migrate_recipe(Path(recipes.write(tmp_path, tree)))
    (tmp_path / "new.yaml").write_text(found.text)
    lora = load_recipe(tmp_path / "new.yaml").lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 16.0, 0.1)
    assert lora.targets == ["attention.q_proj", "experts.gate_proj"]
