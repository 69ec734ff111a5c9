"""The recipe's ``model``, by the rules of :mod:`moefoundry.config.schema`.

A key that joins ``model`` also goes into :mod:`moefoundry.config.versions`, so that older checkpoints can be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moefoundry.config.field import INTERVAL, MAX_BLOCKS, MAX_EXPERTS, MAX_FACTOR, REQUIRED, key
from moefoundry.config.schema_attention import AttentionConfig, GqaConfig
from moefoundry.config.schema_linear_attention import LinearAttentionConfig
from moefoundry.config.schema_norm import NormConfig


class ScoreFunction(StrEnum):
    """The package's own router scores."""

    softmax = "softmax"
    sigmoid = "sigmoid"


class Assignment(StrEnum):
    """Ways to choose the experts of a token."""

    scores = "scores"
    uniform = "uniform"


class Dispatcher(StrEnum):
    """Ways to bring tokens to experts on other ranks."""

    all_to_all = "all_to_all"
    deepep = "deepep"


class AuxLossScope(StrEnum):
    """Tokens over which the load-balance loss takes its means."""

    sequence = "sequence"
    micro_batch = "micro_batch"
    global_batch = "global_batch"


@dataclass
class InitConfig:
    """Initial weights."""

    std: float = key(
        0.02,
        "Standard deviation of every weight matrix; norms start at 1.",
        gt=0,
        le=100,
        renamed_from=("initializer_range", "init_std", "init_method_std"),
    )


@dataclass
class RouterConfig:
    """Choice of experts and their weights."""

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
        renamed_from=("routed_scaling_factor", "route_scale", "moe_router_topk_scaling_factor"),
    )
    num_groups: int = key(
        1,
        "Expert groups for group-limited routing.",
        ge=1,
        renamed_from=("n_group", "num_expert_groups", "moe_router_num_groups"),
        instead_of={"topk_method": "groups are chosen by num_groups and top_k_groups, a bias by bias_update_rate"},
    )
    top_k_groups: int = key(
        1, "Groups a token may reach.", ge=1, renamed_from=("topk_group", "num_limited_groups", "moe_router_group_topk")
    )
    input_jitter: float = key(
        0.0,
        "In training, the gate's input is multiplied by uniform noise in 1 +- this.",
        ge=0,
        lt=1,
        architecture=False,
        renamed_from=("router_jitter_noise", "moe_jitter_eps", "moe_input_jitter_eps"),
    )
    assignment: Assignment = key(
        Assignment.scores, "Which experts a token gets: the best by score, or for benchmarks all of them in turn."
    )
    gate_bias: bool = key(
        False, "The gate has a learned bias, which changes scores and weights; not that of bias_update_rate."
    )

    @property
    def draws(self) -> bool:
        """True where training draws random numbers."""
        return self.input_jitter > 0


@dataclass
class BalanceConfig:
    """Load balancing of experts."""

    aux_loss_weight: float = key(
        0.01,
        "Weight of the load-balance loss.",
        ge=0,
        le=MAX_FACTOR,
        renamed_from=("router_aux_loss_coef", "aux_loss_alpha", "moe_loss_weight", "moe_aux_loss_coeff"),
    )
    aux_loss_scope: AuxLossScope = key(
        AuxLossScope.sequence,
        "Tokens over which the load-balance loss takes its means.",
        instead_of={"seq_aux": "model.moe.balance.aux_loss_scope=sequence says so"},
    )
    z_loss_weight: float = key(
        0.001,
        "Weight of the router z-loss.",
        ge=0,
        le=MAX_FACTOR,
        renamed_from=("router_z_loss_coef", "moe_zloss_weight", "moe_z_loss_coeff"),
    )
    bias_update_rate: float = key(
        0.0,
        "Step of the auxiliary-loss-free expert bias; 0 leaves it alone.",
        ge=0,
        renamed_from=("load_balance_coeff", "bias_update_speed", "moe_router_bias_update_rate"),
    )
    bias_freeze_at: str | None = key(None, "When the expert bias stops changing.", pattern=INTERVAL)


@dataclass
class MoEConfig:
    """Mixture of experts."""

    num_experts: int = key(
        REQUIRED,
        "Routed experts of each MoE layer.",
        customary="64 to 256 narrow ones, or 8 or 16 wide ones",
        ge=1,
        le=MAX_EXPERTS,
        renamed_from=("n_routed_experts", "num_local_experts", "moe_num_experts"),
    )
    top_k: int = key(
        REQUIRED,
        "Routed experts of each token.",
        customary="8 of 64 to 256 experts, 2 of 8",
        ge=1,
        renamed_from=(
            "num_experts_per_tok",
            "num_experts_per_token",
            "experts_per_token",
            "moe_top_k",
            "moe_router_topk",
        ),
    )
    expert_hidden_size: int = key(
        REQUIRED,
        "Hidden width of one routed expert.",
        customary="d_model / 4 to d_model / 2 for narrow experts, 3.5 * d_model for wide ones",
        ge=1,
        renamed_from=("moe_intermediate_size", "intermediate_size", "moe_inter_dim", "moe_ffn_hidden_size"),
    )
    num_shared_experts: int = key(
        0,
        "Experts that see every token (one FFN of this many widths).",
        ge=0,
        renamed_from=("n_shared_experts",),
        instead_of=dict.fromkeys(
            ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
            "shared experts are as wide as routed ones; model.moe.num_shared_experts counts them",
        ),
    )
    shared_expert_gate: bool = key(
        False, "Multiply the shared experts' output by the sigmoid of a linear map of the token."
    )
    projection_bias: bool = key(
        False, "Routed experts have biases of gate, up and down; balancing has another (bias_update_rate)."
    )
    router: RouterConfig = key(RouterConfig, "Routing.", table="router_scores", tag="score_function")
    balance: BalanceConfig = key(BalanceConfig, "Load balancing.", architecture=False)
    capacity_factor: float | None = key(
        None,
        "An expert takes at most this times its even share of a micro-batch, best scores first; null is dropless.",
        gt=0,
        architecture=False,
        renamed_from=("moe_capacity_factor", "expert_capacity_factor", "moe_expert_capacity_factor"),
    )
    backend: str = key(
        "auto",
        "How experts are computed; auto takes the fastest for the device, dtype and size, loop is the plain oracle, "
        "megablocks is block-sparse, quack needs the package of that name.",
        table="mixture_backends",
        free_on_resume=True,
        architecture=False,
        renamed_from=("mlp_impl", "experts_implementation"),
    )
    dispatcher: Dispatcher = key(
        Dispatcher.all_to_all,
        "Brings tokens to experts on other ranks: all_to_all, or by DeepEP's kernels, if its package is installed.",
        free_on_resume=True,
        architecture=False,
        other_values={"alltoall": "all_to_all", "flex": "deepep"},
        renamed_from=("moe_token_dispatcher_type",),
    )
    dispatch_chunks: int = key(
        1,
        "In training, tokens go to experts on other ranks in so many chunks: one travels while another is computed.",
        ge=1,
        le=64,
        free_on_resume=True,
        architecture=False,
    )

    @property
    def has_expert_bias(self) -> bool:
        """True where routers have a bias for the choice of experts."""
        return self.router.score_function == ScoreFunction.sigmoid or self.balance.bias_update_rate > 0

    @property
    def group_votes(self) -> int:
        """Number of a group's best experts whose scores make its own.

        As in DeepSeek's published code: two where there is a bias (DeepSeek-V3), else one (DeepSeek-V2).
        """
        return 2 if self.has_expert_bias else 1


@dataclass
class MtpConfig:
    """Multi-token prediction."""

    depth: int = key(
        0,
        "Multi-token-prediction modules.",
        ge=0,
        le=MAX_BLOCKS,
        renamed_from=("num_nextn_predict_layers", "num_mtp_modules"),
    )
    loss_weight: float = key(0.3, "Weight of the multi-token-prediction loss.", ge=0, le=MAX_FACTOR, architecture=False)


@dataclass
class MultipliersConfig:
    """Constant factors; 1 changes nothing."""

    embedding: float = key(
        1.0, "Multiplies the embeddings.", gt=0, le=MAX_FACTOR, renamed_from=("embedding_multiplier",)
    )
    residual: float = key(
        1.0,
        "Multiplies what attention and FFN add to the residual stream.",
        gt=0,
        le=MAX_FACTOR,
        renamed_from=("residual_multiplier",),
    )
    logits_divisor: float = key(
        1.0, "Divides the logits.", gt=0, le=MAX_FACTOR, renamed_from=("logits_scaling", "logit_scale")
    )


@dataclass
class SwigluConfig:
    """The activation of every FFN, ``g * sigmoid(alpha * g) * (u + offset)`` of a clamped gate g and up u."""

    alpha: float = key(
        1.0, "Factor of the gate inside its sigmoid.", gt=0, le=MAX_FACTOR, renamed_from=("swiglu_alpha",)
    )
    limit: float | None = key(
        None,
        "Largest gate, and largest magnitude of up; null clamps nothing.",
        gt=0,
        renamed_from=("swiglu_limit",),
    )
    offset: float = key(0.0, "Added to up.", ge=-MAX_FACTOR, le=MAX_FACTOR)


@dataclass
class ModelConfig:
    """The model."""

    name: str = key("moe_causal_lm", "The model family.", available=("moe_causal_lm",))
    vocab_size: int = key(
        REQUIRED,
        "Rows of the embedding; at least the tokenizer's vocabulary.",
        customary="the tokenizer's vocabulary, rounded up to a multiple of 128",
        ge=2,
        renamed_from=("padded_vocab_size",),
    )
    d_model: int = key(
        REQUIRED,
        "Width of the residual stream.",
        customary="2048 for 7 to 30B parameters, 4096 for 50B, 7168 for 670B",
        ge=1,
        renamed_from=("hidden_size", "n_embd", "dim"),
    )
    n_layers: int = key(
        REQUIRED,
        "Transformer blocks.",
        customary="16 for 7B parameters, 32 to 48 for 30 to 50B, 61 for 670B",
        ge=1,
        le=MAX_BLOCKS,
        renamed_from=("num_hidden_layers", "num_layers", "n_layer"),
    )
    n_dense_layers: int = key(
        0, "How many of the first blocks use a dense FFN.", ge=0, renamed_from=("first_k_dense_replace",)
    )
    dense_layers: list[int] = key(
        list,
        "Further blocks (from 0) that use a dense FFN.",
        ge=0,
        renamed_from=("mlp_only_layers",),
        instead_of=dict.fromkeys(
            ("decoder_sparse_step", "moe_layer_freq"),
            "model.n_dense_layers and model.dense_layers say which blocks are dense",
        ),
    )
    ffn_hidden_size: int | None = key(
        None,
        "Hidden width of the dense FFN; null where no block has one.",
        customary="expert_hidden_size * (top_k + num_shared_experts), the work of an MoE block",
        ge=1,
        renamed_from=("intermediate_size", "inter_dim"),
        instead_of={
            "expansion_ratio": "the width itself, model.ffn_hidden_size, is given",
            "hidden_act": "every FFN is a SwiGLU, whose constants are in model.swiglu",
        },
    )
    swiglu: SwigluConfig = key(SwigluConfig, "Activation of every FFN; the defaults are plain SwiGLU.")
    norm: NormConfig = key(
        NormConfig,
        "Normalization.",
        renamed_from=("norm_config",),
        instead_of=dict.fromkeys(
            ("attention_dropout", "attn_pdrop", "resid_pdrop", "emb_pdrop"), "there is no dropout"
        ),
    )
    tie_embeddings: bool = key(
        False,
        "Use the embedding as the output head.",
        renamed_from=("tie_word_embeddings", "enable_weight_tying"),
        instead_of={"untie_embeddings_and_output_weights": "model.tie_embeddings says the opposite"},
    )
    head_bias: bool = key(False, "The output head has a bias.", renamed_from=("lm_head_bias",))
    init: InitConfig = key(InitConfig, "Initial weights.", architecture=False, renamed_from=("init_config",))
    attention: AttentionConfig = key(GqaConfig, "Attention.", table="attention_kinds", renamed_from=("attn_config",))
    linear_attention: LinearAttentionConfig | None = key(
        None, "Linear attention in some of the blocks; null has model.attention in all."
    )
    document_masking: bool = key(
        False,
        "A token sees its own document alone, not all before it in the sequence.",
        architecture=False,
        renamed_from=("attn_uses_sequence_id",),
    )
    multipliers: MultipliersConfig = key(MultipliersConfig, "Constant factors.")
    moe: MoEConfig = key(MoEConfig, "Mixture of experts.", renamed_from=("ffn_config", "moe_args"))
    mtp: MtpConfig = key(MtpConfig, "Multi-token prediction.")

    @property
    def dense_width(self) -> int:
        """Hidden width of the dense FFN, of a model that has one."""
        assert self.ffn_hidden_size is not None, "checked with the recipe"
        return self.ffn_hidden_size

    def is_dense(self, index: int) -> bool:
        """Tell if the block ``index`` has a dense FFN."""
        return index < self.n_dense_layers or index in self.dense_layers

    def is_linear(self, index: int) -> bool:
        """Tell if the block ``index`` has linear attention; those of multi-token prediction, behind all, have not."""
        return self.linear_attention is not None and index < self.n_layers and self.linear_attention.is_linear(index)
