"""The model as Composer and LLM Foundry see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerModel
from composer.utils import dist
from torch import Tensor
from torchmetrics import Metric

from moefoundry.config import AuxLossScope, ConfigError, Problem, UserError, load_model
from moefoundry.model.context import lengths_of_documents
from moefoundry.model.padding import count_at_depths
from moefoundry.model.preferences import dpo_losses, reward_margins
from moefoundry.model.targets import count_targets, shifted_targets
from moefoundry.model.transformer import CausalLMLosses, MoETransformer, meta_model
from moefoundry.ops.cross_entropy import IGNORE_INDEX
from moefoundry.parallel import materialize

Batch = Mapping[str, Any]
"""``input_ids`` and ``labels``, int64 [B, S]; where documents or padding are told ``sequence_id``, int64 [B, S]; in
training and evaluation what :func:`with_counts` adds."""


class MeanMetric(Metric):
    """Mean over all that the split has, whatever the batch size or the number of ranks: ``total / count``.

    Attributes:
        measured: False if no rank had anything to count, by the latest :meth:`compute`; there is no mean then.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.measured = True

    def compute(self) -> Tensor:
        self.measured = bool(self.count)  # that of all ranks, here alone
        return self.total / self.count


class LanguageCrossEntropy(MeanMetric):
    """Mean cross entropy over all targets of the split, in nats."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, mean_loss: Tensor, num_targets: Tensor) -> None:
        self.total += mean_loss.double() * num_targets
        self.count += num_targets


class SourceCrossEntropy(LanguageCrossEntropy):
    """The same over the targets of one source.

    Args:
        source: Its number in batches.
    """

    def __init__(self, source: int) -> None:
        super().__init__()
        self.source = source


class ComposerMoECausalLM(ComposerModel):
    """Adapts :class:`MoETransformer`: its losses by name, so that Composer logs ``loss/train/lm`` and the others.

    Args:
        model: The model.
        eval_sources: Sources of the evaluation data, in the order of their numbers; each gets a metric of its own.

    Attributes:
        targets_per_sample: Mean number of targets of a sample of the global batch, above 0 (see :class:`CountTargets`).
            Composer weights micro-batches by samples, and ranks equally; with it, every target counts equally. With
            None, losses are means over their micro-batch.
    """

    def __init__(self, model: MoETransformer, eval_sources: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.eval_sources = eval_sources
        self.targets_per_sample: Tensor | None = None

    def forward(self, batch: Batch) -> CausalLMLosses:
        told = {name: batch.get(name) for name in ("sequence_id", "tokens_of_rows", "document_lengths")}
        return self.model(batch["input_ids"], batch["labels"], **told)

    def loss(self, outputs: CausalLMLosses, batch: Batch) -> dict[str, Tensor]:
        share: Tensor | float = 1.0  # of the global batch's targets, in units of what as many samples of it have
        if self.targets_per_sample is not None:
            share = outputs.num_targets / (len(batch["input_ids"]) * self.targets_per_sample)
        losses = {"lm": outputs.lm * share, "balance": outputs.balance, "z": outputs.z}
        if self.model.cfg.mtp.depth:
            losses["mtp"] = outputs.mtp * share
        if outputs.indexer_kl is not None:
            losses["indexer"] = outputs.indexer
        losses |= {name: value * share for name, value in outputs.of_targets.items()} | outputs.of_tokens
        return {"total": sum(losses.values(), start=outputs.lm.new_zeros(())), **losses}

    def eval_forward(self, batch: Batch, outputs: CausalLMLosses | None = None) -> CausalLMLosses:
        return self(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        if is_train:
            return {}
        sources = {f"LanguageCrossEntropy/{name}": SourceCrossEntropy(n) for n, name in enumerate(self.eval_sources)}
        return {"LanguageCrossEntropy": LanguageCrossEntropy(), **sources}

    def update_metric(self, batch: Batch, outputs: CausalLMLosses, metric: Metric) -> Any:
        if isinstance(metric, SourceCrossEntropy):
            assert outputs.lm_of_rows is not None, "the model of several sources tells rows apart"
            own_B = batch["source"] == metric.source
            num_targets = batch["num_targets"][own_B].sum()
            metric.update(outputs.lm_of_rows[own_B].double().sum() / num_targets.clamp(min=1), num_targets)
        else:
            metric.update(outputs.lm, outputs.num_targets)


class PreferenceAccuracy(MeanMetric):
    """Share of the pairs of the split whose chosen response has the larger reward."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, margins_B: Tensor, counted_B: Tensor) -> None:
        self.total += ((margins_B > 0) & counted_B).sum()
        self.count += counted_B.sum()


class ComposerDPO(ComposerMoECausalLM):
    """Trains by direct preference optimization: rows are pairs, and have the log-probabilities of the reference.

    ``loss/train/dpo`` is in the total in place of ``loss/train/lm``, which is logged alone. It is a mean over the pairs
    of the global batch: every row has one, and Composer weights micro-batches by rows.

    Args:
        model: The model that is trained.
        beta: Scale of the rewards.
        eval_sources: As in the base class.
    """

    def __init__(self, model: MoETransformer, beta: float, eval_sources: Sequence[str] = ()) -> None:
        super().__init__(model, eval_sources)
        model.pairs = True
        self.beta = beta

    def margins(self, outputs: CausalLMLosses, batch: Batch) -> Tensor:
        """Compute the reward margins of the pairs of a micro-batch, [B]."""
        assert outputs.log_probs is not None, "set by the model of pairs"
        return reward_margins(outputs.log_probs, batch["reference"], self.beta)

    def loss(self, outputs: CausalLMLosses, batch: Batch) -> dict[str, Tensor]:
        assert outputs.log_probs is not None, "set by the model of pairs"
        losses = super().loss(outputs, batch)
        lm = losses.pop("lm").detach()
        del losses["total"]
        dpo = dpo_losses(outputs.log_probs, batch["reference"], self.beta).mean()
        return {"total": sum(losses.values(), start=dpo), "dpo": dpo, "lm": lm, **losses}

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        metrics = super().get_metrics(is_train)
        return metrics if is_train else metrics | {"PreferenceAccuracy": PreferenceAccuracy()}

    def update_metric(self, batch: Batch, outputs: CausalLMLosses, metric: Metric) -> None:
        if not isinstance(metric, PreferenceAccuracy):
            super().update_metric(batch, outputs, metric)
            return
        metric.update(self.margins(outputs, batch), batch["num_targets"] > 0)  # a row read twice has no targets


class CountTargets(Callback):
    """Tells the model, before each step, how many targets the global batch has, and how many tokens that are real.

    The batch is still on the host then; what is counted goes to the model's device.
    """

    def batch_start(self, state: State, logger: Logger) -> None:
        num_targets_B, model = state.batch["num_targets"], state.model.model
        counts = torch.stack([num_targets_B.sum(), num_targets_B.new_tensor(len(num_targets_B))])
        if "sequence_id" in state.batch:
            counts = torch.cat([counts, count_at_depths(state.batch["sequence_id"], 1 + len(model.mtp))])
        counts = counts.to(next(model.parameters()).device)
        dist.all_reduce(counts)
        state.model.targets_per_sample = counts[0].clamp(min=1) / counts[1]  # without any, losses are 0, and not 0 / 0
        model.tokens_per_sample = counts[2:].double() / counts[1] if len(counts) > 2 else None


ICL_METRICS = (
    *("InContextLearningLMAccuracy", "InContextLearningMultipleChoiceAccuracy"),
    *("InContextLearningLMExpectedCalibrationError", "InContextLearningMCExpectedCalibrationError"),
)


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
        cfg = load_model(model)
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

    def forward(self, batch: Batch) -> CausalLMLosses:
        """Compute the losses; LLM Foundry tells padding by ``attention_mask``, bool or int [B, S].

        Raises:
            ValueError: There is padding before the tokens of a sequence.
        """
        if "attention_mask" not in batch:
            return super().forward(batch)
        padding_BS = ~batch["attention_mask"].bool()
        if bool((padding_BS[:, :-1] & ~padding_BS[:, 1:]).any()):
            raise ValueError("attention_mask: padding stands before tokens; pad on the right (tokenizer padding_side)")
        documents = batch.get("sequence_id", torch.zeros_like(batch["input_ids"]))
        return super().forward({**batch, "sequence_id": documents.masked_fill(padding_BS, -1)})


def count_tokens(batch: Batch) -> dict[str, int]:
    """Count the tokens of a batch as Composer's ``DataSpec`` wants them: all but padding, and those predicted."""
    total = sum(batch["tokens_of_rows"]) if "tokens_of_rows" in batch else batch["input_ids"].numel()
    return {"total": total, "loss_generating": int(batch["num_targets"].sum())}


def with_counts(batch: Batch, document_masking: bool = True) -> dict[str, Any]:
    """Count once, while the batch is on the CPU, what others go by.

    Args:
        batch: As :data:`Batch`.
        document_masking: The model's; with it, the last token of a document predicts nothing.

    Returns:
        The batch with ``num_targets``, int64 [B], targets of each sample; and where there is a ``sequence_id`` with
        ``tokens_of_rows``, a list of the tokens of each sample that are no padding; with ``document_masking`` also
        ``document_lengths``, those of each document of each sample.
    """
    documents = batch.get("sequence_id")
    targets_BS = shifted_targets(batch["labels"], documents if document_masking else None)
    counted = {**batch, "num_targets": count_targets(targets_BS)}
    if documents is None:
        return counted
    if document_masking:
        counted["document_lengths"] = lengths_of_documents(documents)
    return counted | {"tokens_of_rows": (documents >= 0).sum(dim=1).tolist()}
