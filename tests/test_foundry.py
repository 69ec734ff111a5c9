"""The model as Composer and LLM Foundry see it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moefoundry.config import ConfigError, load_model
from moefoundry.foundry import (
    ComposerMoECausalLM,
    CountTargets,
    FoundryMoECausalLM,
    LanguageCrossEntropy,
    PreferenceAccuracy,
    SourceCrossEntropy,
    count_tokens,
    with_counts,
)
from moefoundry.model.losses import LogitsLoss, NamedLoss
from moefoundry.model.transformer import meta_model
from moefoundry.parallel import materialize

TINY = {
    "vocab_size": 64,
    "d_model": 32,
    "n_layers": 2,
    "ffn_hidden_size": 64,
    "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "rope_theta": 10000.0},
    "moe": {"num_experts": 4, "top_k": 2, "expert_hidden_size": 32},
}


def batch(sequences: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (sequences, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_named_losses_sum_to_the_total() -> None:
    model = FoundryMoECausalLM(**TINY)
    losses = model.loss(model(batch()), batch())
    assert set(losses) == {"total", "lm", "balance", "z"}
    torch.testing.assert_close(losses["total"], losses["lm"] + losses["balance"] + losses["z"])
    assert losses["balance"] > 0
    assert losses["z"] > 0


def test_cross_entropy_metric_weighs_batches_by_their_targets() -> None:
    metric = LanguageCrossEntropy()
    metric.update(torch.tensor(2.0), torch.tensor(30))
    metric.update(torch.tensor(5.0), torch.tensor(10))
    assert metric.compute().item() == pytest.approx((2 * 30 + 5 * 10) / 40)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_what_has_measured_nothing_says_so() -> None:
    """Composer's trainer leaves such metrics out, see ``composer_patches.py``; they would be NaN."""
    for metric in (LanguageCrossEntropy(), SourceCrossEntropy(0), PreferenceAccuracy()):
        metric.compute()
        assert not metric.measured
    metric = LanguageCrossEntropy()
    metric.update(torch.tensor(2.0), torch.tensor(3))
    metric.compute()
    assert metric.measured


def test_a_global_batch_without_targets_has_losses_and_gradients_of_zero() -> None:
    """As where every row holds a prompt alone; prediction modules and losses of logits among them."""
    cfg = load_model(TINY | {"mtp": {"depth": 1, "loss_weight": 0.3}})
    cfg.moe.balance.aux_loss_weight = cfg.moe.balance.z_loss_weight = 0.0
    transformer = meta_model(cfg)
    materialize(transformer, "cpu", 1)
    transformer.use_losses([NamedLoss("squares", 0.5, LogitsLoss(lambda logits, targets: logits.square().sum(-1)))])
    model = ComposerMoECausalLM(transformer)
    empty = with_counts(batch() | {"labels": torch.full((2, 16), -100)})
    CountTargets().batch_start(SimpleNamespace(batch=empty, model=model), None)
    losses = model.loss(model(empty), empty)
    losses["total"].backward()
    assert {name: loss.item() for name, loss in losses.items()} == dict.fromkeys(losses, 0.0)
    assert {"lm", "mtp", "squares"} <= losses.keys()
    gradients = {name: p.grad for name, p in transformer.named_parameters() if p.grad is not None}
    assert gradients
    assert not [name for name, gradient in gradients.items() if gradient.count_nonzero()]


def test_what_a_batch_on_the_host_has_is_counted_for_the_models_device() -> None:
    """Composer moves micro-batches to a GPU, not the batch that a step begins with; NCCL takes no tensor of a CPU."""
    model = ComposerMoECausalLM(meta_model(load_model(TINY)))
    whole = with_counts(batch() | {"sequence_id": torch.zeros(2, 16, dtype=torch.int64)})
    CountTargets().batch_start(SimpleNamespace(batch=whole, model=model), None)
    assert model.targets_per_sample.device.type == model.model.tokens_per_sample.device.type == "meta"


def test_tokens_that_are_predicted_leave_out_the_first_and_the_ignored() -> None:
    labels = torch.tensor([[1, 2, -100, 4], [5, -100, -100, 8]])
    counts = count_tokens(with_counts({"input_ids": torch.zeros(2, 4, dtype=torch.int64), "labels": labels}))
    assert counts == {"total": 8, "loss_generating": 3}


def test_a_bad_model_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.moe\.top_kk.*top_k"):
        FoundryMoECausalLM(**TINY | {"moe": {"num_experts": 4, "expert_hidden_size": 32, "top_kk": 2}})


@pytest.mark.parametrize(("key", "value"), [("bias_update_rate", 0.001), ("aux_loss_scope", "global_batch")])
def test_what_only_our_trainer_does_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"model\.moe\.balance\.{key}.*needs moefoundry's own trainer"):
        FoundryMoECausalLM(**TINY | {"moe": TINY["moe"] | {"balance": {key: value}}})


@pytest.mark.slow
def test_llm_foundry_builds_the_model_by_its_registered_name() -> None:
    from llmfoundry.utils.builders import build_composer_model

    model = build_composer_model("moe_causal_lm", TINY, tokenizer=None)
    expected = FoundryMoECausalLM(**TINY)
    torch.testing.assert_close(model(batch()).lm, expected(batch()).lm, rtol=0, atol=0)
