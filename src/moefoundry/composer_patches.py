"""The only file that reaches into Composer's private parts; tested with one version, which :func:`apply` checks.

- ``Trainer._wrap_model_for_distributed`` shards a model on a 1-D mesh of its own (composer issue 3916). The model is
  sharded already, on the recipe's mesh: :class:`MeshTrainer` leaves it as it is.
- ``Trainer._train_microbatch`` is the one place that knows which micro-batch is the last of a batch, and only after the
  last have gradients to be summed over ``replicate``: :class:`MeshTrainer` says so to FSDP before each. The method
  leaves outputs and loss in the state, and with them the graph and all that its functions hold, until the next forward
  pass has ended: :class:`MeshTrainer` detaches both.
- ``Trainer._train_batch`` trains a batch, and in it ``Trainer._train_microbatches`` all but the optimizer's step:
  :class:`MeshTrainer` lets others repeat the first, and leave the second.
- ``Trainer._compute_and_log_metrics`` logs NaN for a metric that has measured nothing: :class:`MeshTrainer` leaves such
  metrics out, which say so (``measured``).
- ``collect_env.get_cpu_model`` starts an interpreter to learn a name that nothing uses, and
  ``collect_env.get_composer_commit_hash`` goes through a list of all of Composer's files: they are replaced.
- ``Engine._debug_log`` writes a line for each callback and event, hundreds a batch, and drops it where ``ENGINE_DEBUG``
  is not set: there it does nothing.
- ``MLFlowLogger`` keeps the name of its run to itself, and a resume needs it: :func:`mlflow_run_id`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.metadata import distribution
from typing import Any

import composer
from composer import Trainer
from composer.core import Engine, State
from composer.loggers import MLFlowLogger
from composer.utils import collect_env, dist
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchmetrics import Metric

from moefoundry.config import Recipe, UserError
from moefoundry.mesh import Meshes
from moefoundry.parallel import begin_micro_batch

TESTED = "0.32.1"
OVERRIDDEN = (
    *("_wrap_model_for_distributed", "_train_batch", "_train_microbatches", "_train_microbatch"),
    "_compute_and_log_metrics",
)


class MeshTrainer(Trainer):
    """A ``Trainer`` that takes a model as it is: sharded already, on the recipe's own mesh.

    Attributes:
        recipe: The recipe that is trained, with what was chosen for this run.
        meshes: The meshes of its ranks; None where the model is not sharded.
        around: Functions that are called with the state and a function that trains the batch, and call it; the
            outermost first.
        on_trial: Gives the context of the forward and backward passes of a batch.
    """

    recipe: Recipe
    meshes: Meshes | None = None
    around: Sequence[Callable[[State, Callable[[], Any]], Any]] = ()
    on_trial: Callable[[], AbstractContextManager[None]] = nullcontext

    def _train_batch(self, use_grad_scaling: bool) -> Any:
        train: Callable[[], Any] = partial(super()._train_batch, use_grad_scaling)
        for each in reversed(self.around):
            train = partial(each, self.state, train)
        return train()

    def _train_microbatches(self, *args: Any, **options: Any) -> Any:
        with self.on_trial():
            return super()._train_microbatches(*args, **options)

    def _wrap_model_for_distributed(self, model: Any, optimizers: Any) -> None:
        pass

    def _train_microbatch(self, use_grad_scaling: bool, current_batch_size: float, is_final_microbatch: bool) -> Any:
        begin_micro_batch(self.state.model, is_final_microbatch)
        losses = super()._train_microbatch(use_grad_scaling, current_batch_size, is_final_microbatch)
        parts = self.state.outputs, self.state.loss
        self.state.outputs, self.state.loss = tree_map_only(Tensor, Tensor.detach, parts)
        return losses

    def _compute_and_log_metrics(self, dataloader_label: str, metrics: dict[str, Metric]) -> None:
        for metric in metrics.values():
            metric.compute()  # collective, and kept for the next call
        measured = {name: metric for name, metric in metrics.items() if getattr(metric, "measured", True)}
        super()._compute_and_log_metrics(dataloader_label, measured)


def apply() -> None:
    """Check Composer's version, with a warning if it is another than the one tested, and replace what is replaced.

    Raises:
        UserError: This Composer lacks a method that :class:`MeshTrainer` overrides: a model would be sharded twice.
    """
    if composer.__version__ != TESTED:
        which = f"Composer {composer.__version__} is installed, and moefoundry is tested with mosaicml=={TESTED}"
        if missing := [name for name in OVERRIDDEN if not hasattr(Trainer, name)]:
            raise UserError(f"{which}: it has no Trainer.{missing[0]}; install that version")
        if dist.get_global_rank() == 0:
            print(f"warning: {which}", file=sys.stderr, flush=True)
    collect_env.get_cpu_model = lambda: "unknown"
    collect_env.get_composer_commit_hash = commit_of_composer
    if "ENGINE_DEBUG" not in os.environ:
        Engine._debug_log = lambda self, event, msg: None


def commit_of_composer() -> str | None:
    """Read the commit that Composer was installed from; None for a release."""
    origin = distribution("mosaicml").read_text("direct_url.json")
    return None if origin is None else json.loads(origin).get("vcs_info", {}).get("commit_id")


def mlflow_run_id(logger: MLFlowLogger) -> str:
    """Give the name that MLflow has for a run, once it has begun."""
    return str(logger._run_id)
