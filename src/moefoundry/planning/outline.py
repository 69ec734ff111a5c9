"""Sharded model with one block of each kind, which stands for all of them.

Blocks whose parameters have the same names, shapes and dtypes are sharded alike, and those with the same window
compute alike. So a plan shards the first of each
kind, and counts it as often as the model has it: seconds become tenths for deep models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from torch.distributed.tensor import DTensor

from moefoundry.adapters import apply_lora
from moefoundry.config import Recipe
from moefoundry.mesh import MeshDegrees, build_meshes
from moefoundry.model.linear_attention import GatedDeltaNet
from moefoundry.model.transformer import Block, MoETransformer, meta_model
from moefoundry.moe.layer import MoELayer
from moefoundry.parallel import parallelize
from moefoundry.planning.describe import ParameterCounts, parameter_counts
from moefoundry.planning.units import PlannedBlock, Unit, fsdp_units


class Outline:
    """The model of a recipe, not yet sharded.

    Args:
        recipe: The recipe; only ``model`` and ``lora`` matter here.

    Attributes:
        counts: Parameters of the whole model.
        kind: For each of the layers, its index among those that stand for all.
    """

    def __init__(self, recipe: Recipe) -> None:
        model = meta_model(recipe.model)
        if recipe.lora is not None:
            apply_lora(model, recipe.lora)
        self.counts: ParameterCounts = parameter_counts(model)
        kinds: dict[object, int] = {}
        self.kind = [kinds.setdefault(_signature(layer), len(kinds)) for layer in model.layers]
        kept = [model.layers[self.kind.index(index)] for index in range(len(kinds))]
        model.layers = nn.ModuleList(kept)  # type: ignore[assignment]  # typed as what it holds
        self.model = model

    def shard(self, recipe: Recipe, degrees: MeshDegrees) -> ShardedOutline:
        """Shard a copy as in training; one rank has it whole. Needs a process group."""
        model = copy.deepcopy(self.model)
        meshes = build_meshes(degrees, "cpu") if degrees.world_size > 1 else None
        parallelize(model, meshes, recipe.precision, recipe.activation_checkpointing)
        return ShardedOutline(self, model)


class ShardedOutline:
    """The same on a mesh, with all blocks again.

    Attributes:
        blocks: A module for each block of the whole model; those of multi-token prediction are last.
        units: FSDP units of the whole model; none if it is not sharded.
        owned: Elements of all parameters of rank 0, without padding.
        trained: Elements of those that train.
    """

    def __init__(self, outline: Outline, model: MoETransformer) -> None:
        self.model = model
        further = model.blocks[len(model.layers) :]
        self.blocks: list[Block] = [*(model.layers[kind] for kind in outline.kind), *further]
        self.units = _repeated(fsdp_units(model), outline.kind)
        layers = {id(parameter) for layer in model.layers for parameter in layer.parameters()}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in layers]
        held = [*rest, *(parameter for kind in outline.kind for parameter in model.layers[kind].parameters())]
        self.owned = sum(map(local_numel, held))
        self.trained = sum(local_numel(parameter) for parameter in held if parameter.requires_grad)

    def planned_blocks(self, seq_len: int) -> list[PlannedBlock]:
        """List the blocks in order; those of multi-token prediction are last, each with one position less."""
        depth = len(self.model.mtp)
        last = len(self.blocks) - depth
        names = [f"layers.{i}" for i in range(last)] + [f"mtp.{i}" for i in range(depth)]
        lost = [0] * last + list(range(1, depth + 1))
        return [
            PlannedBlock(
                name, isinstance(block.ffn, MoELayer), seq_len - less, isinstance(block.attention, GatedDeltaNet)
            )
            for name, block, less in zip(names, self.blocks, lost, strict=True)
        ]


def local_numel(parameter: nn.Parameter) -> int:
    """Count the elements of this rank's share."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


def _signature(layer: Block) -> object:
    parameters = ((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return layer.window, *parameters


def _repeated(units: Iterable[Unit], kind: list[int]) -> list[Unit]:
    """Give every layer the units of its kind, in the order of the model."""
    units = list(units)
    root = [unit for unit in units if not unit.name.startswith("layers.")]
    layers = []
    for index, of_kind in enumerate(kind):
        prefix = f"layers.{of_kind}"
        own = [unit for unit in units if f"{unit.name}.".startswith(f"{prefix}.")]
        layers += [replace(unit, name=f"layers.{index}{unit.name.removeprefix(prefix)}") for unit in own]
    return [*root[:1], *layers, *root[1:]]
