"""With ``document_masking``, a sample of several documents is those documents by themselves."""

import pytest
import torch
from torch import Tensor

from moefoundry.config import AttentionConfig, GqaConfig, MlaConfig, YarnConfig
from moefoundry.foundry import ComposerMoECausalLM, count_tokens, with_counts
from moefoundry.model.targets import shifted_targets
from moefoundry.model.transformer import MoETransformer
from tests.model.tiny import LINEAR, batch, gradients, tiny_config, tiny_model, use_attention

YARN = YarnConfig(factor=4.0, original_max_seq_len=8, beta_fast=4.0)
MLA = {"n_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 5}
KINDS = {
    "grouped_query": GqaConfig(n_heads=4, n_kv_heads=2),
    "window": GqaConfig(n_heads=4, n_kv_heads=2, sliding_window=3),
    "yarn": GqaConfig(n_heads=4, n_kv_heads=4, yarn=YARN),
    "sinks": GqaConfig(n_heads=4, n_kv_heads=2, sinks=True, sliding_window=3, sliding_window_layers=[1]),
    "ropes": GqaConfig(
        n_heads=4,
        n_kv_heads=2,
        yarn=YARN,
        sliding_window=3,
        sliding_window_layers=[0],
        sliding_window_rope_theta=50.0,
        unrotated_layers=[1],
    ),
    "latent": MlaConfig(**MLA, q_lora_rank=10),
    "latent_yarn": MlaConfig(**MLA, yarn=YARN),
    "linear": LINEAR,
}
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
LENGTHS = [[5, 1, 6, 4], [16], [2, 14]]  # of the documents of each row
IDS = batch(3, 16)
SEQUENCE_ID = torch.tensor([[i for i, length in enumerate(row) for _ in range(length)] for row in LENGTHS])

kinds = pytest.mark.parametrize("attention", KINDS.values(), ids=KINDS.keys())


def build(attention: AttentionConfig, dtype: torch.dtype = torch.float32, mode: str = "none") -> MoETransformer:
    cfg = tiny_config(backend="loop", aux_loss_weight=0.0, z_loss_weight=0.0)
    use_attention(cfg, attention)
    cfg.document_masking = True
    return tiny_model(cfg, dtype=dtype, activation_checkpointing=mode)


def documents() -> list[Tensor]:
    """[1, S] each, in the order of the rows."""
    return [document[None] for row, lengths in zip(IDS, LENGTHS, strict=True) for document in row.split(lengths)]


def one_document(ids: Tensor) -> Tensor:
    return torch.zeros_like(ids)


@kinds
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_logits_are_those_of_each_document_by_itself(
    attention: AttentionConfig, dtype: torch.dtype, tolerance: float
) -> None:
    model = build(attention, dtype)
    together = model(IDS, sequence_id=SEQUENCE_ID).flatten(0, 1)
    apart = torch.cat([model(ids, sequence_id=one_document(ids))[0] for ids in documents()])
    torch.testing.assert_close(together, apart, rtol=0, atol=tolerance)
    unmasked = model(IDS, sequence_id=one_document(IDS)).flatten(0, 1)
    assert (unmasked - together).abs().amax() > 1e-2


@kinds
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_summed_loss_and_gradients_are_those_of_each_document_by_itself(
    attention: AttentionConfig, dtype: torch.dtype, tolerance: float
) -> None:
    model = build(attention, dtype)
    losses = model(IDS, IDS, sequence_id=SEQUENCE_ID)
    assert losses.num_targets == sum(ids.numel() - 1 for ids in documents())
    (losses.lm * losses.num_targets).backward()
    together = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    total = torch.zeros((), dtype=dtype)
    for ids in documents():
        apart = model(ids, ids, sequence_id=one_document(ids))
        (apart.lm * apart.num_targets).backward()
        total += (apart.lm * apart.num_targets).detach()
    torch.testing.assert_close(losses.lm * losses.num_targets, total, rtol=tolerance, atol=0)
    for name, grad in gradients(model).items():
        scale = max(1.0, grad.abs().max().item())
        torch.testing.assert_close(
            together[name], grad, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("kind", ["window", "latent", "linear"])
def test_recomputed_activations_give_the_same_bits(kind: str, mode: str) -> None:
    outcomes = []
    for model in (build(KINDS[kind]), build(KINDS[kind], mode=mode)):
        loss = model(IDS, IDS, sequence_id=SEQUENCE_ID).total
        loss.backward()
        outcomes.append([loss, *gradients(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_targets_by_hand() -> None:
    labels, documents = torch.tensor([[10, 11, 12, -100, 14, 15]]), torch.tensor([[0, 0, 1, 1, 1, 2]])
    assert shifted_targets(labels).tolist() == [[11, 12, -100, 14, 15, -100]]
    assert shifted_targets(labels, documents).tolist() == [[11, -100, -100, 14, -100, -100]]
    assert shifted_targets(labels, documents, shift=2).tolist() == [[-100, -100, 14, -100, -100, -100]]
    assert shifted_targets(labels, shift=7).tolist() == [[-100] * 6]


def test_a_batch_without_documents_is_refused_in_training_and_for_losses() -> None:
    model = build(KINDS["grouped_query"])
    for labels, training in ((IDS, True), (None, True), (IDS, False)):
        with pytest.raises(ValueError, match=r"^model.document_masking is on: the model needs sequence_id"):
            model.train(training)(IDS, labels)


@kinds
def test_the_logits_of_ids_alone_are_those_of_a_document_a_row(attention: AttentionConfig) -> None:
    model = build(attention, torch.float64).eval()
    torch.testing.assert_close(model(IDS), model(IDS, sequence_id=one_document(IDS)), rtol=0, atol=1e-12)


def test_documents_do_nothing_where_masking_is_off() -> None:
    model = tiny_model(tiny_config())
    assert torch.equal(model(IDS, IDS, sequence_id=SEQUENCE_ID).lm, model(IDS, IDS).lm)


def test_composer_model_and_token_count_leave_the_borders_out() -> None:
    model = build(KINDS["grouped_query"])
    batch = {"input_ids": IDS, "labels": IDS, "sequence_id": SEQUENCE_ID}
    losses = ComposerMoECausalLM(model).eval_forward(batch)
    assert torch.equal(losses.lm, model(IDS, IDS, sequence_id=SEQUENCE_ID).lm)
    assert count_tokens(with_counts(batch)) == {"total": 48, "loss_generating": int(losses.num_targets)}
    assert losses.num_targets == 48 - 7  # the last of each document predicts nothing
