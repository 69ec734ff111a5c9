"""DPO against its plain form: two sequences of each pair by themselves, all logits, autograd."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moefoundry.callbacks.preferences import PreferenceMonitor
from moefoundry.foundry import ComposerDPO, CountTargets, PreferenceAccuracy, with_counts
from moefoundry.model.preferences import dpo_losses, reward_margins
from moefoundry.model.transformer import MoETransformer
from tests.distributed import run_distributed
from tests.model.test_padding import assert_same, rows_of
from tests.model.tiny import batch, gradients, tiny_config, tiny_model

BETA = 0.3
PAIRS = [((3, 5), (3, 2)), ((1, 4), (1, 7)), ((6, 1), (6, 1)), ((2, 3), (2, 6))]
"""Tokens of prompt and response, chosen and rejected."""
REFERENCE = torch.tensor([[-20.0, -9.0], [-15.0, -30.0], [-4.0, -4.5], [-11.0, -22.0]])
Sequence = tuple[Tensor, int]


def sequences() -> list[tuple[Sequence, Sequence]]:
    """Tokens and length of the prompt, of both sides of each pair."""
    return [
        tuple((batch(1, sum(side), seed=10 * number + which)[0], side[0]) for which, side in enumerate(pair))
        for number, pair in enumerate(PAIRS)
    ]


def rows() -> dict[str, Any]:
    ids, labels, documents = [], [], []
    for pair in sequences():
        ids.append(torch.cat([tokens for tokens, _ in pair]))
        labels.append(torch.cat([tokens.masked_fill(torch.arange(len(tokens)) < n, -100) for tokens, n in pair]))
        documents.append(torch.cat([torch.full_like(tokens, side) for side, (tokens, _) in enumerate(pair)]))
    padded = {"input_ids": pad_sequence(ids, batch_first=True), "reference": REFERENCE}
    padded["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
    return with_counts(padded | {"sequence_id": pad_sequence(documents, batch_first=True, padding_value=-1)})


def build(aux_loss_weight: float = 0.0, **options: Any) -> MoETransformer:
    cfg = tiny_config(aux_loss_weight=aux_loss_weight, z_loss_weight=0.0, **options)
    cfg.document_masking = True
    return tiny_model(cfg)


def plain_log_prob(model: MoETransformer, tokens: Tensor, prompt: int) -> Tensor:
    logits_SV = model(tokens[None], sequence_id=torch.zeros_like(tokens)[None])[0]
    taken_S = F.log_softmax(logits_SV, dim=-1)[:-1].gather(1, tokens[1:, None])
    return taken_S[prompt - 1 :].sum()


def plain_loss(model: MoETransformer) -> Tensor:
    """DPO's equation 7, written out."""
    losses = []
    for pair, (of_chosen, of_rejected) in zip(sequences(), REFERENCE, strict=True):
        chosen, rejected = (plain_log_prob(model, *side) for side in pair)
        ratio = (chosen - of_chosen) - (rejected - of_rejected)
        losses.append(-torch.log(torch.sigmoid(BETA * ratio)))
    return torch.stack(losses).mean()


def step(model: ComposerDPO, whole: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Tensor]:
    CountTargets().batch_start(SimpleNamespace(batch=whole, model=model), None)
    total: dict[str, Any] = {}
    for part in parts:
        losses = model.loss(model(part), part)
        weight = len(part["input_ids"]) / len(whole["input_ids"])
        (losses["total"] * weight).backward()
        total = {name: total.get(name, 0) + value.detach() * weight for name, value in losses.items()}
    return total | gradients(model.model)


def test_loss_and_gradients_are_those_of_the_plain_form() -> None:
    plain = build()
    expected = plain_loss(plain)
    expected.backward()
    outcome = step(ComposerDPO(build(), BETA), rows(), [rows()])
    torch.testing.assert_close(outcome["dpo"], expected.detach(), rtol=1e-6, atol=0)
    assert outcome["total"] == outcome["dpo"]
    assert_same({name: outcome[name] for name in gradients(plain)}, gradients(plain), 2e-6)


def test_micro_batches_do_not_change_it() -> None:
    whole = step(ComposerDPO(build(0.1), BETA), rows(), [rows()])
    assert whole["total"] == whole["dpo"] + whole["balance"]
    parts = [rows_of(rows(), slice(0, 1)), rows_of(rows(), slice(1, 4))]
    assert_same(step(ComposerDPO(build(0.1), BETA), rows(), parts), whole)


def test_rewards_by_hand() -> None:
    log_probs, reference = torch.tensor([[-1.0, -5.0], [-3.0, -2.0]]), torch.tensor([[-2.0, -4.0], [-3.0, -2.5]])
    assert reward_margins(log_probs, reference, 0.5).tolist() == pytest.approx([1.0, -0.25])
    assert dpo_losses(log_probs, reference, 0.5).tolist() == pytest.approx([0.3132617, 0.8259394])
    assert dpo_losses(reference, reference, 0.5).tolist() == pytest.approx([0.6931472] * 2)


def test_accuracy_and_margin_of_a_step() -> None:
    model = ComposerDPO(build(), BETA)
    monitor, logged, margins = PreferenceMonitor(), {}, []
    for part in (rows_of(rows(), slice(0, 1)), rows_of(rows(), slice(1, 4))):
        outputs = model(part)
        monitor.after_loss(SimpleNamespace(outputs=outputs, batch=part, model=model), None)
        margins += model.margins(outputs, part).tolist()
    monitor.batch_end(None, SimpleNamespace(log_metrics=logged.update))
    right = sum(margin > 0 for margin in margins)
    assert logged == pytest.approx({"preference/margin": sum(margins) / 4, "preference/accuracy": right / 4})
    metric = PreferenceAccuracy()
    model.update_metric(rows(), model(rows()), metric)
    model.update_metric(rows() | {"num_targets": torch.zeros(4, dtype=torch.int64)}, model(rows()), metric)
    assert metric.compute() == right / 4


def on_two_ranks() -> dict[str, Tensor]:
    import torch.distributed as dist

    from moefoundry.config import ActivationCheckpointing, MeshConfig, PrecisionConfig
    from moefoundry.mesh import build_meshes, resolve_degrees
    from moefoundry.model.transformer import meta_model
    from moefoundry.parallel import materialize, parallelize
    from tests.test_parallel import full

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    cfg = tiny_config(aux_loss_weight=0.1)
    cfg.document_masking = True
    model = meta_model(cfg)
    meshes = build_meshes(resolve_degrees(MeshConfig(1, ranks, ranks), ranks), "cpu") if ranks > 1 else None
    parallelize(model, meshes, PrecisionConfig(), ActivationCheckpointing.full)
    materialize(model, "cpu", 3)
    size = len(PAIRS) // ranks
    first = (dist.get_rank() if ranks > 1 else 0) * size
    own = rows_of(rows(), slice(first, first + size))
    outcome = step(ComposerDPO(model, BETA), own, [own])
    losses = {name: value.clone() for name, value in outcome.items() if value.dim() == 0}
    for value in losses.values():
        if ranks > 1:
            dist.all_reduce(value)
        value /= ranks
    return losses | {name: full(grad) for name, grad in gradients(model).items()}


def test_two_ranks_are_one() -> None:
    expected = on_two_ranks()
    for outcome in run_distributed(on_two_ranks, 2):
        assert_same(outcome, expected)
