"""LLM Foundry's MPT as a model here, where it computes the same; else the reasons why it does not."""

from __future__ import annotations

import math
from typing import Any

from moefoundry.migration.draft import Draft, check_kinds

NUMBERS = [f"model.{name}" for name in ("d_model", "n_heads", "n_layers", "expansion_ratio", "norm_eps", "head_dim")]
NUMBERS += [
    f"model.attn_config.{name}" for name in ("kv_n_heads", "rope_theta", "sliding_window_size", "softmax_scale")
]
NUMBERS += [f"model.ffn_config.{name}" for name in ("ffn_hidden_size", "moe_loss_weight", "moe_jitter_eps")]
MAPPINGS = [f"model.attn_config.{name}" for name in ("rope_hf_config", "rope_dail_config", "attn_temperature_tuning")]
MAPPINGS += ["model.ffn_config.ffn_act_fn", "model.init_config"]
RMS = ("rmsnorm", "low_precision_rmsnorm", "triton_rmsnorm")
LAYER = ("layernorm", "low_precision_layernorm")
MEGABLOCKS = ("mb_moe", "mb_dmoe")
EXPERTS = (*MEGABLOCKS, "torch_dmoe")
OURS = "moefoundry_moe"
GELU = {"name": "gelu"}
ROOM = "model."
OF_THE_MACHINE = {
    "init_device": "weights are made where they lie",
    "loss_fn": "the loss is computed a part of the tokens at a time, without all logits",
    "attn_impl": "attention is computed by what the device has",
    "rope_impl": "there is one implementation of rotary embeddings",
    "rope_dail_config": "there is one implementation of rotary embeddings",
    "rope_hf_config": "there is one implementation of rotary embeddings",
    "fused_qkv": "queries, keys and values have a weight each; `convert import` splits a fused one",
    "alibi_bias_max": "no ALiBi",
    "use_cache": "`moefoundry generate` has a cache",
    "use_pad_tok_in_ffn": "padding is neither routed nor counted",
    "fc_type": "products are torch's; precision.fp8 makes them FP8",
    "master_weights_dtype": "master weights are fp32",
    "init_config": "weight matrices begin normal with model.init.std",
    "memory_optimized_mlp": "activation_checkpointing says what is recomputed",
    "mlp_impl": "model.moe.backend: auto takes the fastest",
    "moe_lbl_in_fp32": "the balance loss is fp32",
    "moe_zloss_in_fp32": "the z loss is fp32",
    "return_bias": "experts have no bias",
    "remat_act_fn": "activation_checkpointing says what is recomputed",
    "pipeline_model_parallel_size": "there is no pipeline parallelism",
    "moe_expert_model_parallelism": "mesh.expert says so",
    "fp16": "precision.compute says so",
    "bf16": "precision.compute says so",
    "moe_capacity_factor": "experts are dropless",
    "moe_loss_weight": "these experts have no balance loss there",
    "learned_pos_emb": "rotary embeddings take its place, in LLM Foundry as well",
}
"""Keys that change nothing in what is computed, with the reason why none is needed."""


class Mpt:
    """The ``model`` of a recipe with ``mpt_causal_lm``.

    Args:
        model: Its keys, interpolations resolved.

    Attributes:
        reasons: Key -> the reason why such a model cannot be expressed here.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        check_kinds({"model": model}, NUMBERS, ("model.attn_config", "model.ffn_config", *MAPPINGS))
        self.model = _said(model)
        self.attention, self.ffn = _said(model.get("attn_config")), _said(model.get("ffn_config"))
        self.ffn_type = self.ffn.get("ffn_type") or "mptmlp"
        self.reasons: dict[str, str] = {}
        self._norms_and_biases()
        self._positions()
        self._attention()
        self._ffn()
        self._head()

    @property
    def has_experts(self) -> bool:
        """True where every block is a mixture."""
        return self.ffn_type in (*EXPERTS, OURS)

    @property
    def width(self) -> Any:
        """Hidden width of the FFN, or of one expert."""
        if self.ffn_type == OURS and self.ffn.get("expert_hidden_size"):
            return self.ffn["expert_hidden_size"]
        ratio = self.model.get("expansion_ratio", 4)
        width = self.ffn.get("ffn_hidden_size")
        return int(self.model.get("d_model", 2048) * ratio) if width is None else width

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads, and key and value heads."""
        heads = self.model.get("n_heads", 16)
        kind = str(self.attention.get("attn_type", "multihead_attention"))
        return heads, {"multiquery_attention": 1, "multihead_attention": heads}.get(
            kind, self.attention.get("kv_n_heads", heads)
        )

    @property
    def biases(self) -> tuple[bool, bool]:
        """Tell if queries, keys and values have biases, and if all other layers have."""
        others = not self.model.get("no_bias", False)
        inputs = self.model.get("attention_bias")
        return others if inputs is None else bool(inputs), others

    # ------------------------------------------------------------------------------------------ what stands in the way

    def _norms_and_biases(self) -> None:
        norm, (inputs, others) = str(self.model.get("norm_type", LAYER[1])).lower(), self.biases
        if norm in LAYER and others:
            self.reasons["no_bias"] = "false: norms have a bias, and here none has"
        elif norm not in (*RMS, *LAYER):
            self.reasons["norm_type"] = f"{norm} is no norm here"
        if others and not inputs:
            self.reasons["attention_bias"] = "false with no_bias false: only the output projection has a bias"
        if others and self.ffn_type in ("mptglu", *MEGABLOCKS):
            self.reasons["no_bias"] = "false: the FFN has biases, and here none has"

    def _positions(self) -> None:
        attention = self.attention
        if not attention.get("rope"):
            kind = "ALiBi" if attention.get("alibi") else "learned positions"
            self.reasons["attn_config.rope"] = f"false: the model has {kind}, and here positions are rotary"
        hf, dail = attention.get("rope_hf_config") or {}, attention.get("rope_dail_config") or {}
        if attention.get("rope_impl", "dail") == "hf" and hf.get("type", "no_scaling") != "no_scaling":
            self.reasons["attn_config.rope_hf_config.type"] = f"{hf['type']}: frequencies are scaled by YaRN alone here"
        elif attention.get("rope_impl", "dail") == "dail" and dail.get("type", "original") != "original":
            self.reasons["attn_config.rope_dail_config.type"] = f"{dail['type']} is no rotary embedding here"

    def _attention(self) -> None:
        attention, d_model, heads = self.attention, self.model.get("d_model", 2048), self.heads[0]
        said: Any = attention.get("softmax_scale")
        if said is not None and not math.isclose(said, (d_model / heads) ** -0.5, rel_tol=1e-6):
            self.reasons["attn_config.softmax_scale"] = f"{said}: here it is the root of the head's width"
        if self.model.get("head_dim") not in (None, d_model // heads):
            self.reasons["head_dim"] = "queries are scaled by d_model / n_heads, not by the head's width"
        for name in ("attn_logit_softcapping", "kv_dim", "nope", "reuse_kv_layer_idx", "reuse_kv_x_layer_idx"):
            if attention.get(name) not in (None, False):
                self.reasons[f"attn_config.{name}"] = "attention here has none"
        if (attention.get("attn_temperature_tuning") or {}).get("attn_scale"):
            self.reasons["attn_config.attn_temperature_tuning"] = "attention here has none"
        if attention.get("attn_pdrop"):
            self.reasons["attn_config.attn_pdrop"] = "there is no dropout"
        if attention.get("qk_ln") or attention.get("qk_gn"):
            name, eps = attention.get("norm_type", LAYER[1]), attention.get("norm_eps", 1e-5)
            if name not in RMS or eps != self.model.get("norm_eps", 1e-5):
                self.reasons["attn_config.norm_type"] = (
                    f"{name}: queries and keys have an RMSNorm of model.norm.eps here"
                )
            if attention.get("clip_qkv"):
                self.reasons["attn_config.clip_qkv"] = "clamps before the norms of queries and keys; here after them"

    def _ffn(self) -> None:
        ffn, kind = self.ffn, self.ffn_type
        if kind == OURS:
            return
        if kind == "mb_moe" or (kind in EXPERTS and ffn.get("mlp_type", "mlp") != "glu"):
            self.reasons["ffn_config.mlp_type"] = "mlp: experts have two matrices, and here three (SwiGLU)"
        elif kind not in (*EXPERTS, "mptglu"):
            self.reasons["ffn_config.ffn_type"] = f"{kind}: an FFN has two matrices, and here three (SwiGLU)"
        if (ffn.get("ffn_act_fn") or GELU).get("name") not in ("silu", "swish"):
            name = (ffn.get("ffn_act_fn") or GELU).get("name")
            self.reasons["ffn_config.ffn_act_fn"] = f"{name}: here every FFN is a SwiGLU, whose activation is silu"
        if ffn.get("moe_normalize_expert_weights") not in (None, 0, 1, False):
            self.reasons["ffn_config.moe_normalize_expert_weights"] = "weights are divided by their sum here, or not"
        if ffn.get("shared_expert"):
            self.reasons["ffn_config.shared_expert"] = "its weights have another form"

    def _head(self) -> None:
        for name, none in {"logit_scale": 1, "final_logit_softcapping": None, "embedding_fraction": 1}.items():
            if self.model.get(name) not in (None, none):
                self.reasons[name] = f"{self.model[name]}: the embedding and the output head here have none"
        if self.model.get("block_overrides"):
            self.reasons["block_overrides"] = "all attention is of one kind here"
        for name in ("resid_pdrop", "emb_pdrop"):
            if self.model.get(name):
                self.reasons[name] = "there is no dropout"

    # ------------------------------------------------------------------------------------------------------- the model

    def norm_kind(self) -> str:
        """Name the norm as it is called here."""
        return "rmsnorm" if str(self.model.get("norm_type", LAYER[1])).lower() in RMS else "layernorm"

    def native_keys(self) -> dict[str, tuple[Any, str, str]]:
        """Map each key of ``model`` here to its value, the key of LLM Foundry under ``model``, and what changed."""
        model, attention = self.model, self.attention
        heads, kv_heads = self.heads
        inputs, others = self.biases
        qk_norm = "full" if attention.get("qk_ln") else "head" if attention.get("qk_gn") else "none"
        window = attention.get("sliding_window_size", -1)
        keys: dict[str, tuple[Any, str, str]] = {
            "vocab_size": (model.get("vocab_size", 50368), "vocab_size", ""),
            "d_model": (model.get("d_model", 2048), "d_model", ""),
            "n_layers": (model.get("n_layers", 24), "n_layers", ""),
            "norm.kind": (self.norm_kind(), "norm_type", ""),
            "norm.eps": (float(model.get("norm_eps", 1e-5)), "norm_eps", ""),
            "tie_embeddings": (model.get("tie_word_embeddings", True), "tie_word_embeddings", ""),
            "document_masking": (
                bool(attention.get("attn_uses_sequence_id")), "attn_config.attn_uses_sequence_id", "",
            ),
            "attention.n_heads": (heads, "n_heads", ""),
            "attention.n_kv_heads": (kv_heads, "attn_config.kv_n_heads", ""),
            "attention.rope_theta": (float(attention.get("rope_theta", 10000)), "attn_config.rope_theta", ""),
            "attention.bias": ("all" if others else "qkv" if inputs else "none", "attention_bias", ""),
            "attention.qk_norm": (qk_norm, f"attn_config.{'qk_gn' if qk_norm == 'head' else 'qk_ln'}", ""),
            "attention.clip_qkv": (attention.get("clip_qkv"), "attn_config.clip_qkv", ""),
            "attention.sliding_window": (
                None if window == -1 else window + 1, "attn_config.sliding_window_size",
                "" if window == -1 else "the position itself is counted",
            ),
        }  # fmt: skip
        return keys | (self._moe_keys() if self.has_experts else self._dense_keys())

    def _dense_keys(self) -> dict[str, tuple[Any, str, str]]:
        width = "ffn_config.ffn_hidden_size" if self.ffn.get("ffn_hidden_size") else "expansion_ratio"
        why = "in none of the blocks"
        return {
            "n_dense_layers": (self.model.get("n_layers", 24), "", "every block has a dense FFN"),
            "ffn_hidden_size": (self.width, width, "the width itself"),
            "moe.num_experts": (1, "", why),
            "moe.top_k": (1, "", why),
            "moe.expert_hidden_size": (self.width, "", why),
        }

    def _moe_keys(self) -> dict[str, tuple[Any, str, str]]:
        ffn = self.ffn
        width = "ffn_config.ffn_hidden_size" if ffn.get("ffn_hidden_size") else "expansion_ratio"
        if self.ffn_type == OURS:
            own = {name: (value, f"ffn_config.{name}", "") for name, value in flat(ffn).items() if name != "ffn_type"}
            own.pop("ffn_hidden_size", None)
            return {f"moe.{name}": entry for name, entry in own.items()} | (
                {}
                if "expert_hidden_size" in own
                else {"moe.expert_hidden_size": (self.width, width, "the width itself")}
            )
        keys: dict[str, tuple[Any, str, str]] = {
            "moe.num_experts": (ffn.get("moe_num_experts", 1), "ffn_config.moe_num_experts", ""),
            "moe.top_k": (ffn.get("moe_top_k", 1), "ffn_config.moe_top_k", ""),
            "moe.expert_hidden_size": (self.width, width, "the width itself"),
            "moe.router.normalize_topk": (
                bool(ffn.get("moe_normalize_expert_weights")), "ffn_config.moe_normalize_expert_weights", "",
            ),
            "moe.router.input_jitter": (float(ffn.get("moe_jitter_eps") or 0), "ffn_config.moe_jitter_eps", ""),
            "moe.router.assignment": (
                "uniform" if ffn.get("uniform_expert_assignment") else "scores",
                "ffn_config.uniform_expert_assignment", "",
            ),
        }  # fmt: skip
        return keys | self._balance_keys()

    def _balance_keys(self) -> dict[str, tuple[Any, str, str]]:
        weight = 0.0 if self.ffn_type not in MEGABLOCKS else float(self.ffn.get("moe_loss_weight", 0.1))
        layers = self.model.get("n_layers", 24)
        why = "a sum over layers, there a mean" if weight else f"{self.ffn_type} has no balance loss"
        return {
            "moe.balance.aux_loss_weight": (
                float(f"{weight / layers:.6g}"),
                "ffn_config.moe_loss_weight" if weight else "",
                why,
            ),
            "moe.balance.aux_loss_scope": ("micro_batch", "", "MegaBlocks takes the micro-batch as a whole"),
            "moe.balance.z_loss_weight": (0.0, "", "LLM Foundry adds no z loss"),
        }


def _said(mapping: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (mapping or {}).items() if value is not None}


def flat(mapping: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten a mapping to dotted keys."""
    found: dict[str, Any] = {}
    for name, value in mapping.items():
        path = f"{above}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, dict) and value else {path: value}
    return found


def move_mpt(draft: Draft, mpt: Mpt) -> None:
    """Move ``model`` of a recipe whose MPT can be expressed here."""
    for key, (value, old, why) in mpt.native_keys().items():
        said = f"{ROOM}{old}" if old and f"{ROOM}{old}" in draft.old else ""
        draft.put(f"model.{key}", value, said, why or ("" if said else "MPT's default"))
    used = ["name", "attn_config.rope", "attn_config.alibi", "attn_config.attn_type", "no_bias"]
    used += [f"ffn_config.{name}" for name in ("ffn_type", "mlp_type", "ffn_act_fn")]
    draft.silence(*(f"{ROOM}{name}" for name in used))
    if f"{ROOM}ffn_config.moe_world_size" in draft.old:
        draft.move(f"{ROOM}ffn_config.moe_world_size")
    std = f"{ROOM}init_config.init_std"
    if draft.value(f"{ROOM}init_config.name") == "baseline_" and draft.value(std) is not None:
        draft.put("model.init.std", float(draft.value(std)), std)
    else:
        draft.notes.append("initial weights are normal with model.init.std 0.02; MPT's default is kaiming_normal_")
    for path in draft.below("model"):
        names = [name for name in path.split(".") if name in OF_THE_MACHINE]
        value = draft.old[path]
        if names:
            draft.drop(path, OF_THE_MACHINE[names[0]])
        elif path == "model.max_seq_len":
            draft.same("max_seq_len", path, "")
        elif value in (None, False, 0, -1) or path.endswith(("_pdrop", "embedding_fraction", "logit_scale")):
            draft.silence(path)  # switched off
        else:
            draft.move(path)
