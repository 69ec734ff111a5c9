"""Optimizer steps of a twin on the ranks of a world, with what they computed kept whole.

Model, losses, counts and optimizer are built by the functions that training uses. Batches are drawn here: rows of two
documents, some with padding, and unlike numbers of targets: where ranks differ, means over a global batch go wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefoundry.build import build_model, wrapped
from moefoundry.callbacks.routing import GlobalBatchBalance
from moefoundry.config import AuxLossScope, MeshConfig, Recipe
from moefoundry.config.making import make_part
from moefoundry.foundry import ComposerMoECausalLM, CountTargets, with_counts
from moefoundry.model.init import fill_by_row
from moefoundry.ops.cross_entropy import IGNORE_INDEX
from moefoundry.parallel import begin_micro_batch, materialize
from moefoundry.verify.twin import ROWS
from moefoundry.world import device_of_rank, setup_meshes, torch_device

STEPS = 2
BIAS = 0.1
"""Largest value of the experts' biases before the first step: at 0, where they start, they decide nothing."""


class Step(NamedTuple):
    """Results of a step, the same on every rank.

    Attributes:
        losses: Losses of the global batch by name, float64 scalars.
        gradients: Whole gradients by parameter, fp32, from the loss backwards; kept of the first step alone.
    """

    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


def train_on(recipe: Recipe, meshes: list[MeshConfig], rows_at_once: int = 1, steps: int = STEPS) -> list[list[Step]]:
    """Train on one mesh after another; every rank calls it. Rank 0 gives the steps of each mesh, the others nothing."""
    found = []
    for mesh in meshes:
        taken = train(replace(recipe, mesh=mesh, device_train_microbatch_size=rows_at_once), steps)
        found.append(taken if dist.get_rank() == 0 else [])
    return found


def train(recipe: Recipe, steps: int = STEPS) -> list[Step]:
    """Take optimizer steps, each on a batch of its own; every rank calls it."""
    wrapper = build(recipe)
    model = wrapper.model
    optimizer = make_part("optimizers", recipe.optimizer.name, "optimizer", recipe.optimizer, model, recipe)
    place = next(model.parameters()).device
    found = []
    for number in range(steps):
        own = {
            name: values.chunk(dist.get_world_size())[dist.get_rank()] for name, values in batch(recipe, number).items()
        }
        losses = backward(wrapper, own, recipe, place)
        found.append(Step(losses, {} if number else whole_gradients(model)))
        optimizer.step()
        optimizer.zero_grad()
    return found


def build(recipe: Recipe) -> ComposerMoECausalLM:
    """Build the model on the recipe's mesh, with its initial weights and experts' biases that decide something."""
    device = device_of_rank()
    meshes = setup_meshes(recipe, device)
    model = build_model(recipe, meshes, device)
    materialize(model, torch_device(device), recipe.seed)
    let_all_count(model, recipe.seed)
    wrapper = wrapped(recipe, model)
    wrapper.train()
    return wrapper


@torch.no_grad()
def let_all_count(model: nn.Module, seed: int) -> None:
    """Move what starts at 0: experts' biases, which then decide nothing, and adapters, half of which learn nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * BIAS)
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if parameter.dim() > 1 and local.numel() and not local.any():
            fill_by_row(name, parameter, seed, lambda row, draw: row.normal_(0.0, BIAS, generator=draw))


def backward(
    wrapper: ComposerMoECausalLM, own: Mapping[str, Tensor], recipe: Recipe, place: torch.device
) -> dict[str, Tensor]:
    """Compute the gradients of a step from this rank's rows, in micro-batches; give the losses of the global batch."""
    state: Any = SimpleNamespace(batch=counted(own, recipe, place), model=wrapper)
    CountTargets().batch_start(state, None)
    if wrapper.model.step_counts is not None:
        GlobalBatchBalance(wrapper.model.step_counts).before_train_batch(state, None)
    rows, at_once = len(own["input_ids"]), recipe.device_train_microbatch_size
    assert isinstance(at_once, int), "twins have a size"
    total: dict[str, Tensor] = {}
    for first in range(0, rows, at_once):
        part = counted({name: values[first : first + at_once] for name, values in own.items()}, recipe, place)
        share = len(part["input_ids"]) / rows
        begin_micro_batch(wrapper, first + at_once >= rows)
        losses = wrapper.loss(wrapper(part), part)
        (losses["total"] * share).backward()
        for name, loss in losses.items():
            total[name] = total.get(name, 0.0) + loss.detach().double().cpu() * share
    return {name: mean_over_ranks(loss, place) for name, loss in total.items()}


def mean_over_ranks(value: Tensor, place: torch.device) -> Tensor:
    """Average a scalar over the ranks."""
    value = value.to(place)
    dist.all_reduce(value)
    return value.cpu() / dist.get_world_size()


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gather the gradients of all parameters, from the last to the first, as backward computes them."""
    found = {}
    for name, parameter in reversed([*model.named_parameters()]):
        if parameter.grad is not None:
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            found[name] = gradient.detach().float().cpu().clone()
    return found


def batch(recipe: Recipe, number: int = 0, padded: bool = True) -> dict[str, Tensor]:
    """Draw a global batch.

    Args:
        recipe: The twin.
        number: Number of the batch.
        padded: Let some rows end in padding, and some positions have no target.
    """
    generator = torch.Generator().manual_seed(recipe.seed + number)
    length = recipe.max_seq_len
    tokens_BS = torch.randint(recipe.model.vocab_size, (ROWS, length), generator=generator)
    labels_BS, documents_BS = tokens_BS.clone(), torch.zeros_like(tokens_BS)
    documents_BS[:, length // 3 :] = 1
    if padded:
        for row in range(ROWS):
            labels_BS[row, : 1 + row * length // (3 * ROWS)] = IGNORE_INDEX
        for row in range(0, ROWS, 3):
            documents_BS[row, length - length // 4 :] = -1
            labels_BS[row, length - length // 4 :] = IGNORE_INDEX
    found = {"input_ids": tokens_BS, "labels": labels_BS, "sequence_id": documents_BS}
    if recipe.dpo is not None:
        found["reference"] = -length * torch.rand(ROWS, 2, generator=generator)
    return found


def counted(rows: Mapping[str, Tensor], recipe: Recipe, place: torch.device) -> dict[str, Any]:
    """Add the counts that training adds to a batch, and bring it to its device."""
    found = with_counts(rows, document_masking=recipe.model.document_masking)
    return {name: value.to(place) if isinstance(value, Tensor) else value for name, value in found.items()}


def rows_at_once(recipe: Recipe, ranks: int, most: int = 1) -> int:
    """Choose micro-batches with which the recipe computes the same on every mesh, by the definitions of its keys.

    Equally many rows each, so that micro-batches are the same sequences everywhere. With ``aux_loss_scope:
    global_batch`` the loss runs over the micro-batches of a step, and only one micro-batch a step has the value of the
    whole.
    """
    return ROWS // ranks if recipe.model.moe.balance.aux_loss_scope == AuxLossScope.global_batch else most
