"""Transformers' models of a Hugging Face directory, by the version that is imported, and what they compute."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefoundry.config import ConfigError, GqaConfig, MlaConfig, ModelConfig, MtpConfig, UserError
from moefoundry.conversion.families import FAMILIES, Family, family_of
from moefoundry.conversion.families.family import dense_layers
from moefoundry.conversion.fused_experts import SplitExperts
from moefoundry.conversion.hf_directory import read_hf_config
from moefoundry.conversion.safetensors_io import SafetensorsReader

BATCH = (2, 64)
PLACE = re.compile(r"((?:^|\.)(?:layers|blocks)\.)\d+(\.)")
STEPS = ("decoder_sparse_step", "moe_layer_interval", "moe_layer_freq")
OPTIONS = {"torch_dtype": torch.float32, "attn_implementation": "eager"}


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model in fp32 on :func:`batch_of`.

    Attributes:
        version: Version of the transformers that computed them.
        logits: [B, S, V].
        hidden: Output of each block, [B, S, D].
    """

    version: str
    logits: Tensor
    hidden: list[Tensor]


def batch_of(vocab_size: int) -> Tensor:
    """Draw the fixed batch of tokens, int64 [B, S]."""
    return torch.randint(vocab_size, BATCH, generator=torch.Generator().manual_seed(0))


@contextmanager
def outputs_of(blocks: Any) -> Iterator[list[Tensor]]:
    """Collect the hidden states that blocks give while this is open."""
    found: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silence transformers, which warns of tensors that it does not use, as of multi-token prediction."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def outputs_of_the_whole(
    hf: Path, cfg: ModelConfig, stored_as: torch.dtype | None, fp8_as: torch.dtype, adapters: Path | None = None
) -> Outputs:
    """Run the model of a directory, whole in memory.

    Args:
        hf: The directory.
        cfg: The model that its config declares.
        stored_as: dtype to which parameters are rounded; None rounds nothing.
        fp8_as: dtype in which FP8 and INT4 weights are read.
        adapters: Directory of adapters that peft loads on top; None is the model alone.
    """
    import transformers

    model = _rounded(whole_model(hf, cfg, fp8_as), stored_as)
    blocks = _blocks(model)
    if adapters is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapters).eval()
    with outputs_of(blocks) as hidden:
        logits = model(batch_of(cfg.vocab_size)).logits
    return Outputs(transformers.__version__, logits, hidden)


def block_outputs(hf: Path, cfg: ModelConfig, stored_as: torch.dtype | None, fp8_as: torch.dtype) -> Outputs:
    """Run the model of a directory with one block in memory at a time, each in a model of one block.

    Arguments are those of :func:`outputs_of_the_whole`; there are no adapters.
    """
    import transformers
    from transformers import AutoConfig

    raw = read_hf_config(hf)
    family = family_of(raw)
    tensors = SplitExperts(SafetensorsReader(hf, fp8_as=fp8_as), family, cfg)
    ends = {piece.name: piece.hf_name for piece in family.pieces(cfg) if piece.name.count(".") == 1}
    found: list[Tensor] = []
    hidden_BSD = torch.nn.functional.embedding(
        batch_of(cfg.vocab_size), _as(tensors.read(ends["embed_tokens.weight"]), stored_as)
    )
    for index in range(cfg.n_layers):
        last = index == cfg.n_layers - 1
        own = {PLACE.sub(r"\g<1>0\2", name): name for name in tensors.specs if _is_in_block(name, index)}
        if last:
            left_out = () if cfg.tie_embeddings else ("embed_tokens.weight",)
            own |= {name: name for ours, name in ends.items() if ours not in left_out}
        config = AutoConfig.for_model(**_config_of_block(raw, cfg, index))
        model = filled(config, {name: tensors.read(there) for name, there in own.items()}, cfg)
        with outputs_of(_blocks(_rounded(model, stored_as))) as outputs:
            logits = model(inputs_embeds=hidden_BSD, use_cache=False).logits
        hidden_BSD = outputs[0]
        found.append(hidden_BSD)
    return Outputs(transformers.__version__, logits, found)


def block_config(cfg: ModelConfig, index: int) -> ModelConfig:
    """Make the config of a model of one block, that of this index; only that of the last has the vocabulary."""
    dense, linear, attention = index in dense_layers(cfg), cfg.linear_attention, cfg.attention
    if isinstance(attention, GqaConfig):
        window = attention.window_of(index)
        attention = replace(
            attention,
            sliding_window=window,
            sliding_window_layers=None,
            sliding_window_rope_theta=None if window is None else attention.sliding_window_rope_theta,
            unrotated_layers=[] if attention.is_rotated(index) else [0],
        )
    return replace(
        cfg,
        attention=attention,
        linear_attention=replace(linear, layers=[0]) if linear is not None and cfg.is_linear(index) else None,
        vocab_size=cfg.vocab_size if index == cfg.n_layers - 1 else 2,
        n_layers=1,
        n_dense_layers=int(dense),
        dense_layers=[],
        multipliers=cfg.multipliers if index == 0 else replace(cfg.multipliers, embedding=1.0),
        mtp=MtpConfig(),
    )


def _config_of_block(raw: Mapping[str, Any], cfg: ModelConfig, index: int) -> dict[str, Any]:
    """Change a ``config.json`` into that of a model of one block: what a number or kind of blocks changes in it."""
    family = family_there(raw)
    length = family.max_seq_len(raw) or 1
    written = family.write_config(cfg, length)
    try:
        own = family.write_config(block_config(cfg, index), length)
    except ConfigError:
        raise UserError(
            f"{family.name} has no model of block {index} alone; a machine with memory for two copies compares it whole"
        ) from None
    if in_our_words(dict(raw)):
        return own
    changed = {key: value for key, value in own.items() if written.get(key) != value}
    sliced = {
        key: value[index : index + 1]
        for key, value in raw.items()
        if isinstance(value, list) and len(value) == cfg.n_layers and cfg.n_layers > 1
    }
    steps = {key: 1 for key in STEPS if key in raw}
    config = dict(raw) | sliced | changed | steps | {"pad_token_id": None}
    return {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}


def _is_in_block(name: str, index: int) -> bool:
    place = PLACE.search(name)
    return place is not None and place[0].endswith(f".{index}.")


def _blocks(model: Any) -> Any:
    base = model.base_model
    return base.layers if hasattr(base, "layers") else base.blocks


def _as(values: Tensor, stored_as: torch.dtype | None) -> Tensor:
    return values.to(stored_as or values.dtype).float()


def _rounded(model: Any, stored_as: torch.dtype | None) -> Any:
    if stored_as is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored_as))
    return model.eval()


def whole_model(hf: Path, cfg: ModelConfig, fp8_as: torch.dtype) -> Any:
    """Load the weights of a directory into transformers' model; by transformers itself, where it can."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = read_hf_config(hf)
    ours = in_our_words(raw)
    if not (ours or "quantization_config" in raw or (is_older() and _without_query_rank(cfg))):
        return AutoModelForCausalLM.from_pretrained(hf, **OPTIONS)
    family = family_of(raw)
    config = (
        AutoConfig.for_model(**family_there(raw).write_config(cfg, family.max_seq_len(raw) or 1))
        if ours
        else AutoConfig.from_pretrained(hf)
    )
    tensors = SplitExperts(SafetensorsReader(hf, fp8_as=fp8_as), family, cfg)
    return filled(config, {name: tensors.read(name) for name in tensors.specs}, cfg)


def in_our_words(raw: dict[str, Any]) -> bool:
    """Tell if transformers would not read a config as it stands: under another name, or in a later version's keys."""
    newer_file = is_older() and "rope_parameters" in raw  # which it would pass over, and compute another model
    return newer_file or raw["model_type"] != family_there(raw).name


def family_there(raw: Mapping[str, Any]) -> Family:
    """Find the family under which transformers has the model of a ``config.json``."""
    family = family_of(raw)
    return FAMILIES[family.stand_in] if family.stand_in else family


def is_older() -> bool:
    """Tell if the transformers that is imported is of version 4."""
    import transformers

    return int(transformers.__version__.partition(".")[0]) < 5


def filled(config: Any, tensors: Mapping[str, Tensor], cfg: ModelConfig) -> Any:
    """Build transformers' model and give it tensors, by their published names; what it has beside them is random."""
    from transformers import AutoModelForCausalLM

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if not is_older():
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))  # the auto class wants a directory
        return kind.from_pretrained(None, config=config, state_dict=dict(tensors), **OPTIONS)
    model = _build(config)
    query = "q_proj" if _without_query_rank(cfg) else "q_b_proj"
    stored = {name: name.replace("q_b_proj", query) for name in model.state_dict()}
    values = {name: tensors[there] for name, there in stored.items() if there in tensors}
    model.load_state_dict(values, strict=False)  # that none is missing has been checked; a tied head is not stored
    model.tie_weights()
    return model


def _without_query_rank(cfg: ModelConfig) -> bool:
    return isinstance(cfg.attention, MlaConfig) and cfg.attention.q_lora_rank is None


def _build(config: Any) -> Any:
    """Build a model without its weights.

    Transformers 4.51 builds no DeepSeek-V3 whose queries are not compressed; its attention with nothing before
    ``q_b_proj`` is that.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, **OPTIONS)
    except TypeError:
        if getattr(config, "q_lora_rank", 0) is not None:
            raise
    config.q_lora_rank = 1
    model = AutoModelForCausalLM.from_config(config, **OPTIONS)
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_a_proj, attention.q_a_layernorm = nn.Identity(), nn.Identity()
        attention.q_b_proj = nn.Linear(config.hidden_size, attention.q_b_proj.out_features, bias=False)
    return model
