"""Health of a run: the gradient norm, numbers that are not finite, and ranks that do not answer.

The gradient norm of every step is the same on all ranks and is not finite if any gradient is not. So a check of it and
of each rank's own loss costs one all-reduce of a scalar. Tensors are looked at only when something is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefoundry.config import NonFinite, UserError
from moefoundry.mesh import by_mesh

MAX_NAMES = 8  # tensors of one rank that a message names
MAX_SKIPPED_IN_A_ROW = 100
"""Skipped steps leave the weights as they are: so many batches that all fail are no accident of the data."""


class NonFiniteError(UserError):
    """A loss or a gradient was not finite; the weights are those before the step."""


class CollectiveError(RuntimeError):
    """A collective failed on this rank: another rank is late, or gone."""


class GradientNorm(Callback):
    """Logs ``grad_norm`` (before clipping) and scales gradients down to ``max_norm``.

    Args:
        max_norm: Largest L2 norm over all parameters of the model; None does not clip.

    Attributes:
        norm: Norm of the step's gradients before clipping, a float64 scalar.
    """

    norm: Tensor

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm

    def after_train_batch(self, state: State, logger: Logger) -> None:
        gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
        self.norm = global_norm(gradients)
        if self.max_norm is not None:
            clip(gradients, self.max_norm, self.norm)
        logger.log_metrics({"grad_norm": self.norm})


class FiniteCheck(Callback):
    """Stops before the update, or skips it, on all ranks, when the loss or a gradient of any rank is not finite.

    Where all is finite, nothing is changed.

    Args:
        gradient_norm: Measures the norm of the step, before this callback.
        action: ``skip`` leaves weights and optimizer alone in that step and logs ``skipped_steps`` = 1; the schedule,
            the position in the data and the clock go on.

    Raises:
        NonFiniteError: On every rank: with ``stop``, or after many skipped steps in a row.
    """

    def __init__(self, gradient_norm: GradientNorm, action: NonFinite) -> None:
        self.gradient_norm = gradient_norm
        self.action = action
        self._losses: dict[str, Tensor] = {}
        self._skipped_in_a_row = 0

    def before_train_batch(self, state: State, logger: Logger) -> None:
        self._losses = {}

    def after_loss(self, state: State, logger: Logger) -> None:
        for name, loss in state.loss.items():  # sums over micro-batches
            self._losses[name] = self._losses[name] + loss.detach() if name in self._losses else loss.detach()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        losses = self._losses
        finite = losses["total"].isfinite() & self.gradient_norm.norm.isfinite()
        finite = finite.to(torch.int32)
        dist.all_reduce(finite, reduce_operation="MIN")
        if finite:
            self._skipped_in_a_row = 0
            return
        message = f"batch {state.timestamp.batch.value + 1}: {_describe(losses, state.model)}"
        self._skipped_in_a_row += 1
        if self.action == NonFinite.stop:
            raise NonFiniteError(f"{message}. The weights were not updated; nonfinite=skip leaves out such steps")
        if self._skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(f"{message}. {MAX_SKIPPED_IN_A_ROW} steps before it were skipped")
        for parameter in state.model.parameters():
            parameter.grad = None  # an optimizer passes over parameters without one, and over their state
        logger.log_metrics({"skipped_steps": 1})
        if dist.get_global_rank() == 0:
            print(f"{message}. The step is skipped", file=sys.stderr, flush=True)


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Compute the L2 norm of all gradients together, a float64 scalar, the same on every rank and mesh.

    An fp32 norm of a large matrix is off by 1e-5 and more, by less where shards are smaller. So only norms of rows are
    computed in fp32, and their squares are summed in float64.
    """
    squares = []
    for same_mesh in by_mesh(gradients):
        shards = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in same_mesh]
        norms_of_rows = torch.cat([torch.linalg.vector_norm(shard, dim=-1).flatten() for shard in shards])
        square = norms_of_rows.double().square().sum()
        if isinstance(first := same_mesh[0], DTensor):
            for axis, placement in enumerate(first.placements):
                if not placement.is_replicate():  # each of these axes shards the gradients
                    torch.distributed.all_reduce(square, group=first.device_mesh.get_group(axis))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def clip(gradients: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale gradients by ``max_norm / norm`` where that is below 1, as ``torch.nn.utils.clip_grads_with_norm_`` does.

    Each rank scales its shards, which have that of the whole. A norm that is not finite changes nothing.
    """
    known = norm.where(norm.isfinite(), 0.0)  # clipping would spread what is not
    shards = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    torch._foreach_mul_(shards, (max_norm / (known.to(shards[0].dtype) + 1e-6)).clamp(max=1.0))


def step_was_skipped(model: nn.Module) -> bool:
    """Check whether the optimizer had nothing to do in the step that just ended."""
    return all(parameter.grad is None for parameter in model.parameters())


def _describe(losses: dict[str, Tensor], model: nn.Module) -> str:
    """Name everything that is not finite, by rank: its losses, and its shards of gradients from the loss back."""
    bad_losses = [name for name, loss in losses.items() if not loss.isfinite().all()]
    gradients = [name for name, parameter in model.named_parameters() if not _is_finite(parameter.grad)]
    parts = []
    for rank, (loss_names, gradient_names) in enumerate(dist.all_gather_object((bad_losses, gradients[::-1]))):
        if loss_names:
            parts.append(f"loss {', '.join(loss_names)} of rank {rank}")
        if gradient_names:
            more = f" and {len(gradient_names) - MAX_NAMES} more" if len(gradient_names) > MAX_NAMES else ""
            parts.append(f"gradients of {', '.join(gradient_names[:MAX_NAMES])}{more} on rank {rank}")
    return f"not finite: {'; '.join(parts) or 'the norm of all gradients together, each of which is finite'}"


def _is_finite(gradient: Tensor | None) -> bool:
    shard = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return shard is None or bool(shard.isfinite().all())


@contextmanager
def named_collectives(timeout_seconds: float) -> Iterator[None]:
    """Say which collective failed; what the backend raises says no more than that a peer was late, or is gone.

    Args:
        timeout_seconds: Seconds after which a collective gives up; for the message.

    Raises:
        CollectiveError: From the backend's error. NCCL's watchdog ends the process itself and names the collective.
    """
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, torch.distributed.DistError):
            raise
        which = last_collective() or "a collective"
        raise CollectiveError(
            f"rank {dist.get_global_rank()}: {which} failed: another rank did not join it within "
            f"dist_timeout, {timeout_seconds:g} seconds, or has ended ({error})"
        ) from error


def last_collective(only_unfinished: bool = False) -> str:
    """Describe the collective that this rank began last, from torch's flight recorder, which is on by default.

    Empty where there is none, or, with ``only_unfinished``, where it is not one of NCCL that goes on.
    """
    with_nccl = torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"
    recorder = "_dump_nccl_trace_json" if with_nccl else "_dump_fr_trace_json"
    trace = json.loads(getattr(torch._C._distributed_c10d, recorder)(True, False))
    if not trace.get("entries"):
        return ""
    last = trace["entries"][-1]
    if only_unfinished and (not last["profiling_name"].startswith("nccl") or last.get("state") == "completed"):
        return ""
    operands = [f"{dtype}{size}" for dtype, size in zip(last["input_dtypes"], last["input_sizes"], strict=True)]
    number, group = last["collective_seq_id"], last["process_group"][1]
    return f"{last['profiling_name']}({', '.join(operands)}), number {number} of group {group}"
