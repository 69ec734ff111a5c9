"""Parity with transformers, which is independent of the conversion: equal outputs of the converted model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from moefoundry.config import UserError
from moefoundry.conversion.reference import batch_of, outputs_of, reference_outputs
from moefoundry.model.transformer import MoETransformer


@dataclass(frozen=True)
class Parity:
    """Largest differences between our outputs and transformers', in fp32.

    Attributes:
        transformers: The version that was compared with.
        logits: Difference of the logits.
        hidden: Difference of each block's output.
    """

    transformers: str
    logits: float
    hidden: list[float]

    def __str__(self) -> str:
        worst = max(range(len(self.hidden)), key=self.hidden.__getitem__)
        return (
            f"verified, logits differ by at most {self.logits:.1e} from those of transformers {self.transformers}, "
            f"hidden states by {self.hidden[worst]:.1e} (block {worst})"
        )


@torch.no_grad()
def verify_outputs(
    hf: Path,
    model: MoETransformer,
    tolerance: float,
    stored_as: torch.dtype | None = None,
    fp8_as: torch.dtype = torch.bfloat16,
) -> Parity:
    """Compare the outputs of a model and of a Hugging Face directory, in fp32 on a fixed random batch.

    Both models are whole in memory.

    Args:
        hf: Directory that transformers loads.
        model: Model in fp32.
        tolerance: Largest difference of logits that is accepted.
        stored_as: dtype in which the conversion stored parameters; both sides are rounded to it. None rounds nothing.
        fp8_as: dtype in which FP8 weights were imported.

    Raises:
        UserError: The difference exceeds ``tolerance``, or no transformers here loads the directory.
    """
    reference = reference_outputs(hf, model.cfg, stored_as, fp8_as)
    if stored_as is not None:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored_as))
    with outputs_of(model.layers) as hidden:
        logits = model(batch_of(model.cfg.vocab_size))
    blocks = [_difference(ours, theirs) for ours, theirs in zip(hidden, reference.hidden, strict=True)]
    found = Parity(reference.version, _difference(logits, reference.logits), blocks)
    if not found.logits <= tolerance:
        first = next((index for index, value in enumerate(blocks) if not value <= tolerance), None)
        where = "" if first is None else f"; hidden states from block {first} on ({blocks[first]:.2e})"
        raise UserError(
            f"{hf}: logits differ by {found.logits:.2e}, more than {tolerance:.1e}, from those of transformers "
            f"{found.transformers}{where}"
        )
    return found


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours - theirs).abs().max().item()
