"""The model as Composer and LLM Foundry see it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor
from torchmetrics import Metric

from moefoundry.config import AuxLossScope, ConfigError, Problem, load_model
from moefoundry.model.targets import count_targets, shifted_targets
from moefoundry.model.transformer import CausalLMLosses, MoETransformer, meta_model
from moefoundry.parallel import materialize

Batch = Mapping[str, Tensor]
"""``input_ids`` and ``labels``, int64 [B, S], with ``model.document_masking`` also ``sequence_id``, int64 [B, S]; in
training and evaluation ``num_targets``, int64 [B] (:func:`with_target_counts`)."""


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
        targets_per_sample: Mean number of targets of a sample of the global batch (see :class:`CountTargets`).
            Composer weights micro-batches by samples, and ranks equally; with it, every target counts equally. With
            None, losses are means over their micro-batch.
    """

    def __init__(self, model: MoETransformer) -> None:
        super().__init__()
        self.model = model
        self.targets_per_sample: Tensor | None = None

    def forward(self, batch: Batch) -> CausalLMLosses:
        return self.model(batch["input_ids"], batch["labels"], sequence_id=batch.get("sequence_id"))

    def loss(self, outputs: CausalLMLosses, batch: Batch) -> dict[str, Tensor]:
        share: Tensor | float = 1.0  # of the global batch's targets, in units of what as many samples of it have
        if self.targets_per_sample is not None:
            share = outputs.num_targets / (len(batch["input_ids"]) * self.targets_per_sample)
        losses = {"lm": outputs.lm * share, "balance": outputs.balance, "z": outputs.z}
        if self.model.cfg.mtp.depth:
            losses["mtp"] = outputs.mtp * share
        losses |= {name: value * share for name, value in outputs.of_targets.items()} | outputs.of_tokens
        return {"total": sum(losses.values(), start=outputs.lm.new_zeros(())), **losses}

    def eval_forward(self, batch: Batch, outputs: CausalLMLosses | None = None) -> CausalLMLosses:
        return self(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else {"LanguageCrossEntropy": LanguageCrossEntropy()}

    def update_metric(self, batch: Batch, outputs: CausalLMLosses, metric: Metric) -> None:
        metric.update(outputs.lm, outputs.num_targets)


class CountTargets(Callback):
    """Tells the model, before each step, how many targets the global batch has."""

    def batch_start(self, state: State, logger: Logger) -> None:
        num_targets_B = state.batch["num_targets"]
        counts = torch.stack([num_targets_B.sum(), num_targets_B.new_tensor(len(num_targets_B))])
        dist.all_reduce(counts)
        state.model.targets_per_sample = counts[0] / counts[1]


class FoundryMoECausalLM(ComposerMoECausalLM):
    """``model.name: moe_causal_lm`` in a recipe of LLM Foundry's own, which finds it by its entry point.

    Args:
        tokenizer: Not used; LLM Foundry hands it to every model.
        seed: Seed of the initial weights.
        model: Keys of this project's ``model`` mapping.

    Raises:
        ConfigError: They are not valid, or ask for what this project's own training loop does after each step.
    """

    def __init__(self, tokenizer: object = None, seed: int = 17, **model: object) -> None:
        cfg = load_model(model)
        balance = cfg.moe.balance
        if balance.bias_update_rate or balance.aux_loss_scope == AuxLossScope.global_batch:
            key = "bias_update_rate" if balance.bias_update_rate else "aux_loss_scope"
            message = f"{getattr(balance, key)} needs moefoundry's own trainer: scripts/train.py"
            raise ConfigError([Problem(f"model.moe.balance.{key}", message)])
        transformer = meta_model(cfg)
        materialize(transformer, "cpu", seed)
        super().__init__(transformer)


def count_tokens(batch: Batch) -> dict[str, int]:
    """Count the tokens of a batch as Composer's ``DataSpec`` wants them: all, and those that are predicted."""
    return {"total": batch["input_ids"].numel(), "loss_generating": int(batch["num_targets"].sum())}


def with_target_counts(batch: Batch) -> dict[str, Tensor]:
    """Add ``num_targets``, the number of targets of each sample: counted once, for all that go by it."""
    targets_BS = shifted_targets(batch["labels"], batch.get("sequence_id"))
    return {**batch, "num_targets": count_targets(targets_BS)}
