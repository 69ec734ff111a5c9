"""The recipe's ``lora``: which low-rank adapters are trained on top of frozen weights."""

from __future__ import annotations

from dataclasses import dataclass

from moefoundry.config.field import MAX_FACTOR, TARGET, key

LORA_GROUPS = ("attention", "dense", "shared_experts", "experts")
"""Groups of weights that may get adapters: linear layers of attention, dense FFNs, shared experts; stacked experts."""


@dataclass
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685): a weight W of frozen values acts as W + scale * B A."""

    rank: int = key(
        16,
        "Rank of an adapter; with experts among the targets, rows of grouped_mm must be whole 16 bytes.",
        ge=1,
        le=4096,
        renamed_from=("lora_r", "lora_rank", "r"),
    )
    alpha: float = key(
        32.0,
        "Adapters are multiplied by alpha / rank, or alpha / sqrt(rank) with use_rslora.",
        gt=0,
        le=MAX_FACTOR,
        renamed_from=("lora_alpha",),
    )
    targets: list[str] = key(
        lambda: list(LORA_GROUPS),
        "Groups of weights that get adapters, or one weight of a group, such as attention.q_proj or experts.down_proj. "
        "Modules of multi-token prediction get none.",
        pattern=TARGET,
        renamed_from=("target_modules", "lora_target_modules"),
        instead_of={"target_parameters": "lora.targets=[experts] adapts the stacked experts"},
    )
    dropout: float = key(0.0, "Dropout of an adapter's input in training.", ge=0, lt=1, renamed_from=("lora_dropout",))
    use_rslora: bool = key(False, "Divide alpha by the root of the rank (rsLoRA, arXiv 2312.03732).")
    dora: bool = key(
        False,
        "Also train the length of each row of an adapted weight (DoRA, arXiv 2402.09353); experts get plain LoRA.",
        renamed_from=("use_dora", "peft_use_dora"),
    )
    train_router: bool = key(
        False, "Train the routers' gates, whole, and move their biases; false leaves routing as it was."
    )
    base: str | None = key(
        None,
        "Checkpoint of the frozen weights, or a run; may be a URL. null takes load_path's, or those that the adapters "
        "of load_path were trained on.",
        path=True,
        free_on_resume=True,
        renamed_from=("base_model_name_or_path", "base_model"),
    )
