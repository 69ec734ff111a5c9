"""The same weights in transformers' Llama and Mixtral give the same logits, losses and gradients."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moefoundry.config import GqaConfig, ModelConfig
from moefoundry.model.transformer import MoETransformer
from tests.model.tiny import EXPERT_WIDTH, batch, tiny_config, tiny_model

DENSE = {"n_layers": 2, "n_dense_layers": 2}
SPARSE = {"n_layers": 2, "n_dense_layers": 0, "num_shared_experts": 0}
VARIANTS = {
    "grouped_query": {"n_kv_heads": 2},
    "multi_head": {"n_kv_heads": 4},
    "multi_query": {"n_kv_heads": 1},
    "wide_heads": {"n_heads": 2, "n_kv_heads": 1},
    "long_rope": {"rope_theta": 500_000.0},
    "tied": {"tie_embeddings": True},
}
TO_1E_5 = {"rtol": 0, "atol": 1e-5}

variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())


def transformers_model(cfg: ModelConfig) -> nn.Module:
    attention = cfg.attention
    assert isinstance(attention, GqaConfig)
    common = {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "rms_norm_eps": cfg.norm.eps,
        "rope_theta": attention.rope_theta,
        "tie_word_embeddings": cfg.tie_embeddings,
        "attn_implementation": "eager",
        "pad_token_id": None,
    }
    if cfg.n_dense_layers == cfg.n_layers:
        return LlamaForCausalLM(LlamaConfig(intermediate_size=cfg.ffn_hidden_size, **common))
    return MixtralForCausalLM(
        MixtralConfig(
            intermediate_size=cfg.moe.expert_hidden_size,
            num_local_experts=cfg.moe.num_experts,
            num_experts_per_tok=cfg.moe.top_k,
            sliding_window=None,
            **common,
        )
    )


def their_names(name: str) -> str:
    """Our parameter's name in transformers, ``{e}`` standing for the expert of a stacked weight."""
    for ours, theirs in (
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        (".attention.", ".self_attn."),
        (".ffn.router.gate.", ".block_sparse_moe.gate."),
        (".ffn.experts.gate_proj", ".block_sparse_moe.experts.{e}.w1.weight"),
        (".ffn.experts.up_proj", ".block_sparse_moe.experts.{e}.w3.weight"),
        (".ffn.experts.down_proj", ".block_sparse_moe.experts.{e}.w2.weight"),
        (".ffn.", ".mlp."),
    ):
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


def pairs(model: MoETransformer, theirs: nn.Module) -> list[tuple[str, nn.Parameter, list[nn.Parameter]]]:
    """(name, our parameter, theirs: one, or one for each expert)."""
    their_parameters = dict(theirs.named_parameters())
    matched = []
    for name, parameter in model.named_parameters():
        template = their_names(name)
        count = parameter.shape[0] if "{e}" in template else 1
        matched.append((name, parameter, [their_parameters.pop(template.format(e=e)) for e in range(count)]))
    assert not their_parameters
    return matched


def pair(**options: object) -> tuple[MoETransformer, nn.Module]:
    """Our model, and theirs with its weights."""
    cfg = tiny_config(**options)
    model, theirs = tiny_model(cfg), transformers_model(cfg)
    with torch.no_grad():
        for _, parameter, copies in pairs(model, theirs):
            for copy, value in zip(copies, parameter if len(copies) > 1 else [parameter], strict=True):
                copy.copy_(value)
    return model, theirs


def some_labels() -> Tensor:
    """Labels with ignored positions: at the start, in the middle, at the end, and most of one sequence."""
    labels = batch()
    labels[0, [0, 5, 6, -1]] = -100
    labels[1, 3:] = -100
    return labels


@variants
def test_dense_logits_equal_llama(variant: dict) -> None:
    model, llama = pair(**DENSE, **variant)
    torch.testing.assert_close(model(batch()), llama(batch()).logits, **TO_1E_5)


@variants
@pytest.mark.parametrize("backend", ["grouped_mm", "loop"])
def test_sparse_logits_equal_mixtral(backend: str, variant: dict) -> None:
    model, mixtral = pair(**SPARSE, backend=backend, **variant)
    torch.testing.assert_close(model(batch()), mixtral(batch()).logits, **TO_1E_5)


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_sparse_logits_equal_mixtral_for_any_top_k(top_k: int) -> None:
    model, mixtral = pair(**SPARSE, top_k=top_k)
    torch.testing.assert_close(model(batch()), mixtral(batch()).logits, **TO_1E_5)


@pytest.mark.parametrize("length", [1, 2, 100])
def test_logits_equal_at_other_lengths(length: int) -> None:
    model, llama = pair(**DENSE)
    ids = batch(1, length)
    torch.testing.assert_close(model(ids), llama(ids).logits, **TO_1E_5)


@pytest.mark.parametrize("sizes", [DENSE, SPARSE], ids=["llama", "mixtral"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("labels", [batch(), some_labels()], ids=["all_labels", "some_ignored"])
def test_loss_and_all_gradients_equal(sizes: dict, tied: bool, labels: Tensor) -> None:
    model, theirs = pair(**sizes, tie_embeddings=tied)
    losses, expected = model(batch(), labels), theirs(batch(), labels=labels).loss
    torch.testing.assert_close(losses.lm, expected, **TO_1E_5)
    assert losses.num_targets == (labels[:, 1:] != -100).sum()
    losses.lm.backward()
    expected.backward()
    for name, parameter, copies in pairs(model, theirs):
        grad = torch.stack([copy.grad for copy in copies]).view_as(parameter)
        torch.testing.assert_close(parameter.grad, grad, **TO_1E_5, msg=lambda text, name=name: f"{name}: {text}")


def test_total_equals_mixtral_with_its_own_auxiliary_loss() -> None:
    weight = 0.5
    one_layer = {**SPARSE, "n_layers": 1}  # with more, theirs mixes the layers before it multiplies
    # Theirs is a sum over the K choices, ours a mean.
    model, mixtral = pair(**one_layer, scope="micro_batch", aux_loss_weight=weight * 2, z_loss_weight=0.0)
    mixtral.router_aux_loss_coef = weight
    expected = mixtral(batch(), labels=batch(), output_router_logits=True).loss
    losses = model(batch(), batch())
    torch.testing.assert_close(losses.total, expected, **TO_1E_5)
    assert losses.balance > 0.5
    losses.total.backward()
    expected.backward()
    gate = mixtral.model.layers[0].block_sparse_moe.gate.weight
    torch.testing.assert_close(model.layers[0].ffn.router.gate.weight.grad, gate.grad, **TO_1E_5)


def test_expert_width_is_not_the_dense_width() -> None:
    """Guards the fixtures: were both widths equal, a mix-up of the two could not be seen."""
    assert tiny_config().ffn_hidden_size != EXPERT_WIDTH
