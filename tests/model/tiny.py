"""Models small enough to compare number by number."""

from __future__ import annotations

import torch
from torch import Tensor

from moefoundry.config import (
    ActivationCheckpointing,
    AttentionConfig,
    AuxLossScope,
    BalanceConfig,
    GqaConfig,
    InitConfig,
    LinearAttentionConfig,
    ModelConfig,
    MoEConfig,
    PrecisionConfig,
    RouterConfig,
)
from moefoundry.model.transformer import MoETransformer, meta_model
from moefoundry.parallel import materialize, parallelize

VOCAB, WIDTH, FFN, EXPERT_WIDTH, EXPERTS = 61, 32, 48, 16, 4
LINEAR = LinearAttentionConfig(layers=[0, 1], n_key_heads=2, n_value_heads=4, key_head_dim=6, value_head_dim=10)


def tiny_config(
    *,
    n_layers: int = 3,
    n_dense_layers: int = 1,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    rope_theta: float = 10_000.0,
    tie_embeddings: bool = False,
    top_k: int = 2,
    num_shared_experts: int = 1,
    backend: str = "grouped_mm",
    scope: str = "sequence",
    aux_loss_weight: float = 0.01,
    z_loss_weight: float = 0.001,
    std: float = 0.2,
) -> ModelConfig:
    """A model config with the tiny sizes above."""
    return ModelConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        n_layers=n_layers,
        n_dense_layers=n_dense_layers,
        ffn_hidden_size=FFN,
        tie_embeddings=tie_embeddings,
        init=InitConfig(std=std),
        attention=GqaConfig(n_heads=n_heads, n_kv_heads=n_kv_heads, rope_theta=rope_theta),
        moe=MoEConfig(
            num_experts=EXPERTS,
            top_k=top_k,
            expert_hidden_size=EXPERT_WIDTH,
            num_shared_experts=num_shared_experts,
            router=RouterConfig(normalize_topk=True),
            balance=BalanceConfig(
                aux_loss_weight=aux_loss_weight, aux_loss_scope=AuxLossScope(scope), z_loss_weight=z_loss_weight
            ),
            backend=backend,
        ),
    )


def use_attention(cfg: ModelConfig, attention: AttentionConfig | LinearAttentionConfig) -> None:
    """Softmax attention for all blocks, or linear attention for its own."""
    if isinstance(attention, LinearAttentionConfig):
        cfg.linear_attention = attention
    else:
        cfg.attention = attention


def tiny_model(
    cfg: ModelConfig,
    seed: int = 0,
    *,
    precision: PrecisionConfig | None = None,
    activation_checkpointing: str = "none",
    dtype: torch.dtype = torch.float32,
) -> MoETransformer:
    """Built as the trainer builds it on one device; norm weights, biases and sinks are moved so that they matter."""
    model = meta_model(cfg)
    parallelize(model, None, precision or PrecisionConfig(), ActivationCheckpointing(activation_checkpointing))
    materialize(model, "cpu", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias", "sinks")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def batch(sequences: int = 2, length: int = 16, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (sequences, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: MoETransformer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
