"""Global gradient norm: logged for every step, clipped if the recipe says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor
from torch.distributed.tensor import DTensor

from moefoundry.mesh import by_mesh


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
        parameters = [parameter for parameter in state.model.parameters() if parameter.grad is not None]
        norm = global_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        self.norm = norm
        if self.max_norm is not None and norm.isfinite():  # clipping would spread what is not: see health.py
            for same_mesh in by_mesh(parameters):
                torch.nn.utils.clip_grads_with_norm_(same_mesh, self.max_norm, norm.to(same_mesh[0].dtype))
        logger.log_metrics({"grad_norm": norm.item()})


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
                    dist.all_reduce(square, group=first.device_mesh.get_group(axis))
        squares.append(square)
    return torch.stack(squares).sum().sqrt()
