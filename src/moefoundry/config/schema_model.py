"""The recipe's ``model``: what :mod:`moefoundry.config.schema` says of the recipe holds here, too.

A key that joins ``model`` is off by default (null, false, 0, none), so that checkpoints without it can be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moefoundry.config.field import INTERVAL, MAX_FACTOR, key


class NormKind(StrEnum):
    rmsnorm = "rmsnorm"
    layernorm = "layernorm"


class ScoreFunction(StrEnum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class Assignment(StrEnum):
    scores = "scores"
    uniform = "uniform"


class QkNorm(StrEnum):
    none = "none"
    head = "head"
    full = "full"


class AttentionBias(StrEnum):
    none = "none"
    qkv = "qkv"
    all = "all"


class AuxLossScope(StrEnum):
    sequence = "sequence"
    micro_batch = "micro_batch"
    global_batch = "global_batch"


class ExpertBackend(StrEnum):
    auto = "auto"
    triton = "triton"
    grouped_mm = "grouped_mm"
    loop = "loop"
    megablocks = "megablocks"


@dataclass
class NormConfig:
    kind: NormKind = key(
        NormKind.rmsnorm,
        "Normalization layer; neither kind has a bias.",
        renamed_from=("norm_type",),
        other_values={
            "low_precision_rmsnorm": "rmsnorm",
            "rms_norm": "rmsnorm",
            "low_precision_layernorm": "layernorm",
            "layer_norm": "layernorm",
        },
    )
    eps: float = key(
        1.0e-6,
        "Added to the mean square before the root.",
        gt=0,
        renamed_from=("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    )


@dataclass
class InitConfig:
    std: float = key(
        0.06,
        "Standard deviation of every weight matrix; norms start at 1.",
        gt=0,
        le=100,
        renamed_from=("initializer_range", "init_std"),
    )


@dataclass
class YarnConfig:
    """Context extension by YaRN (arXiv 2309.00071); null factors follow Hugging Face's ``rope_scaling``."""

    factor: float = key(40.0, "How many times longer the context becomes.", ge=1)
    original_max_seq_len: int = key(
        4096,
        "Context length before the extension, in tokens.",
        ge=1,
        renamed_from=("original_max_position_embeddings", "original_seq_len"),
    )
    beta_fast: float = key(32.0, "Rotations over the original context from which frequencies stay as they are.", gt=0)
    beta_slow: float = key(1.0, "Rotations up to which frequencies are divided by the factor.", gt=0)
    mscale: float | None = key(None, "DeepSeek's factor in the magnitude of cosines and sines.", gt=0)
    mscale_all_dim: float | None = key(None, "DeepSeek's factor in the softmax scale.", gt=0)


@dataclass
class AttentionConfig:
    """What every attention kind has; the keys of a kind are in its subclass."""

    kind: str = key(
        "gqa",
        "Attention kind; it decides the other keys of this mapping.",
        renamed_from=("attn_type",),
        other_values={"grouped_query_attention": "gqa", "multihead_attention": "gqa"},
    )
    n_heads: int = key(8, "Query heads.", ge=1, renamed_from=("num_attention_heads", "n_head"))
    rope_theta: float = key(
        10000.0, "Base of the rotary position embedding.", gt=0, renamed_from=("rope_base", "rotary_emb_base")
    )
    yarn: YarnConfig | None = key(
        None, "Context extension; null leaves the frequencies as they are.", renamed_from=("rope_scaling",)
    )


@dataclass
class GqaConfig(AttentionConfig):
    """Grouped-query attention (arXiv 2305.13245); ``n_kv_heads == n_heads`` is multi-head attention."""

    n_kv_heads: int = key(
        4, "Key and value heads; divides n_heads.", ge=1, renamed_from=("num_key_value_heads", "kv_n_heads")
    )
    head_dim: int | None = key(None, "Width of a head; null is d_model / n_heads.", ge=2)
    qk_norm: QkNorm = key(
        QkNorm.none,
        "RMSNorm of queries and keys: over each head, or over all heads together.",
        renamed_from=("use_qk_norm", "qk_ln"),
    )
    bias: AttentionBias = key(
        AttentionBias.none, "Which projections have a bias.", renamed_from=("attention_bias", "qkv_bias")
    )
    clip_qkv: float | None = key(None, "Clamps queries, keys and values to [-clip_qkv, clip_qkv].", gt=0)
    sliding_window: int | None = key(
        None,
        "Tokens a position sees, itself included; null sees all before it.",
        ge=1,
        renamed_from=("sliding_window_size",),
    )


@dataclass
class MlaConfig(AttentionConfig):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in the published weights' interleaved RoPE."""

    kind: str = key("mla", "Attention kind; it decides the other keys of this mapping.")
    q_lora_rank: int | None = key(None, "Width of the compressed queries; null does not compress them.", ge=1)
    kv_lora_rank: int = key(512, "Width of the compressed keys and values.", ge=1)
    qk_nope_head_dim: int = key(128, "Width of a query's and key's part without position.", ge=1)
    qk_rope_head_dim: int = key(64, "Width of the part with position; the keys of all heads share it.", ge=2)
    v_head_dim: int = key(128, "Width of a value.", ge=1)


@dataclass
class RouterConfig:
    score_function: str = key(
        ScoreFunction.softmax.value,
        "Maps router logits to scores.",
        table="router_scores",
        renamed_from=("scoring_func", "score_func", "moe_router_score_function"),
    )
    normalize_topk: bool = key(
        True, "Divide the top-k weights by their sum.", renamed_from=("norm_topk_prob", "route_norm")
    )
    scale: float = key(
        1.0,
        "Multiplies the top-k weights after normalization.",
        gt=0,
        le=MAX_FACTOR,
        renamed_from=("routed_scaling_factor", "route_scale"),
    )
    num_groups: int = key(
        1, "Expert groups for group-limited routing.", ge=1, renamed_from=("n_group", "num_expert_groups")
    )
    top_k_groups: int = key(1, "Groups a token may reach.", ge=1, renamed_from=("topk_group", "num_limited_groups"))
    input_jitter: float = key(
        0.0,
        "In training, the gate's input is multiplied by uniform noise in 1 +- this.",
        ge=0,
        lt=1,
        architecture=False,
        renamed_from=("router_jitter_noise", "moe_jitter_eps"),
    )
    assignment: Assignment = key(
        Assignment.scores, "Which experts a token gets: the best by score, or for benchmarks all of them in turn."
    )


@dataclass
class BalanceConfig:
    aux_loss_weight: float = key(
        0.01,
        "Weight of the load-balance loss.",
        ge=0,
        le=MAX_FACTOR,
        renamed_from=("router_aux_loss_coef", "aux_loss_alpha", "moe_loss_weight"),
    )
    aux_loss_scope: AuxLossScope = key(
        AuxLossScope.sequence, "Tokens over which the load-balance loss takes its means."
    )
    z_loss_weight: float = key(
        0.001,
        "Weight of the router z-loss.",
        ge=0,
        le=MAX_FACTOR,
        renamed_from=("router_z_loss_coef", "moe_zloss_weight"),
    )
    bias_update_rate: float = key(
        0.0,
        "Step of the auxiliary-loss-free expert bias; 0 leaves it alone.",
        ge=0,
        renamed_from=("load_balance_coeff", "bias_update_speed"),
    )
    bias_freeze_at: str | None = key(None, "When the expert bias stops changing.", pattern=INTERVAL)


@dataclass
class MoEConfig:
    num_experts: int = key(
        16,
        "Routed experts of each MoE layer.",
        ge=1,
        renamed_from=("n_routed_experts", "num_local_experts", "moe_num_experts"),
    )
    top_k: int = key(
        2,
        "Routed experts of each token.",
        ge=1,
        renamed_from=("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k"),
    )
    expert_hidden_size: int = key(
        256,
        "Hidden width of one routed expert.",
        ge=1,
        renamed_from=("moe_intermediate_size", "intermediate_size", "moe_inter_dim"),
    )
    num_shared_experts: int = key(
        1, "Experts that see every token (one FFN of this many widths).", ge=0, renamed_from=("n_shared_experts",)
    )
    router: RouterConfig = key(RouterConfig, "Routing.", table="router_scores", tag="score_function")
    balance: BalanceConfig = key(BalanceConfig, "Load balancing.", architecture=False)
    capacity_factor: float | None = key(
        None,
        "An expert takes at most this times its even share of a micro-batch, best scores first; null is dropless.",
        gt=0,
        architecture=False,
        renamed_from=("moe_capacity_factor", "expert_capacity_factor"),
    )
    backend: ExpertBackend = key(
        ExpertBackend.auto,
        "How experts multiply; auto takes the fastest for the device, dtype and size, loop is the plain oracle, "
        "megablocks is block-sparse.",
        free_on_resume=True,
        architecture=False,
        renamed_from=("mlp_impl", "experts_implementation"),
    )

    @property
    def has_expert_bias(self) -> bool:
        """Whether routers have a bias for the choice of experts."""
        return self.router.score_function == ScoreFunction.sigmoid or self.balance.bias_update_rate > 0

    @property
    def group_votes(self) -> int:
        """How many of a group's best experts its score is the sum of: as in DeepSeek's published code, two where there
        is a bias (DeepSeek-V3), else one (DeepSeek-V2)."""
        return 2 if self.has_expert_bias else 1


@dataclass
class MtpConfig:
    depth: int = key(
        0, "Multi-token-prediction modules.", ge=0, renamed_from=("num_nextn_predict_layers", "num_mtp_modules")
    )
    loss_weight: float = key(0.3, "Weight of the multi-token-prediction loss.", ge=0, le=MAX_FACTOR, architecture=False)


@dataclass
class ModelConfig:
    name: str = key("moe_causal_lm", "The model family.", available=("moe_causal_lm",))
    vocab_size: int = key(
        4096, "Rows of the embedding; at least the tokenizer's vocabulary.", ge=2, renamed_from=("padded_vocab_size",)
    )
    d_model: int = key(256, "Width of the residual stream.", ge=1, renamed_from=("hidden_size", "n_embd", "dim"))
    n_layers: int = key(6, "Transformer blocks.", ge=1, renamed_from=("num_hidden_layers", "num_layers", "n_layer"))
    n_dense_layers: int = key(
        1, "How many of the first blocks use a dense FFN.", ge=0, renamed_from=("first_k_dense_replace",)
    )
    dense_layers: list[int] = key(
        list, "Further blocks (from 0) that use a dense FFN.", ge=0, renamed_from=("mlp_only_layers",)
    )
    ffn_hidden_size: int = key(
        1024,
        "Hidden width of the dense FFN.",
        ge=1,
        renamed_from=("intermediate_size", "inter_dim"),
        instead_of={"expansion_ratio": "the width itself, model.ffn_hidden_size, is given"},
    )
    norm: NormConfig = key(NormConfig, "Normalization.", renamed_from=("norm_config",))
    tie_embeddings: bool = key(
        False, "Use the embedding as the output head.", renamed_from=("tie_word_embeddings", "enable_weight_tying")
    )
    init: InitConfig = key(InitConfig, "Initial weights.", architecture=False, renamed_from=("init_config",))
    attention: AttentionConfig = key(
        GqaConfig, "Attention.", variants={"gqa": GqaConfig, "mla": MlaConfig}, renamed_from=("attn_config",)
    )
    document_masking: bool = key(
        False,
        "A token sees its own document alone, not all before it in the sequence.",
        architecture=False,
        renamed_from=("attn_uses_sequence_id",),
    )
    moe: MoEConfig = key(MoEConfig, "Mixture of experts.", renamed_from=("ffn_config", "moe_args"))
    mtp: MtpConfig = key(MtpConfig, "Multi-token prediction.")
