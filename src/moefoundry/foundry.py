"""The model as Composer and LLM Foundry see it. The only file that touches LLM Foundry's registries."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor
from torchmetrics import Metric

from moefoundry.config import AuxLossScope, ConfigError, Problem, load_recipe
from moefoundry.model.targets import shifted_targets
from moefoundry.model.transformer import CausalLMLosses, MoETransformer, meta_model
from moefoundry.ops.cross_entropy import IGNORE_INDEX
from moefoundry.parallel import materialize

Batch = Mapping[str, Tensor]
"""``input_ids`` and ``labels``, int64 [B, S], and with ``model.document_masking`` a ``sequence_id`` for each token."""


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
    """Adapts :class:`MoETransformer`: its losses by name, so that Composer logs ``loss/train/lm`` and the others.

    Attributes:
        targets_per_sample: Mean over the samples of the global batch, of all ranks (see :class:`CountTargets`).
            Composer weights micro-batches by samples and ranks equally; with it, targets count equally wherever they
            are. None leaves losses means over their micro-batch.
    """

    def __init__(self, model: MoETransformer) -> None:
        super().__init__()
        self.model = model
        self.targets_per_sample: Tensor | None = None

    def forward(self, batch: Batch) -> CausalLMLosses:
        return self.model(batch["input_ids"], batch["labels"], sequence_id=batch.get("sequence_id"))

    def loss(self, outputs: CausalLMLosses, batch: Batch) -> dict[str, Tensor]:
        share = self._share(outputs.num_targets, len(batch["input_ids"]))
        losses = {"lm": outputs.lm * share, "balance": outputs.balance, "z": outputs.z}
        if self.model.cfg.mtp.depth:
            losses["mtp"] = outputs.mtp * share
        losses |= {name: value * share for name, value in outputs.of_targets.items()} | outputs.of_tokens
        return {"total": sum(losses.values(), start=outputs.lm.new_zeros(())), **losses}

    def _share(self, num_targets: Tensor, num_samples: int) -> Tensor | float:
        """Targets of a micro-batch, in units of what as many samples of the global batch have; 1 without padding."""
        return 1.0 if self.targets_per_sample is None else num_targets / (num_samples * self.targets_per_sample)

    def eval_forward(self, batch: Batch, outputs: CausalLMLosses | None = None) -> CausalLMLosses:
        return self(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else {"LanguageCrossEntropy": LanguageCrossEntropy()}

    def update_metric(self, batch: Batch, outputs: CausalLMLosses, metric: Metric) -> None:
        metric.update(outputs.lm, outputs.num_targets)


class CountTargets(Callback):
    """Tells the model, before each step, how many targets the global batch has."""

    def batch_start(self, state: State, logger: Logger) -> None:
        batch = state.batch
        targets_BS = shifted_targets(batch["labels"], batch.get("sequence_id"))
        counts = torch.stack([(targets_BS != IGNORE_INDEX).sum(), targets_BS.new_tensor(len(targets_BS))])
        dist.all_reduce(counts)
        state.model.targets_per_sample = counts[0] / counts[1]


class FoundryMoECausalLM(ComposerMoECausalLM):
    """``model.name: moe_causal_lm`` in a recipe of LLM Foundry's own, which finds it by its entry point.

    Args:
        tokenizer: What LLM Foundry hands to every model; not used.
        seed: Of the initial weights.
        model: The keys of this project's ``model`` mapping.

    Raises:
        ConfigError: They are not valid, or ask for what this project's own training loop does after each step.
    """

    def __init__(self, tokenizer: object = None, seed: int = 17, **model: object) -> None:
        cfg = load_recipe(None, [f"model={json.dumps(model)}"]).model
        balance = cfg.moe.balance
        if balance.bias_update_rate or balance.aux_loss_scope == AuxLossScope.global_batch:
            key = "bias_update_rate" if balance.bias_update_rate else "aux_loss_scope"
            message = f"{getattr(balance, key)} needs moefoundry's own trainer: scripts/train.py"
            raise ConfigError([Problem(f"model.moe.balance.{key}", message)])
        transformer = meta_model(cfg)
        materialize(transformer, "cpu", seed)
        super().__init__(transformer)


def count_tokens(batch: Batch) -> dict[str, int]:
    """Tokens of a batch as Composer's ``DataSpec`` wants them: all, and those that are predicted."""
    targets = shifted_targets(batch["labels"], batch.get("sequence_id"))
    return {"total": batch["input_ids"].numel(), "loss_generating": int((targets != IGNORE_INDEX).sum())}
