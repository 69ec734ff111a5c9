"""Recipes of LLM Foundry, of the tests' own making, and what they train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def mpt(**changes: Any) -> dict[str, Any]:
    """A small MPT as a recipe for GPUs has it."""
    return {
        "name": "mpt_causal_lm",
        "init_device": "meta",
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 2,
        "expansion_ratio": 2,
        "max_seq_len": "${variables.length}",
        "vocab_size": 384,
    } | changes


def recipe(model: dict[str, Any], corpus: Path | str = "corpus", **changes: Any) -> dict[str, Any]:
    """A recipe for GPUs: meta, flash attention, FSDP1, BF16, loader processes as LLM Foundry's own examples."""

    def loader(split: str) -> dict[str, Any]:
        dataset = {"local": str(corpus), "split": split, "shuffle": split == "train", "shuffle_seed": 3}
        dataset["max_seq_len"] = "${variables.length}"  # type: ignore[assignment]
        return {"name": "text", "dataset": dataset, "drop_last": split == "train", "num_workers": 0}

    return {
        "variables": {"length": 64},
        "max_seq_len": "${variables.length}",
        "run_name": "small",
        "model": model,
        "tokenizer": {"name": str(Path(corpus, "tokenizer")), "kwargs": {"model_max_length": "${variables.length}"}},
        "train_loader": loader("train"),
        "eval_loader": loader("val"),
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": "2ba", "alpha_f": 0.1},
        "optimizer": {"name": "decoupled_adamw", "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0},
        "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
        "max_duration": "20ba",
        "eval_interval": 0,
        "global_train_batch_size": 4,
        "seed": 17,
        "device_eval_batch_size": 2,
        "device_train_microbatch_size": 1,
        "precision": "amp_bf16",
        "fsdp_config": {
            "sharding_strategy": "FULL_SHARD",
            "mixed_precision": "PURE",
            "activation_checkpointing": False,
            "activation_checkpointing_reentrant": False,
            "limit_all_gathers": True,
        },
        "progress_bar": False,
        "log_to_console": False,
        "log_config": False,
        "python_log_level": "warning",
        "loggers": {"inmemory": {}},
    } | changes


def write(directory: Path, tree: dict[str, Any], name: str = "recipe.yaml") -> str:
    """Write a recipe; returns its path."""
    path = directory / name
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


def gpt2(directory: Path) -> dict[str, Any]:
    """An ``hf_causal_lm`` of GPT-2's class from a configuration on disk, without dropout."""
    directory.mkdir(exist_ok=True)
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 384, "n_positions": 64}
    config |= {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    (directory / "config.json").write_text(json.dumps(config))
    return {"name": "hf_causal_lm", "pretrained_model_name_or_path": str(directory), "pretrained": False}


TORCH_DMOE = {
    "ffn_type": "torch_dmoe",
    "mlp_type": "glu",
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_jitter_eps": None,
    "moe_normalize_expert_weights": 1,
    "uniform_expert_assignment": False,
}
OURS = {"ffn_type": "moefoundry_moe", "num_experts": 4, "top_k": 2, "num_shared_experts": 1}
