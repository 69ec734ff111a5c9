"""The format version of recipes, and what a recipe of an earlier one means.

A checkpoint and a run keep their recipe with every key of its time, ``format_version`` among them; version 1 was
written without that key. A recipe file that does not say its version is of the present one. To add a key that stored
recipes lack, or to change what is kept, raise :data:`FORMAT_VERSION` and say in :data:`ADDED` what its absence meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMAT_VERSION = 5
VERSION_KEY = "format_version"

ADDED: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "model.d_model": {"model.dense_layers": [], "model.document_masking": False},
        "model.attention.n_heads": {"model.attention.yarn": None},
        "model.attention.n_kv_heads": {
            "model.attention.head_dim": None,
            "model.attention.qk_norm": "none",
            "model.attention.bias": "none",
            "model.attention.clip_qkv": None,
            "model.attention.sliding_window": None,
        },
        "model.moe.router.score_function": {
            "model.moe.router.input_jitter": 0.0,
            "model.moe.router.assignment": "scores",
        },
        "model.moe.balance.z_loss_weight": {"model.moe.balance.bias_freeze_at": None},
        "precision.compute": {
            "precision.fp8.exclude": ["lm_head", "*.router.gate"],
            "precision.fp8.backend": None,
            "scheduler.timing": "composer",
        },
    },
    2: {
        **{
            f"{loader}.dataset.max_seq_len": {
                f"{loader}.dataset.packing.method": "concat",
                f"{loader}.dataset.fim": None,
                f"{loader}.dataset.streams": None,
            }
            for loader in ("train_loader", "eval_loader")
        },
        "model.d_model": {
            "model.multipliers.embedding": 1.0,
            "model.multipliers.residual": 1.0,
            "model.multipliers.logits_divisor": 1.0,
        },
        "model.attention.n_heads": {"model.attention.llama3_rope": None},
        "model.attention.n_kv_heads": {
            "model.attention.rotary_fraction": 1.0,
            "model.attention.rotary_interleaved": False,
            "model.attention.softmax_scale": None,
        },
        "model.moe.num_experts": {"model.moe.shared_expert_gate": False},
    },
    3: {
        "model.d_model": {
            "model.norm.zero_centered": False,
            "model.norm.position": "before",
            "model.linear_attention": None,
            "model.swiglu.alpha": 1.0,
            "model.swiglu.limit": None,
            "model.swiglu.offset": 0.0,
        },
        "model.attention.n_heads": {"model.attention.sinks": False},
        "model.attention.n_kv_heads": {
            "model.attention.output_gate": False,
            "model.attention.sliding_window_layers": None,
        },
        "model.attention.kv_lora_rank": {"model.attention.indexer": None},
        "model.attention.yarn.factor": {
            "model.attention.yarn.attention_factor": None,
            "model.attention.yarn.truncate": True,
        },
        "model.moe.num_experts": {"model.moe.projection_bias": False},
        "model.moe.router.score_function": {"model.moe.router.gate_bias": False},
    },
    4: {
        "model.moe.num_experts": {"model.moe.dispatcher": "all_to_all", "model.moe.dispatch_chunks": 1},
        "model.d_model": {"model.norm.bias": False, "model.head_bias": False},
        "model.attention.n_heads": {"model.attention.longrope": None},
        "model.attention.n_kv_heads": {
            "model.attention.sliding_window_rope_theta": None,
            "model.attention.unrotated_layers": [],
        },
        "model.attention.indexer.top_k": {
            "model.attention.indexer.stage": "frozen",
            "model.attention.indexer.loss_weight": 1.0,
        },
    },
}
"""Version -> a key that its recipes have -> keys beside it that some of them lack, and what a recipe without means."""


def upgraded(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite a stored recipe as this release writes it.

    Args:
        recipe: Dotted key -> value.

    Raises:
        ValueError: It is of a later version.
    """
    version = recipe.get(VERSION_KEY, 1)
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(f"{VERSION_KEY} {version!r}; this release reads 1 to {FORMAT_VERSION}")
    result = dict(recipe)
    for earlier in range(version, FORMAT_VERSION):
        for beside, keys in ADDED[earlier].items():
            if beside in result:
                result |= {key: value for key, value in keys.items() if not _has(result, key)}
    return result | {VERSION_KEY: FORMAT_VERSION}


def without_effect(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """Prefixes of keys of a flat recipe that no layer reads, so that two recipes may differ in them."""
    n_layers, first = recipe.get("model.n_layers", 0), recipe.get("model.n_dense_layers", 0)
    dense = {*range(first), *recipe.get("model.dense_layers", ())}
    unread = () if dense else ("model.ffn_hidden_size",)
    sparse = len(dense) < n_layers or recipe.get("model.mtp.depth", 0)
    return unread if sparse else (*unread, "model.moe.")


def _has(recipe: Mapping[str, Any], key: str) -> bool:
    return any(name == key or name.startswith(f"{key}.") for name in recipe)
