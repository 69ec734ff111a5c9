"""The model as Composer and LLM Foundry see it. The only file that touches LLM Foundry's registries."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric

from moefoundry.config import load_recipe
from moefoundry.model.transformer import CausalLMLosses, MoETransformer
from moefoundry.ops.cross_entropy import IGNORE_INDEX
from moefoundry.parallel import materialize

Batch = Mapping[str, Tensor]
"""``input_ids`` and ``labels``, int64 [B, S]."""


class LanguageCrossEntropy(Metric):
    """Mean cross entropy over all targets of the split, in nats, whatever the batch size or the number of ranks."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, mean_loss: Tensor, num_targets: Tensor) -> None:
        self.total += mean_loss.double() * num_targets
        self.count += num_targets

    def compute(self) -> Tensor:
        return self.total / self.count


class ComposerMoECausalLM(ComposerModel):
    """Adapts :class:`MoETransformer`: its losses by name, so that Composer logs ``loss/train/lm`` and the others."""

    def __init__(self, model: MoETransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> CausalLMLosses:
        return self.model(batch["input_ids"], batch["labels"])

    def loss(self, outputs: CausalLMLosses, batch: Batch) -> dict[str, Tensor]:
        return {"total": outputs.total, "lm": outputs.lm, "balance": outputs.balance, "z": outputs.z}

    def eval_forward(self, batch: Batch, outputs: CausalLMLosses | None = None) -> CausalLMLosses:
        return self(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else {"LanguageCrossEntropy": LanguageCrossEntropy()}

    def update_metric(self, batch: Batch, outputs: CausalLMLosses, metric: Metric) -> None:
        metric.update(outputs.lm, outputs.num_targets)


class FoundryMoECausalLM(ComposerMoECausalLM):
    """``model.name: moe_causal_lm`` in a recipe of LLM Foundry's own, which finds it by its entry point.

    Args:
        tokenizer: What LLM Foundry hands to every model; not used.
        seed: Of the initial weights.
        model: The keys of this project's ``model`` mapping.

    Raises:
        ConfigError: They are not valid.
    """

    def __init__(self, tokenizer: object = None, seed: int = 17, **model: object) -> None:
        cfg = load_recipe(None, [f"model={json.dumps(model)}"]).model
        with torch.device("meta"):
            transformer = MoETransformer(cfg)
        materialize(transformer, "cpu", seed)
        super().__init__(transformer)


def count_tokens(batch: Batch) -> dict[str, int]:
    """Tokens of a batch as Composer's ``DataSpec`` wants them: all, and those that are predicted."""
    labels = batch["labels"]
    return {"total": batch["input_ids"].numel(), "loss_generating": int((labels[:, 1:] != IGNORE_INDEX).sum())}
