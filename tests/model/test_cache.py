"""With a cache, tokens that come in parts give the logits that they give together, for every kind of attention."""

from dataclasses import replace

import pytest
import torch

from moefoundry.config import (
    AttentionConfig,
    GqaConfig,
    LinearAttentionConfig,
    MlaConfig,
    ModelConfig,
    QkNorm,
    RouterConfig,
    YarnConfig,
)
from moefoundry.model.cache import KVCache
from tests.model.tiny import EXPERTS, LINEAR, batch, tiny_config, tiny_model, use_attention

YARN = YarnConfig(factor=4.0, original_max_seq_len=8, beta_fast=4.0, mscale=1.0, mscale_all_dim=0.7)
MLA = {"n_heads": 4, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 5}
KINDS = {
    "grouped_query": GqaConfig(n_heads=4, n_kv_heads=2),
    "window": GqaConfig(n_heads=4, n_kv_heads=1, sliding_window=3),
    "norms_and_clip": GqaConfig(n_heads=4, n_kv_heads=4, head_dim=6, qk_norm=QkNorm.full, clip_qkv=0.5, yarn=YARN),
    "latent": MlaConfig(**MLA, q_lora_rank=10),
    "latent_yarn": MlaConfig(**MLA, yarn=YARN),
    "gated": GqaConfig(n_heads=4, n_kv_heads=2, output_gate=True, rotary_fraction=0.5),
    "linear": LINEAR,
    "linear_alone": replace(LINEAR, layers=[0, 1, 2], conv_width=3),
    "sinks": GqaConfig(n_heads=4, n_kv_heads=2, sinks=True, sliding_window=3, sliding_window_layers=[0, 2]),
    "ropes": GqaConfig(
        n_heads=4,
        n_kv_heads=2,
        yarn=YARN,
        sliding_window=3,
        sliding_window_layers=[0],
        sliding_window_rope_theta=50.0,
        unrotated_layers=[1],
    ),
    "latent_sinks": MlaConfig(**MLA, sinks=True),
}
PARTS = {"one_by_one": [1] * 12, "prompt_then_one_by_one": [8, 1, 1, 1, 1], "several_at_once": [5, 4, 3]}

kinds = pytest.mark.parametrize("attention", KINDS.values(), ids=KINDS.keys())


def config(attention: AttentionConfig, **options: object) -> ModelConfig:
    cfg = tiny_config(**options)
    use_attention(cfg, attention)
    return cfg


@kinds
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_cached_logits_equal_uncached_ones(attention: AttentionConfig, parts: list[int]) -> None:
    cfg, ids = config(attention, backend="loop"), batch(3, 12)
    model = tiny_model(cfg, dtype=torch.float64).eval()
    expected = model(ids)
    cfg.document_masking = True  # a row with a cache is one document
    cache = KVCache(cfg.n_layers)
    logits = []
    for part in ids.split(parts, dim=1):
        logits.append(model(part, cache=cache))
        assert cache.length == sum(x.shape[1] for x in logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-12)


@kinds
def test_fp32_and_grouped_mm_experts_one_token_at_a_time(attention: AttentionConfig) -> None:
    """A decoding step leaves most experts without a token."""
    cfg, ids = config(attention, top_k=1), batch(1, 12)
    cfg.moe.router = RouterConfig(normalize_topk=False)
    model = tiny_model(cfg).eval()
    cache = KVCache(cfg.n_layers)
    logits = torch.cat([model(token, cache=cache) for token in ids.split(1, dim=1)], dim=1)
    small_outputs = isinstance(attention, LinearAttentionConfig)  # which the norm of a head divides by
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=3e-5 if small_outputs else 1e-5)
    assert cfg.moe.top_k < EXPERTS


@pytest.mark.parametrize("mode", ["selective", "full"])
@torch.no_grad()
def test_blocks_that_checkpoint_activations_take_a_cache(mode: str) -> None:
    cfg, ids = config(KINDS["latent"]), batch(1, 6)
    cache = KVCache(cfg.n_layers)
    model = tiny_model(cfg, activation_checkpointing=mode).eval()
    logits = torch.cat([model(part, cache=cache) for part in ids.split([4, 1, 1], dim=1)], dim=1)
    torch.testing.assert_close(logits, tiny_model(cfg)(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["grouped_query", "latent", "linear", "sinks"])
@torch.no_grad()
def test_compiled_attention_is_one_graph(kind: str) -> None:
    torch._dynamo.reset()  # graphs of other tests count towards the limit
    cfg, ids = config(KINDS[kind], n_layers=1), batch(1, 8)
    model, cache = tiny_model(cfg).eval(), KVCache(cfg.n_layers)
    expected = model(ids)
    for block in model.layers:
        block.attention.compile(backend="eager", fullgraph=True)
    logits = torch.cat([model(part, cache=cache) for part in ids.split([4, 1, 1, 1, 1], dim=1)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_linear_attention_keeps_a_state_whatever_the_length() -> None:
    cfg, cache = config(KINDS["linear"]), KVCache(3)
    for length in (7, 1):
        tiny_model(cfg)(batch(2, length), cache=cache)
        shapes = [tuple(tensor.shape) for tensor in cache.layers[0].tensors]
        assert shapes == [(2, 3, 64), (2, 4, 6, 10)]  # three inputs of 64 channels; four states
    assert cache.layers[2].tensors[0].shape[-2] == cache.length == 8


def test_blocks_with_a_window_keep_only_what_the_next_token_sees() -> None:
    cfg, cache = config(KINDS["sinks"]), KVCache(3)
    model = tiny_model(cfg)
    for part, kept in zip(batch(2, 7).split([1, 5, 1], dim=1), (1, 6, 7), strict=True):
        model(part, cache=cache)
        lengths = [{tensor.shape[-2] for tensor in layer.tensors} for layer in cache.layers]
        assert lengths == [{min(kept, 2)}, {kept}, {min(kept, 2)}]
    assert cache.length == 7


def test_latent_attention_keeps_only_the_compressed_tokens() -> None:
    cfg, cache = config(KINDS["latent"]), KVCache(3)
    tiny_model(cfg)(batch(2, 7), cache=cache)
    for layer in cache.layers:
        assert [tuple(tensor.shape) for tensor in layer.tensors] == [(2, 7, 12), (2, 1, 7, 6)]
