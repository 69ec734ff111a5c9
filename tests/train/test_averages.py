"""Losses are means over the tokens of the global batch, whoever holds them, also where targets are uneven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moefoundry.config import Recipe
from moefoundry.moe.balance import StepCounts
from moefoundry.moe.router import Routing
from tests.train.runs import LOSSES, Run, run_recipe

Tiny = Callable[..., Recipe]
WHOLE = "device_train_microbatch_size=8"


FURTHER = ("loss/train/logits_z", "loss/train/router_entropy")


def assert_same_numbers(run: Run, expected: Run, *further: str) -> None:
    for key in (*LOSSES, *further, "grad_norm"):
        assert run.column(key) == pytest.approx(expected.column(key), rel=2e-6), key


@pytest.mark.slow
def test_documents_of_uneven_length_weigh_by_their_targets(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """Labels that cross from one document into the next are no targets, so sequences have unlike numbers of them."""
    losses = "losses={logits_z: {weight: 0.01}, router_entropy: {weight: -0.02}}"
    expected = run_recipe(tiny_recipe(tmp_path / "one", "model.document_masking=true", losses, WHOLE))
    split = [losses, "mesh.expert=2", "device_train_microbatch_size=1"]
    run = run_recipe(tiny_recipe(tmp_path / "two", "model.document_masking=true", *split), 2)
    assert_same_numbers(run, expected, *FURTHER)
    for number, total in run.column("loss/train/total").items():
        parts = [run.column(key)[number] for key in (*LOSSES[1:], *FURTHER)]
        assert total == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.slow
def test_balance_over_the_global_batch_is_exact_over_ranks(tiny_recipe: Tiny, tmp_path: Path) -> None:
    scope = "model.moe.balance.aux_loss_scope=global_batch"
    expected = run_recipe(tiny_recipe(tmp_path / "one", scope, WHOLE))
    assert_same_numbers(run_recipe(tiny_recipe(tmp_path / "two", scope, WHOLE, "mesh.expert=2"), 2), expected)
    own = run_recipe(tiny_recipe(tmp_path / "own", "model.moe.balance.aux_loss_scope=micro_batch", WHOLE), 2)
    assert own.column("loss/train/balance") != pytest.approx(expected.column("loss/train/balance"), rel=1e-4)


def test_balance_over_the_global_batch_sees_the_micro_batches_so_far(tiny_recipe: Tiny, tmp_path: Path) -> None:
    """The first step by hand: micro-batch i's loss is taken with the counts of micro-batches 1 to i."""
    from tests.distributed import run_distributed

    recipe = tiny_recipe(tmp_path / "run", "model.moe.balance.aux_loss_scope=global_batch", "model.moe.top_k=1")
    got, expected = run_distributed(running_losses, 1, recipe)[0]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def running_losses(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    from moefoundry.config import PrecisionConfig
    from moefoundry.model.transformer import MoETransformer
    from moefoundry.parallel import materialize, parallelize

    def model() -> MoETransformer:
        with torch.device("meta"):
            module = MoETransformer(recipe.model)
        parallelize(module, None, PrecisionConfig())
        materialize(module, "cpu", 0)
        return module

    batches = torch.randint(384, (3, 2, 64), generator=torch.Generator().manual_seed(0))
    trained, looked_at = model(), model()
    probs: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []

    def record(module: torch.nn.Module, args: tuple[torch.Tensor], routing: Routing) -> None:
        probs.append(routing.scores.mean(dim=0))
        counts.append(torch.bincount(routing.topk_expert_ids.flatten(), minlength=4))

    for block in looked_at.layers[1:]:
        block.ffn.router.register_forward_hook(record)
    got, expected = [], []
    for batch in batches:
        got.append(trained(batch, batch).balance)
        looked_at.eval()(batch, batch)
        load = [sum(counts[layer::2]).float() for layer in range(2)]
        loss = sum(4 * (c / c.sum() * p).sum() for c, p in zip(load, probs[-2:], strict=True))
        expected.append(loss * recipe.model.moe.balance.aux_loss_weight)
    return torch.stack(got), torch.stack(expected)


def test_counts_of_a_step_by_hand() -> None:
    counts = StepCounts(None)
    first, second = torch.tensor([[1, 2]]), torch.tensor([[3, 0]])
    assert counts.add(first).tolist() == [[1, 2]]
    assert counts.add(second).tolist() == [[4, 2]]
    assert first.tolist() == [[1, 2]]
    counts.begin_step()
    assert counts.add(second).tolist() == [[3, 0]]
