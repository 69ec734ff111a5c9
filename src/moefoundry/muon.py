"""Muon: updates of weight matrices are orthogonalized (arXiv 2502.16982). AdamW updates all other parameters.

    momentum <- mu momentum + (1 - mu) gradient
    update   <- orthogonalize((1 - mu) gradient + mu momentum)
    weight   <- (1 - lr decay) weight - lr 0.2 sqrt(max(rows, columns)) update

This is ``torch.optim.Muon`` with ``adjust_lr_fn="match_rms_adamw"``. The elements of an orthogonal matrix have an RMS
of 1 / sqrt(max(rows, columns)), so those of updates have 0.2, as AdamW's usually do, and its rate and decay fit.
Weights of stacked experts [E, F, D] are E matrices. An update needs a whole matrix:

- Matrices that a rank has whole (all in a single process; experts that are divided by their number) are updated there,
  some of a stack at a time.
- Where W ranks have rows of each, they exchange W matrices at a time, in BF16: every rank sends its rows of the i-th to
  rank i, which orthogonalizes it and sends the rows back. The rows of the next W are on their way meanwhile, and those
  of the last W on their way back. All ranks begin the same exchanges in the same order. Each copy of HSDP does so.

An update is rounded to BF16 before it is sent, element by element, so a matrix is the same wherever it is whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod, sqrt
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefoundry.config import MuonConfig, Recipe
from moefoundry.ops.all_to_all import Splits, start_all_to_all, wait_for
from moefoundry.ops.matrices import ELEMENTS_AT_ONCE, is_matrix, largest_first, rows_of_ranks
from moefoundry.ops.newton_schulz import orthogonalize
from moefoundry.optim import ShardAdamW, by_decay, groups_of, shard_of

MOMENTUM = "momentum"
"""Key of the groups that have matrices."""

RMS = 0.2
"""Root mean square of an update's elements."""


def muon_of_recipe(cfg: MuonConfig, model: nn.Module, recipe: Recipe) -> Muon:
    """Make the optimizer of a recipe with ``optimizer.name: muon``."""
    return build_muon(model, cfg)


def build_muon(model: nn.Module, cfg: MuonConfig) -> Muon:
    """Make Muon for a materialized model; ``cfg`` is the recipe's ``optimizer``."""
    decayed, plain = by_decay(model)
    matrices = {name: parameter for name, parameter in decayed.items() if is_matrix(name, parameter.shape)}
    others = [parameter for name, parameter in decayed.items() if name not in matrices]
    groups = [
        *groups_of(matrices.values(), cfg.weight_decay, momentum=cfg.momentum),
        *groups_of(others, cfg.weight_decay),
        *groups_of(plain.values(), 0.0),
    ]
    return Muon(groups, cfg.lr, (cfg.betas[0], cfg.betas[1]), cfg.eps)


class Muon(ShardAdamW):
    """Muon for the groups that have a ``momentum``, AdamW for the others.

    Args:
        groups: Parameter groups, each with its ``weight_decay``. Parameters with a momentum are matrices [R, C], or
            stacks of them [N, R, C]; they may be DTensors whose rows one axis of their mesh divides.
        lr: Learning rate of all.
        betas: Of AdamW.
        eps: Of AdamW.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)

    def _init_group(self, group: dict[str, Any], *tensors: list[Tensor]) -> bool:
        return False if MOMENTUM in group else super()._init_group(group, *tensors)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put a state back; AdamW's own way looks for a ``step`` of every parameter."""
        slots = state["state"]
        of_matrices = {parameter: slots.pop(parameter) for parameter in [*slots] if "step" not in slots[parameter]}
        super().__setstate__(state)
        self.state.update(of_matrices)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. Every rank must have one of the same parameters."""
        loss = super().step(closure)
        for group in self.param_groups:
            if MOMENTUM in group:
                self._update_matrices(group)
        return loss

    def _update_matrices(self, group: dict[str, Any]) -> None:
        divided: dict[dist.ProcessGroup, list[_Rows]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            rows, ranks = self._rows(parameter), _ranks_with_rows(parameter)
            if ranks is None:
                _update_whole(rows, group)
            else:
                divided.setdefault(ranks, []).extend(rows.parts(1))
        for ranks, matrices in divided.items():
            _update_divided(matrices, ranks, group)

    def _rows(self, parameter: nn.Parameter) -> _Rows:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        rows, columns = parameter.shape[-2:]
        weight, gradient, momentum = map(shard_of, (parameter, parameter.grad, state["momentum_buffer"]))
        return _Rows(weight, gradient, momentum, (rows, columns))


class _Rows(NamedTuple):
    """Rows that this rank has of a matrix [R, C] or of each of N stacked ones; the tensors are views of its shards.

    Attributes:
        weight: [r, C] or [N, r, C], and likewise the next two.
        shape: R and C.
    """

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    shape: tuple[int, int]

    def parts(self, size: int) -> Iterator[_Rows]:
        """Take stacks apart, ``size`` matrices at a time."""
        if self.weight.dim() == 2:
            yield self
            return
        for first in range(0, len(self.weight), size):
            part = slice(first, first + size)
            yield _Rows(self.weight[part], self.gradient[part], self.momentum[part], self.shape)

    def update(self, momentum: float) -> Tensor:
        """Take up the gradient, and give the rows that are to be orthogonalized, in BF16."""
        self.momentum.lerp_(self.gradient, 1 - momentum)
        return self.gradient.lerp(self.momentum, momentum).bfloat16()

    def apply(self, update: Tensor, group: dict[str, Any]) -> None:
        """Decay the weight, and add rows of an orthogonal matrix."""
        lr = group["lr"]
        self.weight.mul_(1 - lr * group["weight_decay"])
        self.weight.add_(update, alpha=-lr * (RMS * sqrt(max(self.shape))))


def _ranks_with_rows(parameter: Tensor) -> dist.ProcessGroup | None:
    """Give the ranks that divide the rows of a parameter's matrices; None if this rank has whole ones."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis, placement in enumerate(parameter.placements):
            if placement.is_shard(parameter.dim() - 2) and mesh.size(axis) > 1:
                return mesh.get_group(axis)
    return None


def _update_whole(rows: _Rows, group: dict[str, Any]) -> None:
    for part in rows.parts(max(1, ELEMENTS_AT_ONCE // prod(rows.shape))):
        part.apply(orthogonalize(part.update(group[MOMENTUM])), group)


def _update_divided(matrices: Sequence[_Rows], ranks: dist.ProcessGroup, group: dict[str, Any]) -> None:
    """Update matrices as many at a time as there are ranks; of three exchanges one begins while one ends."""
    ordered, size = sorted(matrices, key=lambda rows: largest_first(rows.shape)), ranks.size()
    exchanges = [_exchange(ordered[first : first + size], ranks, group) for first in range(0, len(ordered), size)]
    for begun in range(len(exchanges) + 2):
        for exchange in reversed(exchanges[max(0, begun - 2) : begun + 1]):
            next(exchange, None)


def _exchange(matrices: Sequence[_Rows], ranks: dist.ProcessGroup, group: dict[str, Any]) -> Iterator[None]:
    """Update one matrix of each of the first ranks, in three parts: send, orthogonalize and send back, apply."""
    size, rank = ranks.size(), ranks.rank()
    own = matrices[rank] if rank < len(matrices) else None
    sizes = [rows.weight.numel() for rows in matrices]
    received = [0] * size if own is None else [rows * own.shape[1] for rows in rows_of_ranks(own.shape[0], size)]
    splits = Splits(sizes + [0] * (size - len(sizes)), received, ranks)
    sent = start_all_to_all(torch.cat([rows.update(group[MOMENTUM]).flatten() for rows in matrices]), splits)
    yield
    whole = wait_for(sent)
    if own is not None:
        whole = orthogonalize(whole.view(*own.weight.shape[:-2], *own.shape)).flatten()
    sent = start_all_to_all(whole, splits.reverse())
    yield
    for rows, update in zip(matrices, wait_for(sent).split(sizes), strict=True):
        rows.apply(update.view_as(rows.weight), group)
