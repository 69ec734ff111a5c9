"""Grouped-query attention: transformers' own layers and models give the same outputs and gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import OlmoeConfig, Qwen3Config
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from moefoundry.config import AttentionBias, GqaConfig, ModelConfig, QkNorm, YarnConfig
from moefoundry.model.context import attention_context, positions_in_documents
from tests.model.peers import (
    LLAMA_NAMES,
    MIXTRAL_NAMES,
    TO_1E_5,
    assert_same_gradients,
    assert_same_model,
    causal_bias,
    give_weights,
    llama,
    mixtral,
)
from tests.model.tiny import batch, meta_model, tiny_config, tiny_model

LENGTH = 12


def model_config(**attention: object) -> ModelConfig:
    cfg = tiny_config(n_layers=1)
    cfg.attention = GqaConfig(n_heads=4, **{"n_kv_heads": 4} | attention)
    return cfg


def hidden(width: int = 32) -> Tensor:
    return torch.randn(2, LENGTH, width, generator=torch.Generator().manual_seed(1)).requires_grad_()


def compare(cfg: ModelConfig, theirs: nn.Module, rope: nn.Module) -> Tensor:
    """Outputs, gradients of the input and of every weight; returns our output."""
    ours = tiny_model(cfg).layers[0].attention
    for bias in (p for name, p in ours.named_parameters() if name.endswith(".bias")):
        nn.init.normal_(bias, generator=torch.Generator().manual_seed(2))
    give_weights(ours, theirs, ())
    x, their_x = hidden(), hidden()
    out = ours(x, attention_context(cfg, torch.zeros(2, LENGTH, dtype=torch.int64)))
    rotation = rope(their_x, torch.arange(LENGTH)[None])
    expected = theirs(their_x, attention_mask=causal_bias(LENGTH), position_embeddings=rotation)[0]
    torch.testing.assert_close(out, expected, **TO_1E_5)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(x.grad, their_x.grad, **TO_1E_5)
    assert_same_gradients(ours, theirs, ())
    return out.detach()


@pytest.mark.parametrize("head_dim", [None, 6, 16])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_head_norm_and_head_width_equal_qwen3(n_kv_heads: int, head_dim: int | None) -> None:
    cfg = model_config(n_kv_heads=n_kv_heads, head_dim=head_dim, qk_norm=QkNorm.head)
    config = Qwen3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim or 8,
        rms_norm_eps=cfg.norm.eps,
        attn_implementation="eager",
    )
    compare(cfg, Qwen3Attention(config, 0), Qwen3RotaryEmbedding(config))


def test_biases_of_all_projections_equal_qwen3() -> None:
    cfg = model_config(n_kv_heads=2, qk_norm=QkNorm.head, bias=AttentionBias.all)
    config = Qwen3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
        rms_norm_eps=cfg.norm.eps,
        attn_implementation="eager",
    )
    compare(cfg, Qwen3Attention(config, 0), Qwen3RotaryEmbedding(config))


@pytest.mark.parametrize("clip_qkv", [None, 0.5])
@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_full_norm_and_clip_equal_olmoe(n_kv_heads: int, clip_qkv: float | None) -> None:
    cfg = model_config(n_kv_heads=n_kv_heads, qk_norm=QkNorm.full, clip_qkv=clip_qkv)
    config = OlmoeConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        rms_norm_eps=cfg.norm.eps,
        clip_qkv=clip_qkv,
        attn_implementation="eager",
    )
    out = compare(cfg, OlmoeAttention(config, 0), OlmoeRotaryEmbedding(config))
    if clip_qkv is not None:
        cfg.attention.clip_qkv = None
        context = attention_context(cfg, torch.zeros(2, LENGTH, dtype=torch.int64))
        assert not torch.allclose(tiny_model(cfg).layers[0].attention(hidden(), context), out, atol=1e-2)


def test_without_a_norm_the_projections_are_clamped() -> None:
    """As DBRX: of a single position, attention gives the clamped value."""
    cfg = model_config(n_kv_heads=4, clip_qkv=0.25)
    attention = tiny_model(cfg).layers[0].attention
    x = hidden()[:, :1]
    value = attention.v_proj(x).clamp(-0.25, 0.25)
    assert (value.abs() == 0.25).any()
    out = attention(x, attention_context(cfg, torch.zeros(2, 1, dtype=torch.int64)))
    torch.testing.assert_close(out, attention.o_proj(value))


def test_qkv_bias_leaves_the_output_projection_without() -> None:
    names = [name for name, _ in meta_model(model_config(bias=AttentionBias.qkv)).named_parameters()]
    assert [name.split(".")[-2] for name in names if name.endswith(".bias")] == ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize("window", [1, 3, 15, 16, 99])
def test_sliding_window_equals_mixtral(window: int) -> None:
    model, theirs = mixtral(GqaConfig(n_heads=4, n_kv_heads=2, sliding_window=window))
    assert_same_model(model, theirs, batch(), MIXTRAL_NAMES)


YARN = YarnConfig(factor=4.0, original_max_seq_len=16, beta_fast=4.0, beta_slow=1.0)


@pytest.mark.parametrize("mscale", [(None, None), (1.0, 0.707), (None, 1.0)])
def test_yarn_equals_llama(mscale: tuple[float | None, float | None]) -> None:
    yarn = replace(YARN, mscale=mscale[0], mscale_all_dim=mscale[1])
    model, theirs = llama(GqaConfig(n_heads=2, n_kv_heads=1, rope_theta=100.0, yarn=yarn))
    assert_same_model(model, theirs, batch(2, 40), LLAMA_NAMES)


def test_positions_begin_anew_with_each_document() -> None:
    ids = torch.tensor([[0, 0, 0, 1, 1, 3], [4, 5, 5, 5, 5, 6]])
    assert positions_in_documents(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]]


def test_mask_by_hand() -> None:
    cfg, ids = model_config(sliding_window=2), torch.zeros(1, 4, dtype=torch.int64)
    yes, no = True, False
    window = [[yes, no, no, no], [yes, yes, no, no], [no, yes, yes, no], [no, no, yes, yes]]
    assert attention_context(cfg, ids).mask.tolist() == window
    cached = attention_context(cfg, ids[:, :2], num_cached=2).mask
    assert cached.tolist() == [row[1:] for row in window[2:]]  # of the cached, the last only: no new token sees more
    documents = attention_context(cfg, ids, torch.tensor([[0, 0, 0, 1]])).mask
    assert documents.tolist() == [[[*window[:3], [no, no, no, yes]]]]


@pytest.mark.parametrize(("num_cached", "num_new"), [(0, 4), (3, 1), (0, 1)])
def test_plain_causal_attention_has_no_mask(num_cached: int, num_new: int) -> None:
    for window in (None, 4):
        ids = torch.zeros(1, num_new, dtype=torch.int64)
        assert attention_context(model_config(sliding_window=window), ids, num_cached=num_cached).mask is None
