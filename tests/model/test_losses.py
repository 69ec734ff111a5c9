"""Further losses by name: against all logits at once, by autograd."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefoundry.config import LossConfig, LossesConfig, UserError, key
from moefoundry.config.parts import TABLES
from moefoundry.config.spec import with_parts
from moefoundry.model.losses import LogitsLoss, NamedLoss, build_losses, sums_over_targets
from moefoundry.model.transformer import MoETransformer
from moefoundry.ops.cross_entropy import IGNORE_INDEX
from moefoundry.registry import Part
from tests.model.tiny import batch, gradients, tiny_config, tiny_model

WEIGHTS = LossesConfig(logits_z=LossConfig(weight=0.3), router_entropy=LossConfig(weight=-0.2))


def expected_losses(model: MoETransformer, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses with all logits at once, and the routers' scores as they pass."""
    scores = []
    hooks = [
        block.ffn.router.register_forward_hook(lambda module, args, routing: scores.append(routing.scores))
        for block in model.layers
        if hasattr(block.ffn, "router")
    ]
    logits = model(ids)[:, :-1].flatten(0, 1)
    for hook in hooks:
        hook.remove()
    kept = labels[:, 1:].flatten() != IGNORE_INDEX
    z = logits.logsumexp(-1).square()[kept].mean()
    entropies = [torch.distributions.Categorical(probs=each).entropy().mean() for each in scores]
    return 0.3 * z, -0.2 * torch.stack(entropies).sum()


@pytest.mark.parametrize("chunk", [7, 1024])
def test_losses_and_gradients_are_those_of_all_logits_at_once(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("moefoundry.model.output_head.CHUNK_TOKENS", chunk)
    ids, labels = batch(), batch().clone()
    labels[0, 3:6] = IGNORE_INDEX
    model, plain = tiny_model(tiny_config()), tiny_model(tiny_config())
    model.use_losses(build_losses(WEIGHTS))
    losses, others = model(ids, labels), plain(ids, labels)
    z, entropy = expected_losses(plain, ids, labels)
    torch.testing.assert_close(losses.of_targets, {"logits_z": z.detach()})
    torch.testing.assert_close(losses.of_tokens, {"router_entropy": entropy.detach()})
    assert torch.equal(losses.lm, others.lm)
    torch.testing.assert_close(losses.total, others.total + z + entropy)
    losses.total.backward()
    (others.total + z + entropy).backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], gradient, rtol=1e-4, atol=1e-6)


def test_evaluation_has_no_further_losses() -> None:
    model = tiny_model(tiny_config()).eval()
    model.use_losses(build_losses(WEIGHTS))
    losses = model(batch(), batch())
    assert (losses.of_targets, losses.of_tokens) == ({}, {})


def test_ignored_targets_count_nothing_even_where_a_loss_is_infinite() -> None:
    """Values of ignored targets are left out of the sum."""
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = LogitsLoss(lambda logits, targets: logits[:, 0] * torch.tensor([2.0, torch.inf]))
    (total,) = sums_over_targets(
        [NamedLoss("one", 1.0, loss)], logits + torch.tensor([[1.0], [5.0]]), torch.tensor([0, IGNORE_INDEX])
    )
    assert total.item() == 2.0


def test_a_score_of_zero_has_a_finite_entropy_gradient() -> None:
    (named,) = build_losses(LossesConfig(router_entropy=LossConfig(weight=1.0)))
    scores = torch.tensor([[0.0, 1.0], [0.5, 0.5]], requires_grad=True)
    values = named.loss.values(scores, scores)
    torch.testing.assert_close(values.detach(), torch.tensor([0.0, 0.6931472]))
    values.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@dataclass
class SmoothedConfig(LossConfig):
    target: float = key(0.0, "Smooth towards this.")


def test_a_loss_of_ones_own_has_its_keys_and_a_free_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(cfg: SmoothedConfig) -> LogitsLoss:
        return LogitsLoss(lambda logits, targets: F.cross_entropy(logits, targets, reduction="none") - cfg.target)

    table = TABLES["losses"]
    part = Part(SmoothedConfig, build)
    monkeypatch.setattr(table, "listed", {**table.listed, "smooth": part, "lm": part})
    cfg = with_parts(LossesConfig, table, ["smooth"])(smooth=SmoothedConfig(weight=2.0, target=1.0))
    (named,) = build_losses(cfg)
    assert isinstance(named, NamedLoss)
    model = tiny_model(tiny_config())
    model.use_losses([named])
    losses = model(batch(), batch())
    torch.testing.assert_close(losses.of_targets["smooth"], 2 * (losses.lm - 1))
    model.use_losses([NamedLoss("mean", 1.0, LogitsLoss(lambda logits, targets: logits.mean()))])
    with pytest.raises(UserError, match=r"^losses\.mean: gives \[\] for \d+ rows, not one for each$"):
        model(batch(), batch())
    taken = with_parts(LossesConfig, table, ["lm"])(lm=SmoothedConfig(weight=1.0))
    with pytest.raises(UserError, match=r"^losses\.lm: every run has a loss of this name$"):
        build_losses(taken)
