"""Parity with transformers, which is independent of the conversion: equal logits of the converted model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moefoundry.config import MlaConfig, ModelConfig, UserError
from moefoundry.conversion.families import family_of
from moefoundry.conversion.fused_experts import SplitExperts
from moefoundry.conversion.hf_directory import read_hf_config
from moefoundry.conversion.safetensors_io import SafetensorsReader
from moefoundry.model.transformer import MoETransformer

BATCH = (2, 64)
OPTIONS = {"torch_dtype": torch.float32, "attn_implementation": "eager"}


@torch.no_grad()
def verify_logits(
    hf: Path,
    model: MoETransformer,
    tolerance: float,
    stored_as: torch.dtype | None = None,
    fp8_as: torch.dtype = torch.bfloat16,
) -> float:
    """Compare the logits of a model and of a Hugging Face directory, in fp32 on a fixed random batch.

    Both models are whole in memory.

    Args:
        hf: Directory that transformers loads.
        model: Model in fp32.
        tolerance: Largest difference that is accepted.
        stored_as: dtype in which the conversion stored parameters; both sides are rounded to it. None rounds nothing.
        fp8_as: dtype in which FP8 weights were imported. Transformers computes with them on GPUs only, so they are read
            for it here.

    Returns:
        The largest difference.

    Raises:
        UserError: The difference exceeds ``tolerance``, or transformers cannot load the directory.
    """
    ids_BS = torch.randint(model.cfg.vocab_size, BATCH, generator=torch.Generator().manual_seed(0))
    try:
        with _no_warnings():
            reference = _load(hf, model.cfg, fp8_as)
    except Exception as error:  # whatever its classes may raise
        text = " ".join(str(error).split())
        raise UserError(f"{hf} cannot be verified: transformers does not load it: {text}") from error
    if stored_as is not None:
        for parameter in (*model.parameters(), *reference.parameters()):
            parameter.copy_(parameter.to(stored_as))
    difference = (model(ids_BS) - reference.eval()(ids_BS).logits).abs().max().item()
    if not difference <= tolerance:
        raise UserError(f"{hf}: logits differ by {difference:.2e}, more than {tolerance:.1e}")
    return difference


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Silence transformers, which warns of tensors that it does not use, as of multi-token prediction."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _load(hf: Path, cfg: ModelConfig, fp8_as: torch.dtype) -> Any:
    """Load the weights of a directory into transformers' model; by transformers itself, where it can."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = read_hf_config(hf)
    older = int(transformers.__version__.partition(".")[0]) < 5
    newer_file = older and "rope_parameters" in raw  # a key that it would pass over, and compute another model
    if not (newer_file or "quantization_config" in raw or (older and _without_query_rank(cfg))):
        return AutoModelForCausalLM.from_pretrained(hf, **OPTIONS)
    family = family_of(raw)
    config = (
        AutoConfig.for_model(**family.write_config(cfg, family.max_seq_len(raw) or 1))
        if newer_file
        else AutoConfig.from_pretrained(hf)
    )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = _build(config)
    tensors = SplitExperts(SafetensorsReader(hf, fp8_as=fp8_as), family.pieces(cfg))
    query = "q_proj" if _without_query_rank(cfg) else "q_b_proj"
    stored = {name: name.replace("q_b_proj", query) for name in model.state_dict()}
    found = {name: tensors.read(there) for name, there in stored.items() if there in tensors.specs}
    model.load_state_dict(found, strict=False)  # that none is missing has been checked; a tied head is not stored
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
