"""Whether a conversion kept the model: the same logits from transformers, which is independent of what converted it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moefoundry.checkpoint.safetensors_io import SafetensorsReader
from moefoundry.config import UserError
from moefoundry.model.transformer import MoETransformer

BATCH = (2, 64)


@torch.no_grad()
def verify_logits(
    hf: Path,
    model: MoETransformer,
    tolerance: float,
    stored_as: torch.dtype | None = None,
    fp8_as: torch.dtype = torch.bfloat16,
) -> float:
    """The largest difference between the logits of ``model`` and of a Hugging Face directory, both in fp32, on a fixed
    random batch. Both models are whole in memory.

    Args:
        hf: What transformers loads.
        model: In fp32.
        tolerance: Largest difference that is accepted.
        stored_as: What the conversion stored parameters as; those of both sides are rounded to it. None stored them as
            they were.
        fp8_as: What FP8 weights have been imported as. Transformers computes with them on GPUs only; they are read for
            it here.

    Raises:
        UserError: The difference exceeds ``tolerance``, or transformers cannot load the directory.
    """
    ids_BS = torch.randint(model.cfg.vocab_size, BATCH, generator=torch.Generator().manual_seed(0))
    try:
        with _no_warnings():
            reference = _load(hf, fp8_as)
    except Exception as error:  # whatever its classes may raise
        raise UserError(f"{hf} cannot be verified: transformers does not load it: {error}") from error
    if stored_as is not None:
        for parameter in (*model.parameters(), *reference.parameters()):
            parameter.copy_(parameter.to(stored_as))
    difference = (model(ids_BS) - reference.eval()(ids_BS).logits).abs().max().item()
    if not difference <= tolerance:
        raise UserError(f"{hf}: logits differ by {difference:.2e}, more than {tolerance:.1e}")
    return difference


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Transformers names each tensor that it does not use, such as those of multi-token prediction, which it lacks."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _load(hf: Path, fp8_as: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(hf)
    options = {"torch_dtype": torch.float32, "attn_implementation": "eager"}
    if not hasattr(config, "quantization_config"):
        return AutoModelForCausalLM.from_pretrained(hf, config=config, **options)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, **options)
    tensors = SafetensorsReader(hf, fp8_as=fp8_as)
    model.load_state_dict({name: tensors.read(name) for name in model.state_dict()})
    return model
