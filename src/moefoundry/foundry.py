"""The model as Composer and LLM Foundry see it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor
from torchmetrics import Metric

from moefoundry.config import AuxLossScope, ConfigError, Problem, UserError, load_recipe
from moefoundry.model.targets import count_targets, shifted_targets
from moefoundry.model.transformer import CausalLMLosses, MoETransformer, meta_model
from moefoundry.ops.cross_entropy import IGNORE_INDEX
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

    def update_metric(self, batch: Batch, outputs: CausalLMLosses, metric: Metric) -> dict[str, Any]:
        """Update a metric; what Composer logs of each sample is nothing."""
        metric.update(outputs.lm, outputs.num_targets)
        return {}


class CountTargets(Callback):
    """Tells the model, before each step, how many targets the global batch has."""

    def batch_start(self, state: State, logger: Logger) -> None:
        num_targets_B = state.batch["num_targets"]
        counts = torch.stack([num_targets_B.sum(), num_targets_B.new_tensor(len(num_targets_B))])
        dist.all_reduce(counts)
        state.model.targets_per_sample = counts[0] / counts[1]


ICL_METRICS = (
    *("InContextLearningLMAccuracy", "InContextLearningMultipleChoiceAccuracy"),
    *("InContextLearningLMExpectedCalibrationError", "InContextLearningMCExpectedCalibrationError"),
)
NOT_OF_THE_MODEL = (
    *("run_name=llm-foundry", "max_seq_len=4096", "train_loader.dataset.local=none", "optimizer.lr=1"),
    *("scheduler.t_warmup=0ba", "max_duration=1ba", "global_train_batch_size=1"),
)
"""Required keys of a recipe here that LLM Foundry's own recipe has instead; nothing reads them."""


class FoundryMoECausalLM(ComposerMoECausalLM):
    """``model.name: moe_causal_lm`` in a recipe of LLM Foundry's own, which finds it by its entry point.

    Args:
        tokenizer: Kept for LLM Foundry's checkpointer; the model does without it.
        seed: Seed of the initial weights.
        model: Keys of this project's ``model`` mapping.

    Raises:
        ConfigError: They are not valid, or ask for what this project's own training loop does after each step.
    """

    def __init__(self, tokenizer: object = None, seed: int = 17, **model: object) -> None:
        cfg = load_recipe(None, [*NOT_OF_THE_MODEL, f"model={json.dumps(model)}"]).model
        balance = cfg.moe.balance
        if balance.bias_update_rate or balance.aux_loss_scope == AuxLossScope.global_batch:
            key = "bias_update_rate" if balance.bias_update_rate else "aux_loss_scope"
            message = f"{getattr(balance, key)} needs moefoundry's own trainer: scripts/train.py"
            raise ConfigError([Problem(f"model.moe.balance.{key}", message)])
        transformer = meta_model(cfg)
        materialize(transformer, "cpu", seed)
        super().__init__(transformer)
        self.tokenizer = tokenizer

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Return those of training, which LLM Foundry also evaluates by; in evaluation those of its ICL tasks, too."""
        metrics = super().get_metrics(is_train=False)
        if is_train:
            return metrics
        from llmfoundry.eval import metrics as icl

        return metrics | {name: getattr(icl, name)() for name in ICL_METRICS}

    def eval_forward(self, batch: Mapping[str, Any], outputs: CausalLMLosses | None = None) -> Any:
        """Compute losses; of a batch of an ICL task logits, [B, S, V].

        Raises:
            UserError: The task wants generated text.
        """
        if batch.get("mode") == "generate":
            raise UserError("icl_tasks: moe_causal_lm generates no text here; export it, and evaluate hf_causal_lm")
        if batch.get("mode") == "icl_task":
            return self.model(batch["input_ids"])
        return super().eval_forward(batch, outputs)

    def update_metric(self, batch: Mapping[str, Any], outputs: Any, metric: Metric) -> dict[str, Any]:
        """Update a metric; return what it says of each sample of an ICL task."""
        if batch.get("mode") != "icl_task":
            return super().update_metric(batch, outputs, metric)
        targets_BS = batch["labels"].roll(-1, dims=1)
        targets_BS[:, -1] = IGNORE_INDEX
        said: dict[str, Any] = metric.update(batch=batch, outputs=outputs, labels=targets_BS) or {}
        return said and said | {"metric_name": [type(metric).__name__] * len(targets_BS)}


def count_tokens(batch: Batch) -> dict[str, int]:
    """Count the tokens of a batch as Composer's ``DataSpec`` wants them: all, and those that are predicted."""
    return {"total": batch["input_ids"].numel(), "loss_generating": int(batch["num_targets"].sum())}


def with_target_counts(batch: Batch) -> dict[str, Tensor]:
    """Add ``num_targets``, the number of targets of each sample: counted once, for all that go by it."""
    targets_BS = shifted_targets(batch["labels"], batch.get("sequence_id"))
    return {**batch, "num_targets": count_targets(targets_BS)}
