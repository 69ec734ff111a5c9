"""Recipes of other projects, of the tests' own making."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.llm_foundry import recipes

GLU = {
    "ffn_type": "mb_dmoe",
    "mlp_type": "glu",
    "mlp_impl": "grouped",
    "ffn_act_fn": {"name": "silu"},
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_loss_weight": 0.05,
    "moe_normalize_expert_weights": 1,
    "moe_world_size": 1,
}
ROPE = {"attn_type": "grouped_query_attention", "kv_n_heads": 1, "rope": True, "rope_theta": 500000, "rope_impl": "hf"}


def exact_mpt(**changes: Any) -> dict[str, Any]:
    """An MPT that this project computes in the same way."""
    model = recipes.mpt(no_bias=True, norm_type="low_precision_rmsnorm", attn_config=dict(ROPE), ffn_config=dict(GLU))
    return model | changes


def hf_directory(directory: Path, **changes: Any) -> Path:
    """A directory with the config of a small Mixtral."""
    directory.mkdir(exist_ok=True)
    config = {"model_type": "mixtral", "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 4}
    config |= {"num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def axolotl(base_model: Path | str, **changes: Any) -> dict[str, Any]:
    """A recipe as axolotl's examples have them."""
    return {
        "base_model": str(base_model),
        "model_type": "AutoModelForCausalLM",
        "load_in_4bit": True,
        "datasets": [{"path": "answers.jsonl", "type": "alpaca"}],
        "val_set_size": 0.02,
        "adapter": None,
        "sequence_len": 128,
        "sample_packing": True,
        "wandb_project": None,
        "gradient_accumulation_steps": 4,
        "micro_batch_size": 2,
        "num_epochs": 3,
        "optimizer": "adamw_bnb_8bit",
        "lr_scheduler": "cosine",
        "learning_rate": 2e-4,
        "bf16": "auto",
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "flash_attention": True,
        "warmup_ratio": 0.1,
        "evals_per_epoch": 4,
        "saves_per_epoch": 1,
        "weight_decay": 0.0,
    } | changes


def composer(**changes: Any) -> dict[str, Any]:
    """A plain recipe in the words of Composer's trainer, with Hugging Face's names of the model's sizes."""
    model = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model |= {"vocab_size": 384, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return {
        "run_name": "plain",
        "max_duration": "100ba",
        "max_seq_len": 64,
        "model": model | {"hidden_act": "silu"},
        "train_dataloader": {"dataset": {"local": "data/x", "predownload": 5}, "pin_memory": True},
        "optimizers": {"decoupled_adamw": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 1e-4}},
        "schedulers": [{"cosine_with_warmup": {"t_warmup": "10ba", "alpha_f": 0.1}}],
        "precision": "amp_bf16",
        "eval_interval": 0,
        "train_batch_size": 8,
        "callbacks": [{"speed_monitor": {"window_size": 3}}, "lr_monitor"],
        "parallelism_config": {"fsdp": {"activation_checkpointing": True, "limit_all_gathers": True}},
    } | changes
