"""Parameters of a recipe's model by name and shape, read off its keys: nothing is built, and torch is not imported.

Names, shapes and order are those of the modules, and what trains is what training lets train; tests compare all of it
with the modules. Only an attention kind of another package must be built to be known, on meta.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from moefoundry.config import (
    AttentionBias,
    ConfigError,
    GqaConfig,
    IndexerConfig,
    IndexerStage,
    LinearAttentionConfig,
    LoraConfig,
    MlaConfig,
    ModelConfig,
    NormPosition,
    QkNorm,
)
from moefoundry.config.lora_rules import target_problems

EXPERTS, ROUTER, MAGNITUDE, EMBEDDING = "ffn.experts", "ffn.router", "magnitude", "embed_tokens"


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        name: Name in the module that it was listed for.
        shape: Its shape; of an expert's, the first dim counts experts.
        linear: It is the weight of a linear layer.
        trained: It trains.
    """

    name: str
    shape: tuple[int, ...]
    linear: bool = False
    trained: bool = True

    @property
    def numel(self) -> int:
        """Count its elements."""
        return prod(self.shape)

    @property
    def of_experts(self) -> bool:
        """Tell if it is stacked, one slice for each routed expert."""
        return self.name.startswith(f"{EXPERTS}.")

    @property
    def of_embedding(self) -> bool:
        """Tell if it embeds the tokens."""
        return self.name.startswith(EMBEDDING)

    @property
    def of_indexer(self) -> bool:
        """Tell if it is one of those that choose the keys of sparse attention."""
        return ".indexer." in self.name

    @property
    def wide_module(self) -> str | None:
        """Name the module around it whose parameters stay in fp32 in every compute dtype; None if there is none."""
        module = self.name.rpartition(".")[0]
        if self.name.startswith(f"{ROUTER}."):
            return ROUTER
        if self.of_indexer:
            return module
        return module if module.rpartition(".")[2] in ("decay", MAGNITUDE) else None


def block_weights(cfg: ModelConfig, index: int, lora: LoraConfig | None = None) -> list[Weight]:
    """List the parameters of the block ``index``; those of multi-token prediction come behind all.

    With ``lora`` the block's weights are frozen, and adapters are beside them.
    """
    found = [*_norm(cfg, "attention_norm"), *_prefixed("attention", _attention(cfg, index)), *_norm(cfg, "ffn_norm")]
    if cfg.norm.position == NormPosition.both:
        found += [*_norm(cfg, "attention_post_norm"), *_norm(cfg, "ffn_post_norm")]
    found += _prefixed("ffn", _dense(cfg.d_model, cfg.dense_width) if cfg.is_dense(index) else _moe(cfg))
    if lora is None:
        return [replace(weight, trained=weight.of_indexer) for weight in found] if _indexers_alone(cfg) else found
    return list(_frozen(found) if index >= cfg.n_layers else _adapted(found, cfg.is_dense(index), lora))


def all_blocks(cfg: ModelConfig, lora: LoraConfig | None = None) -> list[Sequence[Weight]]:
    """List the parameters of every block, those of multi-token prediction last; equal blocks share a list."""
    kinds: dict[tuple[bool, bool, bool], Sequence[Weight]] = {}
    blocks = []
    for index in range(cfg.n_layers + cfg.mtp.depth):
        kind = cfg.is_dense(index), cfg.is_linear(index), index < cfg.n_layers
        if kind not in kinds:
            kinds[kind] = block_weights(cfg, index, lora)
        blocks.append(kinds[kind])
    return blocks


def mtp_weights(cfg: ModelConfig) -> list[Weight]:
    """List the parameters of a module of multi-token prediction, without its block."""
    proj = Weight("proj.weight", (cfg.d_model, 2 * cfg.d_model), linear=True)
    found = [*_norm(cfg, "embedding_norm"), *_norm(cfg, "hidden_norm"), proj, *_norm(cfg, "norm")]
    return [*_frozen(found)] if _indexers_alone(cfg) else found


def root_weights(cfg: ModelConfig) -> list[Weight]:
    """List the parameters outside of blocks; a tied embedding is there once."""
    embedding = Weight(f"{EMBEDDING}.weight", (cfg.vocab_size, cfg.d_model))
    head = [] if cfg.tie_embeddings else [Weight("lm_head.weight", embedding.shape, linear=True)]
    if cfg.head_bias:
        head.append(Weight("lm_head.bias", (cfg.vocab_size,)))
    found = [embedding, *_norm(cfg, "norm"), *head]
    return [*_frozen(found)] if _indexers_alone(cfg) else found


def named_weights(cfg: ModelConfig, lora: LoraConfig | None = None) -> Iterator[tuple[str, Weight]]:
    """Yield every parameter of the model with its full name."""
    further = [replace(weight, trained=weight.trained and lora is None) for weight in mtp_weights(cfg)]
    for weight in root_weights(cfg):
        yield weight.name, replace(weight, trained=weight.trained and lora is None)
    for index, block in enumerate(all_blocks(cfg, lora)):
        depth = index - cfg.n_layers
        prefix = f"layers.{index}" if depth < 0 else f"mtp.{depth}.block"
        yield from ((f"{prefix}.{weight.name}", weight) for weight in block)
        yield from ((f"mtp.{depth}.{weight.name}", weight) for weight in further if depth >= 0)


def module_names(cfg: ModelConfig) -> set[str]:
    """Collect the names of all modules of the model, as its own ``named_modules`` gives them."""
    found = {"", "layers", "mtp", "lm_head"}
    for name, _ in named_weights(cfg):
        parts = name.split(".")
        found |= {".".join(parts[:length]) for length in range(1, len(parts))}
        if (
            isinstance(cfg.attention, MlaConfig)
            and cfg.attention.indexer is not None
            and name.endswith("q_a_proj.weight")
        ):
            found.add(name.replace("q_a_proj.weight", "indexer"))
    return found


def check_targets(cfg: ModelConfig, lora: LoraConfig) -> None:
    """Refuse targets of adapters that the model lacks.

    Raises:
        ConfigError: A target names no weight of the model, or none of them names any.
    """
    known: set[str] = set()
    for index in range(cfg.n_layers):
        for weight in block_weights(cfg, index):
            if (place := _place(weight, cfg.is_dense(index))) is not None:
                known |= {place[0], ".".join(place)}
    if problems := target_problems(lora, known):
        raise ConfigError(problems)


def _prefixed(prefix: str, weights: Iterable[Weight]) -> Iterator[Weight]:
    return (replace(weight, name=f"{prefix}.{weight.name}") for weight in weights)


def _frozen(weights: Iterable[Weight]) -> Iterator[Weight]:
    return (replace(weight, trained=False) for weight in weights)


def _indexers_alone(cfg: ModelConfig) -> bool:
    """Tell if nothing trains but what chooses the keys of sparse attention."""
    indexer = cfg.attention.indexer if isinstance(cfg.attention, MlaConfig) else None
    return indexer is not None and indexer.stage == IndexerStage.warm_up


def _norm(cfg: ModelConfig, name: str) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (cfg.d_model,))
    if cfg.norm.bias:
        yield Weight(f"{name}.bias", (cfg.d_model,))


def _linear(name: str, rows: int, columns: int, bias: bool = False) -> Iterator[Weight]:
    yield Weight(f"{name}.weight", (rows, columns), linear=True)
    if bias:
        yield Weight(f"{name}.bias", (rows,))


def _dense(width: int, hidden: int) -> Iterator[Weight]:
    yield from _linear("gate_proj", hidden, width)
    yield from _linear("up_proj", hidden, width)
    yield from _linear("down_proj", width, hidden)


def _moe(cfg: ModelConfig) -> Iterator[Weight]:
    moe, width, hidden = cfg.moe, cfg.d_model, cfg.moe.expert_hidden_size
    yield from _linear("router.gate", moe.num_experts, width, moe.router.gate_bias)
    for name, rows, columns in (("gate", hidden, width), ("up", hidden, width), ("down", width, hidden)):
        yield Weight(f"experts.{name}_proj", (moe.num_experts, rows, columns))
    for name, rows in (("gate", hidden), ("up", hidden), ("down", width)):
        if moe.projection_bias:
            yield Weight(f"experts.{name}_proj_bias", (moe.num_experts, rows))
    if moe.num_shared_experts:
        yield from _prefixed("shared_experts", _dense(width, moe.num_shared_experts * hidden))
    if moe.shared_expert_gate:
        yield from _linear("shared_gate", 1, width)


def _attention(cfg: ModelConfig, index: int) -> Iterator[Weight]:
    if cfg.is_linear(index):
        assert cfg.linear_attention is not None, "a block has linear attention only where the recipe declares it"
        return _linear_attention(cfg.linear_attention, cfg.d_model)
    attention = cfg.attention
    if attention.kind == "gqa" and isinstance(attention, GqaConfig):
        return _grouped_query(attention, cfg.d_model)
    if attention.kind == "mla" and isinstance(attention, MlaConfig):
        return _latent(attention, cfg.d_model)
    return _built(cfg)


def _grouped_query(cfg: GqaConfig, width: int) -> Iterator[Weight]:
    queries, keys = cfg.projection_widths(width)
    bias = cfg.bias != AttentionBias.none
    if cfg.sinks:
        yield Weight("sinks", (cfg.n_heads,))
    yield from _linear("q_proj", queries * (2 if cfg.output_gate else 1), width, bias)
    yield from _linear("k_proj", keys, width, bias)
    yield from _linear("v_proj", keys, width, bias)
    yield from _linear("o_proj", width, queries, cfg.bias == AttentionBias.all)
    if cfg.qk_norm != QkNorm.none:
        head = cfg.head_width(width)
        yield Weight("q_norm.weight", (queries if cfg.qk_norm == QkNorm.full else head,))
        yield Weight("k_norm.weight", (keys if cfg.qk_norm == QkNorm.full else head,))


def _latent(cfg: MlaConfig, width: int) -> Iterator[Weight]:
    queries = cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim)
    if cfg.sinks:
        yield Weight("sinks", (cfg.n_heads,))
    if cfg.q_lora_rank is None:
        yield from _linear("q_proj", queries, width)
    else:
        yield from _linear("q_a_proj", cfg.q_lora_rank, width)
        yield Weight("q_a_norm.weight", (cfg.q_lora_rank,))
        yield from _linear("q_b_proj", queries, cfg.q_lora_rank)
        if cfg.indexer is not None and cfg.indexer.stage != IndexerStage.frozen:
            yield from _prefixed("indexer", _indexer(cfg.indexer, width, cfg.q_lora_rank))
    yield from _linear("kv_a_proj", cfg.kv_lora_rank + cfg.qk_rope_head_dim, width)
    yield Weight("kv_a_norm.weight", (cfg.kv_lora_rank,))
    yield from _linear("kv_b_proj", cfg.n_heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.kv_lora_rank)
    yield from _linear("o_proj", width, cfg.n_heads * cfg.v_head_dim)


def _indexer(cfg: IndexerConfig, width: int, query_rank: int) -> Iterator[Weight]:
    yield Weight("q_proj", (cfg.n_heads * cfg.head_dim, query_rank))
    yield Weight("k_proj", (cfg.head_dim, width))
    yield from (Weight("k_norm_weight", (cfg.head_dim,)), Weight("k_norm_bias", (cfg.head_dim,)))
    yield Weight("head_proj", (cfg.n_heads, width))


def _linear_attention(cfg: LinearAttentionConfig, width: int) -> Iterator[Weight]:
    keys, values, heads = cfg.n_key_heads * cfg.key_head_dim, cfg.n_value_heads * cfg.value_head_dim, cfg.n_value_heads
    yield from _linear("qkv_proj", 2 * keys + values, width)
    yield from _linear("gate_proj", values, width)
    yield from _linear("beta_proj", heads, width)
    yield from _linear("decay_proj", heads, width)
    yield from (Weight("decay.A_log", (heads,)), Weight("decay.dt_bias", (heads,)))
    yield Weight("conv.weight", (2 * keys + values, 1, cfg.conv_width))
    yield Weight("head_norm.weight", (cfg.value_head_dim,))
    yield from _linear("o_proj", width, values)


def _built(cfg: ModelConfig) -> Iterator[Weight]:
    """List the parameters of an attention kind that another package has."""
    import torch
    from torch import nn

    from moefoundry.model.attention import build_attention

    with torch.device("meta"):
        attention = build_attention(cfg)
    linear = {f"{name}.weight" for name, module in attention.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in attention.named_parameters():
        yield Weight(name, tuple(parameter.shape), name in linear)


def _adapted(weights: Iterable[Weight], dense: bool, cfg: LoraConfig) -> Iterator[Weight]:
    """Freeze a block's weights, and add the adapters behind them."""
    for weight in weights:
        yield replace(weight, trained=cfg.train_router and weight.name == f"{ROUTER}.gate.weight")
        if (place := _place(weight, dense)) is None or not {place[0], ".".join(place)} & set(cfg.targets):
            continue
        *experts, rows, columns = weight.shape
        module = weight.name.removesuffix(".weight")
        name = f"{EXPERTS}.lora.{place[1]}" if weight.of_experts else f"{module}.lora"
        yield Weight(f"{name}.a", (*experts, cfg.rank, columns))
        yield Weight(f"{name}.b", (*experts, rows, cfg.rank))
        if cfg.dora and not weight.of_experts:
            yield Weight(f"{name}.{MAGNITUDE}.weight", (rows,))


def _place(weight: Weight, dense: bool) -> tuple[str, str] | None:
    """Give the group of ``lora.targets`` that a weight is in, and its name there; None if it can have no adapter."""
    if weight.of_experts:
        return ("experts", weight.name.removeprefix(f"{EXPERTS}.")) if len(weight.shape) == 3 else None
    groups = {"attention.": "attention", "ffn.": "dense"} if dense else {"attention.": "attention"}
    groups["ffn.shared_experts."] = "shared_experts"
    for prefix, group in groups.items():
        if weight.linear and weight.name.startswith(prefix):
            return group, weight.name.removeprefix(prefix).removesuffix(".weight")
    return None
