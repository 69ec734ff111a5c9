"""Multi-head latent attention: transformers' DeepSeek-V3 gives the same outputs and gradients, with its own weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from moefoundry.config import MlaConfig, NormConfig, YarnConfig
from moefoundry.conversion.families.rope_scaling import write_yarn
from moefoundry.model.context import attention_context
from moefoundry.model.mla import softmax_scale
from tests.model.peers import (
    DEEPSEEK_NAMES,
    MLA_NAMES,
    TO_1E_5,
    assert_same_gradients,
    assert_same_model,
    causal_bias,
    deepseek_v3,
    give_weights,
    max_positions,
    mla_widths,
)
from tests.model.tiny import batch, tiny_config, tiny_model

LENGTH = 12
MLA = MlaConfig(
    n_heads=4, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=5, rope_theta=100.0
)
YARN = YarnConfig(factor=4.0, original_max_seq_len=16, beta_fast=4.0, beta_slow=1.0)
VARIANTS = {
    "compressed_queries": MLA,
    "plain_queries": replace(MLA, q_lora_rank=None),
    "wide_values": replace(MLA, v_head_dim=20),
    "yarn": replace(MLA, yarn=YARN),
    "yarn_deepseek": replace(MLA, yarn=replace(YARN, mscale=1.0, mscale_all_dim=1.0)),
    "yarn_plain_queries": replace(MLA, q_lora_rank=None, yarn=replace(YARN, mscale=0.707, mscale_all_dim=0.5)),
}

variants = pytest.mark.parametrize("attention", VARIANTS.values(), ids=VARIANTS.keys())


def hidden() -> Tensor:
    return torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()


def their_layer(attention: MlaConfig, eps: float) -> tuple[nn.Module, nn.Module]:
    """Their attention and its rotary embedding. It always compresses queries; without, the compression is taken out."""
    config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=attention.n_heads,
        rope_theta=attention.rope_theta,
        rope_scaling=write_yarn(attention.yarn),
        max_position_embeddings=max_positions(attention.yarn),
        rms_norm_eps=eps,
        attn_implementation="eager",
        **mla_widths(replace(attention, q_lora_rank=attention.q_lora_rank or 32)),
    )
    layer = DeepseekV3Attention(config, 0)
    if attention.q_lora_rank is None:
        layer.q_a_proj, layer.q_a_layernorm = nn.Identity(), nn.Identity()
    return layer, DeepseekV3RotaryEmbedding(config)


@variants
def test_layer_equals_deepseek_v3(attention: MlaConfig) -> None:
    cfg = tiny_config(n_layers=1)
    cfg.attention, cfg.norm = attention, NormConfig(eps=1e-2)  # the eps of a block's norms, not of those in here
    ours = tiny_model(cfg).layers[0].attention
    theirs, rope = their_layer(attention, cfg.norm.eps)
    names = MLA_NAMES if attention.q_lora_rank else (*MLA_NAMES, ("q_proj", "q_b_proj"))
    give_weights(ours, theirs, names)
    x, their_x = hidden(), hidden()
    out = ours(x, attention_context(cfg, torch.zeros(2, LENGTH, dtype=torch.int64)))
    rotation = rope(their_x, torch.arange(LENGTH)[None])
    expected, _ = theirs(their_x, attention_mask=causal_bias(LENGTH), position_embeddings=rotation)
    torch.testing.assert_close(out, expected, **TO_1E_5)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(cotangent)
    expected.backward(cotangent)
    torch.testing.assert_close(x.grad, their_x.grad, **TO_1E_5)
    assert_same_gradients(ours, theirs, names)


@pytest.mark.parametrize("attention", [MLA, VARIANTS["yarn_deepseek"]], ids=["plain", "yarn"])
def test_model_equals_deepseek_v3(attention: MlaConfig) -> None:
    model, theirs = deepseek_v3(attention)
    assert_same_model(model, theirs, batch(2, 20), DEEPSEEK_NAMES)


def test_softmax_scale_by_hand() -> None:
    """DeepSeek-V3's own numbers: 192 wide, factor 40, mscale_all_dim 1: 192 ** -0.5 * (0.1 ln 40 + 1) ** 2."""
    published = MlaConfig(yarn=YarnConfig(factor=40.0, original_max_seq_len=4096, mscale=1.0, mscale_all_dim=1.0))
    assert softmax_scale(published) == pytest.approx(0.1352337788, rel=1e-9)
    assert softmax_scale(MlaConfig()) == pytest.approx(0.0721687836, rel=1e-9)
