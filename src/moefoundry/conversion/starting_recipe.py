"""Recipes to start from: for a family's published model, a Hugging Face config, sizes, or imported weights.

Rate, batch, length and warm-up follow from the active parameters by the rules below, which go through what OLMoE (1.3B
active), Mixtral (13B) and DeepSeek-V3 (37B) were published with. Every line of a recipe has a comment. Nothing here
reads or writes files, or imports torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from moefoundry.config import (
    AuxLossScope,
    BalanceConfig,
    GqaConfig,
    MlaConfig,
    ModelConfig,
    MoEConfig,
    QkNorm,
    UserError,
)
from moefoundry.config.dump import scalar
from moefoundry.config.spec import every_key, join, plain, specs
from moefoundry.conversion.families import Family
from moefoundry.conversion.families.family import dense_layers, with_fewest_window_keys

TRAINED_LENGTH = 4096  # tokens of a sequence in pre-training, whatever length the model was extended to
SHOWN = re.compile(
    r"model\.(norm|init|moe\.balance)\.|model\.(n_dense_layers|tie_embeddings|moe\.num_shared_experts)$"
    r"|model\.attention\.(kind|rope_theta|.*_dim|.*_rank)$|model\.moe\.router\.(score_function|normalize_topk)$"
)
"""Keys of the model that are written although they have their defaults."""
COLUMN = 58  # of the comments, where a line is not longer
Comments = Mapping[str, tuple[Any, str]]


@dataclass(frozen=True)
class Size:
    """Parameters of a model, without norms, biases and multi-token prediction.

    Attributes:
        total: All of them.
        active: Those that a token meets.
    """

    total: int
    active: int

    @classmethod
    def of(cls, cfg: ModelConfig) -> Size:
        """Compute the size of a model, in closed form."""
        width, dense = cfg.d_model, len(dense_layers(cfg))
        sparse, expert = cfg.n_layers - dense, 3 * width * cfg.moe.expert_hidden_size
        shared = sparse * (width * cfg.moe.num_experts + cfg.moe.num_shared_experts * expert)
        linear = sum(map(cfg.is_linear, range(cfg.n_layers)))
        other = (
            (cfg.n_layers - linear) * _attention(cfg)
            + linear * _linear_attention(cfg)
            + dense * 3 * width * (cfg.ffn_hidden_size or 0)
            + shared
        )
        other += cfg.vocab_size * width * (1 if cfg.tie_embeddings else 2)
        return cls(other + sparse * cfg.moe.num_experts * expert, other + sparse * cfg.moe.top_k * expert)


def _attention(cfg: ModelConfig) -> int:
    """Weights of one attention."""
    width, attention = cfg.d_model, cfg.attention
    if isinstance(attention, MlaConfig):
        heads, query = attention.n_heads, attention.qk_nope_head_dim + attention.qk_rope_head_dim
        rank, q_rank = attention.kv_lora_rank, attention.q_lora_rank
        queries = width * heads * query if q_rank is None else q_rank * (width + heads * query)
        keys = width * (rank + attention.qk_rope_head_dim) + rank * heads * (
            attention.qk_nope_head_dim + attention.v_head_dim
        )
        return queries + keys + heads * attention.v_head_dim * width
    assert isinstance(attention, GqaConfig)
    head, gates = attention.head_dim or width // attention.n_heads, attention.n_heads if attention.output_gate else 0
    return width * head * (2 * attention.n_heads + 2 * attention.n_kv_heads + gates)


def _linear_attention(cfg: ModelConfig) -> int:
    """Weights of one linear attention."""
    linear = cfg.linear_attention
    if linear is None:
        return 0
    keys, values = linear.n_key_heads * linear.key_head_dim, linear.n_value_heads * linear.value_head_dim
    return cfg.d_model * (2 * keys + 3 * values + 2 * linear.n_value_heads) + (2 * keys + values) * linear.conv_width


# ------------------------------------------------------------------------------------------------------- the rules


def peak_rate(active: int) -> float:
    """Learning rate of pre-training: 4e-4 at 1.3B active parameters, falling with their fifth root; two digits."""
    return float(f"{4e-4 * (1.3e9 / active) ** 0.2:.1e}")


def batch_sequences(active: int, max_seq_len: int) -> int:
    """Sequences of a global batch in pre-training: the nearest power of 2, at least 8.

    The batch has 4M tokens at 1.3B active parameters, and grows with their square root.
    """
    return int(max(8, 2 ** round(math.log2(4.2e6 * (active / 1.3e9) ** 0.5 / max_seq_len))))


def _pretraining(size: Size, max_seq_len: int) -> Comments:
    sequences = batch_sequences(size.active, max_seq_len)
    tokens = int(float(f"{100 * size.active:.1e}"))
    warmup = min(2000 * sequences * max_seq_len, tokens // 20)
    return {
        "optimizer.lr": (
            peak_rate(size.active),
            "rule: 4e-4 at 1.3B active parameters, falling with their fifth root",
        ),
        "scheduler.t_warmup": (f"{warmup}tok", "rule: 2000 batches, or a twentieth of the run if that is less"),
        "scheduler.alpha_f": (0.1, "the cosine ends at a tenth of the peak"),
        "max_duration": (f"{tokens}tok", "rule: 100 tokens for each active parameter; 20 is the least that pays"),
        "global_train_batch_size": (
            sequences,
            f"rule: {_short(sequences * max_seq_len)} tokens; 4M at 1.3B active parameters, with their root",
        ),
        "eval_interval": ("1000ba", "time between evaluations"),
        "save_interval": ("1000ba", "time between checkpoints"),
    }


def _continued(size: Size, max_seq_len: int) -> Comments:
    sequences = max(8, batch_sequences(size.active, max_seq_len) // 8)
    return {
        "optimizer.lr": (
            float(f"{peak_rate(size.active) / 10:.1e}"),
            "rule: a tenth of the pre-training rate, where a cosine schedule left the weights",
        ),
        "scheduler.t_warmup": ("0.03dur", "rule: 3% of the run, for the moments begin at zero"),
        "scheduler.alpha_f": (0.1, "the cosine ends at a tenth of the peak"),
        "max_duration": ("1ep", "rule: once over the data"),
        "global_train_batch_size": (
            sequences,
            f"rule: {_short(sequences * max_seq_len)} tokens, an eighth of a pre-training batch",
        ),
        "eval_interval": ("100ba", "time between evaluations; such runs are short"),
        "save_interval": ("100ba", "time between checkpoints"),
    }


# ---------------------------------------------------------------------------------------------------------- recipes


def starting_recipe(
    cfg: ModelConfig, name: str, title: str, max_seq_len: int | None, load_path: str | None = None
) -> str:
    """Write a commented recipe as YAML.

    Args:
        cfg: The model, with the balance that it is to be trained with.
        name: Name of the run; characters that such a name cannot have become dashes.
        title: Purpose of the recipe, in a few words, for its first line.
        max_seq_len: Tokens a sequence that the model takes, if it is known; longer ones than are customary in training
            are not used.
        load_path: Weights to go on from; None trains new ones.
    """
    name = re.sub(r"[^\w.\-]+|^\.+$", "-", name).strip("-") or "run"
    length, size = min(max_seq_len or TRAINED_LENGTH, TRAINED_LENGTH), Size.of(cfg)
    if load_path is None and (cfg.attention.yarn or cfg.attention.longrope):  # extensions come after pre-training
        attention = replace(cfg.attention, yarn=None, longrope=None)
        few = with_fewest_window_keys(attention, cfg.n_layers) if isinstance(attention, GqaConfig) else attention
        cfg = replace(cfg, attention=few)
    chosen = (_pretraining if load_path is None else _continued)(size, length)
    checkpointing = "selective" if size.total > 2e9 else "none"
    odd = {"model.moe.backend": ("loop", "the faster ones want widths that 8 divides")}
    keys = {
        "run_name": (name, "a run writes to runs/RUN_NAME"),
        "max_seq_len": (length, f"tokens a sequence{_longest(max_seq_len, length)}"),
        **{path: (value, _meaning(path)) for path, value in stated(cfg, "model")},
        **(odd if (cfg.d_model | cfg.moe.expert_hidden_size) % 8 else {}),
        "precision.compute": ("bf16", "matrix products; master weights stay fp32. On a CPU: fp32"),
        "activation_checkpointing": (checkpointing, "what the backward pass recomputes: none, selective, full"),
        "train_loader.dataset.local": (f"data/{name}", "written by `moefoundry prepare`"),
        "train_loader.num_workers": (4, "loader processes of each rank"),
        "optimizer.name": ("adamw", "with betas 0.9 and 0.95, weight decay 0.1"),
        "scheduler.name": ("cosine_with_warmup", "or linear_decay_with_warmup, constant_with_warmup"),
        "device_train_microbatch_size": (1, "sequences of one forward pass; auto takes as many as fit"),
        **chosen,
        **({} if load_path is None else {"load_path": (load_path, "the weights")}),
        **({} if load_path is None else {"load_weights_only": (True, "counters, schedule and data begin anew")}),
    }
    tokenizer = "TOKENIZER_DIR" if load_path is None else f"{load_path}/tokenizer"
    data = f"moefoundry prepare DOCUMENTS.jsonl data/{name} --tokenizer {tokenizer}"
    header = [f"{title}: {_short(size.total)} parameters, {_short(size.active)} active", f"Data: {data}"]
    header += ["All other keys, such as mesh.expert, which spreads experts over ranks: docs/recipe.md"]
    return "".join(f"# {line}\n" for line in header) + commented(keys)


def commented(keys: Comments) -> str:
    """YAML of dotted keys, in the schema's order, each on its line with a comment.

    Args:
        keys: Dotted key -> (value, comment). A key of a part stands where the schema has the mapping of such parts. An
            empty comment is left out.
    """
    order = {path: number for number, path in enumerate(every_key())}
    lines: list[str] = []
    open_mappings: tuple[str, ...] = ()
    for path in sorted(keys, key=lambda path: _place(path, order)):
        *parents, leaf = path.split(".")
        shared = sum(1 for _ in _while_equal(parents, open_mappings))
        lines += [f"{'  ' * depth}{parents[depth]}:" for depth in range(shared, len(parents))]
        open_mappings = tuple(parents)
        value, comment = keys[path]
        text = f"{'  ' * len(parents)}{leaf}: {scalar(plain(value))}"
        lines.append(f"{text:<{COLUMN}}  # {comment}" if comment else text)
    return "".join(f"{line}\n" for line in lines)


def _place(path: str, order: Mapping[str, int]) -> tuple[int, str]:
    """Find the place of a key in the schema; one that it does not have stands behind its mapping."""
    if path in order:
        return order[path], ""
    mapping = path.rpartition(".")[0]
    return _place(mapping, order)[0] if mapping else len(order), path


def _while_equal(left: list[str], right: tuple[str, ...]) -> Iterator[str]:
    for one, other in zip(left, right, strict=False):
        if one != other:
            return
        yield one


def stated(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Keys below a schema object that are required, have another value than their default, or are always shown."""
    defaults = type(value)()
    for field, spec in zip(fields(value), specs(type(value)).values(), strict=True):
        own, key = getattr(value, field.name), join(path, field.name)
        if is_dataclass(own):
            yield from stated(own, key)
        elif spec.required or own != getattr(defaults, field.name) or (own is not None and SHOWN.match(key)):
            yield key, own


def _meaning(path: str) -> str:
    text = every_key()[path].doc.partition(";")[0].partition(":")[0].rstrip(".")
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _longest(max_seq_len: int | None, length: int) -> str:
    return "" if max_seq_len in (None, length) else f"; the model takes up to {max_seq_len}"


def _short(count: int) -> str:
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


# ------------------------------------------------------------------------------------------------------ the sources


def recipe_of_family(family: Family) -> str:
    """Write the recipe that trains a family's published model from scratch."""
    model, hf = family.published
    cfg = with_balance(family, family.read_config(hf), hf)
    return starting_recipe(cfg, model.lower(), f"{model} ({family.name})", family.max_seq_len(hf))


def recipe_of_config(family: Family, hf: Mapping[str, Any], name: str) -> str:
    """Write the recipe that trains the model of a ``config.json`` from scratch.

    Raises:
        ConfigError: As :meth:`Family.model_of`.
    """
    cfg = with_balance(family, family.model_of(hf), hf)
    return starting_recipe(cfg, name, f"{name} ({family.name})", family.max_seq_len(hf))


def with_balance(family: Family, cfg: ModelConfig, hf: Mapping[str, Any]) -> ModelConfig:
    """``cfg`` with the load balancing that the family was published with, in this project's terms."""
    return replace(cfg, moe=replace(cfg.moe, balance=family.balance(cfg, hf)))


def recipe_of_size(active: int, total: int, vocab_size: int) -> str:
    """Write a recipe of about this many parameters, in the proportions of Qwen3-MoE.

    Args:
        active: Parameters that a token meets, embedding and head included.
        total: All parameters.
        vocab_size: Rows of embedding and head.

    Raises:
        UserError: There is no such model: too small for the vocabulary, or with fewer experts than a token gets.
    """
    widths = [*range(256, 1024, 128), *range(1024, 16385, 256)]
    cfg = min((_sized(width, vocab_size, 8) for width in widths), key=_distance(active))
    if not 0.75 < (found := Size.of(cfg).active) / active < 1.33:
        raise UserError(f"--active {_short(active)}: with a vocabulary of {vocab_size} the nearest is {_short(found)}")
    expert = cfg.n_layers * (3 * cfg.d_model * cfg.moe.expert_hidden_size + cfg.d_model)
    num_experts = 8 * round((total - found + 8 * expert) / expert / 8)
    if num_experts < 16:
        least = Size.of(_sized(cfg.d_model, vocab_size, 16)).total
        raise UserError(f"--total {_short(total)}: with {_short(found)} active, the least is {_short(least)}")
    cfg = _sized(cfg.d_model, vocab_size, num_experts)
    name = f"moe-{_short(active)}-{_short(total)}".lower()
    return starting_recipe(cfg, name, "A mixture in the proportions of Qwen3-MoE", TRAINED_LENGTH)


def _sized(width: int, vocab_size: int, num_experts: int) -> ModelConfig:
    heads = width // (128 if width >= 1024 else 64)
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=width,
        n_layers=max(4, width // 64),
        attention=GqaConfig(n_heads=heads, n_kv_heads=math.gcd(heads, 4), qk_norm=QkNorm.head),
        moe=MoEConfig(
            num_experts=num_experts,
            top_k=8,
            expert_hidden_size=3 * width // 8,
            balance=BalanceConfig(aux_loss_weight=0.001, aux_loss_scope=AuxLossScope.global_batch, z_loss_weight=0.0),
        ),
    )


def _distance(active: int) -> Callable[[ModelConfig], float]:
    return lambda cfg: abs(math.log(Size.of(cfg).active / active))
