"""Parity with transformers, which is independent of the conversion: equal outputs of the converted model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from moefoundry.config import ModelConfig, UserError
from moefoundry.conversion.reference import Reading, reference_outputs
from moefoundry.conversion.tensor_map import Source
from moefoundry.conversion.their_model import Outputs, batch_of, block_config, outputs_of
from moefoundry.model.transformer import MoETransformer, meta_model


@dataclass(frozen=True)
class Parity:
    """Largest differences between our outputs and transformers', in fp32.

    Attributes:
        transformers: The version that was compared with.
        logits: Difference of the logits.
        hidden: Difference of each block's output.
        by_block: One block of each side was in memory at a time.
    """

    transformers: str
    logits: float
    hidden: list[float]
    by_block: bool = False

    def __str__(self) -> str:
        worst = max(range(len(self.hidden)), key=self.hidden.__getitem__)
        way = " block by block" if self.by_block else ""
        return (
            f"verified{way}, logits differ by at most {self.logits:.1e} from those of transformers "
            f"{self.transformers}, hidden states by {self.hidden[worst]:.1e} (block {worst})"
        )


@torch.no_grad()
def verify_outputs(hf: Path, model: MoETransformer, tolerance: float, reading: Reading | None = None) -> Parity:
    """Compare the outputs of a model and of a Hugging Face directory, in fp32 on a fixed random batch.

    Both models are whole in memory.

    Args:
        hf: Directory that transformers loads.
        model: Model in fp32.
        tolerance: Largest difference of logits that is accepted.
        reading: Ways to read the directory; the model's parameters are rounded as they say.

    Raises:
        UserError: The difference exceeds ``tolerance``, or no transformers here loads the directory.
    """
    reading = reading or Reading()
    reference = reference_outputs(hf, model.cfg, reading)
    if reading.stored_as is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(reading.stored_as))
    with outputs_of(model.layers) as hidden:
        logits = model(batch_of(model.cfg.vocab_size))
    return _compared(hf, hidden, logits, reference, tolerance)


@torch.no_grad()
def verify_by_block(hf: Path, cfg: ModelConfig, tensors: Source, tolerance: float, reading: Reading) -> Parity:
    """Compare as :func:`verify_outputs` does, with one block of either side in memory at a time.

    Args:
        hf: Directory that transformers loads.
        cfg: The model.
        tensors: Its tensors, by our names.
        tolerance: Largest difference of logits that is accepted.
        reading: Ways to read the directory.

    Raises:
        UserError: As :func:`verify_outputs`.
    """
    reference = reference_outputs(hf, cfg, replace(reading, by_block=True))
    ids_BS = batch_of(cfg.vocab_size)

    def read(name: str) -> Tensor:
        return tensors.read(name).to(reading.stored_as or tensors.specs[name].dtype).float()

    out_BSD = embedding(ids_BS, read("embed_tokens.weight"))
    hidden = []
    for index in range(cfg.n_layers):
        model = meta_model(block_config(cfg, index))
        ends = ("norm.weight", "lm_head.weight") if index == cfg.n_layers - 1 else ()
        names = {name: name.replace("layers.0.", f"layers.{index}.", 1) for name in model.state_dict()}
        values = {name: read(there) for name, there in names.items() if name.startswith("layers.") or name in ends}
        model.load_state_dict(values, strict=False, assign=True)
        model.add_module("embed_tokens", Given(out_BSD))
        for unused in () if ends else ("norm", "lm_head"):
            model.add_module(unused, nn.Identity())
        with outputs_of(model.eval().layers) as outputs:
            out_BSD = model(ids_BS)
        hidden += outputs
    return _compared(hf, hidden, out_BSD, reference, tolerance, by_block=True)


class Given(nn.Module):
    """Hidden states in the place of an embedding."""

    def __init__(self, hidden_BSD: Tensor) -> None:
        super().__init__()
        self.hidden_BSD = hidden_BSD

    def forward(self, input_ids_BS: Tensor) -> Tensor:
        """Give them, [B, S, D], whatever the tokens."""
        return self.hidden_BSD


def fits_twice(tensors: Source) -> bool:
    """Tell if two copies in fp32, and as much again for loading, fit the memory that is free."""
    elements = sum(spec.nbytes // spec.dtype.itemsize for spec in tensors.specs.values())
    return 3 * 4 * elements < psutil.virtual_memory().available


def _compared(
    hf: Path, hidden: list[Tensor], logits: Tensor, reference: Outputs, tolerance: float, by_block: bool = False
) -> Parity:
    blocks = [_difference(ours, theirs) for ours, theirs in zip(hidden, reference.hidden, strict=True)]
    found = Parity(reference.version, _difference(logits, reference.logits), blocks, by_block)
    if not found.logits <= tolerance:
        first = next((index for index, value in enumerate(blocks) if not value <= tolerance), None)
        where = "" if first is None else f"; hidden states from block {first} on ({blocks[first]:.2e})"
        raise UserError(
            f"{hf}: logits differ by {found.logits:.2e}, more than {tolerance:.1e}, from those of transformers "
            f"{found.transformers}{where}"
        )
    return found


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()
