"""LLM Foundry's configuration for the model and the training that a moefoundry recipe declares.

MPT with ``torch_dmoe`` is its MoE model that runs without MegaBlocks. It has neither shared experts nor leading dense
layers, so a recipe that has them is matched by one of :func:`matches`. Everything that can be equal is: width, layers,
heads, grouped queries, RoPE, RMSNorm, SwiGLU, untied embeddings, no biases, number of experts, sequence length, batch,
micro-batch, data (the same shards), optimizer, schedule, clipping, precision, monitors, no loader processes.

Choices in LLM Foundry's favour: no training metrics (its default computes three of them from all logits), torch's fused
AdamW (its own ``DecoupledAdamW`` works parameter by parameter), no debug logging, no console output.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefoundry.config import AdamWConfig, CosineWithWarmupConfig, GqaConfig, ModelConfig, Recipe

ALIGNMENT = 16


@dataclass(frozen=True)
class Match:
    """How LLM Foundry's experts are sized, and which recipe they are compared with.

    Attributes:
        label: What is equal.
        top_k, hidden: Of LLM Foundry's MoE layers.
        overrides: Changes to the recipe.
    """

    label: str
    top_k: int
    hidden: int
    overrides: tuple[str, ...] = ()


def matches(model: ModelConfig) -> list[Match]:
    """Fair opponents of ``model``, each with at most its active FLOPs a token."""
    moe = model.moe
    active = _active_ffn_width(model) // (model.n_layers * moe.top_k)
    top_k = _active_ffn_width(model) // (model.n_layers * moe.expert_hidden_size)
    return [
        Match("the recipe's experts and top-k + 1, no shared expert", top_k, moe.expert_hidden_size),
        Match("the recipe's top-k, wider experts for its active FLOPs", moe.top_k, active // ALIGNMENT * ALIGNMENT),
        Match(
            "the same network: no shared expert, no dense layer",
            moe.top_k,
            moe.expert_hidden_size,
            ("model.moe.num_shared_experts=0", "model.n_dense_layers=0"),
        ),
    ]


def _active_ffn_width(model: ModelConfig) -> int:
    """Hidden widths that one token passes through, summed over layers."""
    moe = model.moe
    moe_width = (moe.top_k + moe.num_shared_experts) * moe.expert_hidden_size
    return model.n_dense_layers * model.ffn_hidden_size + (model.n_layers - model.n_dense_layers) * moe_width


def training_config(recipe: Recipe, match: Match) -> dict[str, Any]:
    """The YAML of LLM Foundry's training script."""
    optimizer, scheduler = recipe.optimizer, recipe.scheduler
    assert isinstance(optimizer, AdamWConfig)
    assert isinstance(scheduler, CosineWithWarmupConfig)
    return {
        "run_name": "benchmark",
        "seed": recipe.seed,
        "max_seq_len": recipe.max_seq_len,
        "model": mpt(recipe, match),
        "tokenizer": {
            "name": recipe.tokenizer.name,
            "kwargs": {"model_max_length": recipe.max_seq_len},
        },
        "train_loader": text_loader(recipe, split="train", shuffle=True, drop_last=True),
        "optimizer": {
            "name": "fused_adamw",
            "lr": optimizer.lr,
            "betas": list(optimizer.betas),
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": scheduler.t_warmup, "alpha_f": 0.1},
        "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
        "callbacks": {"speed_monitor": {"window_size": 10}, "lr_monitor": {}, "memory_monitor": {}},
        "precision": "fp32",
        "max_duration": recipe.max_duration,
        "eval_interval": 0,
        "global_train_batch_size": recipe.global_train_batch_size,
        "device_train_microbatch_size": recipe.device_train_microbatch_size,
        "device_eval_batch_size": recipe.device_eval_batch_size,
        "progress_bar": False,
        "log_to_console": False,
        "log_config": False,
        "python_log_level": "warning",
        "dist_timeout": recipe.dist_timeout,
    }


def mpt(recipe: Recipe, match: Match) -> dict[str, Any]:
    """The model's part of the configuration."""
    model, attention = recipe.model, recipe.model.attention
    assert isinstance(attention, GqaConfig)
    return {
        "name": "mpt_causal_lm",
        "init_device": "cpu",
        "d_model": model.d_model,
        "n_heads": attention.n_heads,
        "n_layers": model.n_layers,
        "max_seq_len": recipe.max_seq_len,
        "vocab_size": model.vocab_size,
        "no_bias": True,
        "norm_type": "rmsnorm",
        "norm_eps": model.norm.eps,
        "tie_word_embeddings": model.tie_embeddings,
        "learned_pos_emb": False,
        "init_config": {"name": "baseline_", "init_std": model.init.std},
        "loss_fn": "torch_crossentropy",
        "use_train_metrics": False,
        "attn_config": {
            "attn_type": "grouped_query_attention",
            "attn_impl": "torch",
            "kv_n_heads": attention.n_kv_heads,
            "rope": True,
            "rope_impl": "hf",
            "rope_theta": int(attention.rope_theta),
        },
        "ffn_config": {
            "ffn_type": "torch_dmoe",
            "mlp_type": "glu",
            "ffn_act_fn": {"name": "silu"},
            "ffn_hidden_size": match.hidden,
            "moe_num_experts": model.moe.num_experts,
            "moe_top_k": match.top_k,
            "moe_jitter_eps": None,
            "moe_normalize_expert_weights": 1,
            "uniform_expert_assignment": False,
        },
    }


def text_loader(recipe: Recipe, *, split: str, shuffle: bool, drop_last: bool) -> dict[str, Any]:
    """LLM Foundry's own text loader, on the shards that moefoundry prepared."""
    return {
        "name": "text",
        "dataset": {
            "local": str(Path(recipe.train_loader.dataset.local).resolve()),
            "split": split,
            "shuffle": shuffle,
            "max_seq_len": recipe.max_seq_len,
            "shuffle_seed": recipe.seed,
        },
        "drop_last": drop_last,
        "num_workers": 0,
        "prefetch_factor": None,
        "persistent_workers": False,
        "pin_memory": False,
    }


def register_fused_adamw() -> None:
    """Make torch's fused AdamW available to LLM Foundry's configuration."""
    from llmfoundry.registry import optimizers
    from torch.optim import AdamW

    class FusedAdamW(AdamW):
        def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float) -> None:
            super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=True)

    optimizers.register("fused_adamw", func=FusedAdamW)
