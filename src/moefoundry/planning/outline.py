"""Model of a recipe as plans see it: its parameters, and the units in which rank 0 of a mesh has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from moefoundry.config import Compute, Fp8Recipe, Gather, PrecisionConfig, Recipe
from moefoundry.mesh import MeshDegrees
from moefoundry.planning import stages
from moefoundry.planning.describe import ParameterCounts, count_parameters
from moefoundry.planning.fp8_weights import bytes_in_fp8, names_in_fp8
from moefoundry.planning.matrices import Matrices, matrices_of
from moefoundry.planning.units import PlannedBlock, Unit, unit_of
from moefoundry.planning.weights import (
    EMBEDDING,
    EXPERTS,
    Weight,
    all_blocks,
    check_targets,
    mtp_weights,
    named_weights,
    root_weights,
)
from moefoundry.planning.work import Work, block_work, takes_mask


class Outline:
    """The model of a recipe, not yet sharded.

    Args:
        recipe: The recipe; only ``model`` and ``lora`` matter here.

    Attributes:
        cfg: The recipe's ``model``.
        counts: Parameters of the whole model.
        blocks: Parameters of each block; those of multi-token prediction are last, and equal blocks share a list.
        mtp: Parameters of a module of multi-token prediction, without its block.
        root: Parameters of the rest.

    Raises:
        ConfigError: ``lora`` has targets that the model lacks.
    """

    def __init__(self, recipe: Recipe) -> None:
        cfg, self.lora = recipe.model, recipe.lora
        self.cfg = cfg
        if recipe.lora is not None:
            check_targets(cfg, recipe.lora)
        self.counts: ParameterCounts = count_parameters(cfg, recipe.lora)
        self.blocks = all_blocks(cfg, recipe.lora)
        self._works: dict[tuple[int, int], list[Work]] = {}
        self._in_fp8: dict[tuple[str, ...], tuple[int, int]] = {}
        self._gathered_in_fp8: dict[tuple[str, ...], frozenset[str]] = {}
        full = recipe.lora is None
        self.mtp = [replace(weight, trained=weight.trained and full) for weight in mtp_weights(cfg)]
        self.root = [replace(weight, trained=weight.trained and full) for weight in root_weights(cfg)]

    def weights(self) -> Iterator[tuple[Weight, int]]:
        """Yield the parameters with the number of their equals, which other blocks and modules have."""
        yield from ((weight, 1) for weight in self.root)
        yield from ((weight, self.cfg.mtp.depth) for weight in self.mtp)
        times, lists = Counter(map(id, self.blocks)), {id(weights): weights for weights in self.blocks}
        yield from ((weight, times[key]) for key, weights in lists.items() for weight in weights)

    def works(self, seq_len: int, c: int) -> list[Work]:
        """Count the work of every block, a token of a sequence; arguments as of :func:`~.work.block_work`."""
        if (seq_len, c) not in self._works:
            cfg, found = self.cfg, []
            for index, weights in enumerate(self.blocks):
                positions = seq_len - max(0, index + 1 - cfg.n_layers)
                found.append(block_work(cfg, index, weights, seq_len, c).times(positions / seq_len))
            self._works[seq_len, c] = found
        return self._works[seq_len, c]

    def bytes_in_fp8(self, exclude: tuple[str, ...]) -> tuple[int, int]:
        """Compute :func:`~moefoundry.planning.fp8_weights.bytes_in_fp8` of all parameters."""
        if exclude not in self._in_fp8:
            self._in_fp8[exclude] = bytes_in_fp8(named_weights(self.cfg, self.lora), exclude)
        return self._in_fp8[exclude]

    def gathered_in_fp8(self, precision: PrecisionConfig) -> frozenset[str]:
        """Collect the names of the weights that FSDP gathers in FP8 where the blocks of shards are whole."""
        exclude = tuple(precision.fp8.exclude)
        fp8 = precision.fp8
        if fp8.recipe != Fp8Recipe.deepseek_v3 or not fp8.fsdp_all_gather or self.lora is not None:
            return frozenset()
        if exclude not in self._gathered_in_fp8:
            self._gathered_in_fp8[exclude] = names_in_fp8(named_weights(self.cfg), exclude)
        return self._gathered_in_fp8[exclude]

    def shard(self, recipe: Recipe, degrees: MeshDegrees) -> ShardedOutline:
        """Shard the model as training does; one rank has it whole."""
        return ShardedOutline(self, recipe.precision, degrees)


class ShardedOutline:
    """The same on a mesh.

    Attributes:
        outline: The model.
        degrees: Degrees of the mesh.
        units: FSDP units, parents before children; none if the model is not sharded.
        owned: Elements of all parameters of rank 0, without padding.
        trained: Elements of those that train.
    """

    def __init__(self, outline: Outline, precision: PrecisionConfig, degrees: MeshDegrees) -> None:
        self.outline, self.degrees = outline, degrees
        self.units: list[Unit] = []
        self._planned: dict[int, list[PlannedBlock]] = {}
        if degrees.world_size > 1:
            self.units = list(_units(outline, precision, degrees))
            self.owned = sum(unit.shard_numel for unit in self.units)  # rank 0 has whole chunks
            self.trained = sum(unit.trained_shard_numel for unit in self.units)
        else:
            counts = outline.counts
            self.owned = counts.total + counts.mtp
            self.trained = self.owned - counts.frozen

    @cached_property
    def matrices(self) -> Matrices:
        """The matrices that Muon updates."""
        return matrices_of(self.outline.weights(), self.degrees)

    def planned_blocks(self, seq_len: int) -> list[PlannedBlock]:
        """List the blocks in order; those of multi-token prediction are last, each with one position less."""
        if seq_len not in self._planned:
            self._planned[seq_len] = self._plan_blocks(seq_len)
        return self._planned[seq_len]

    def _plan_blocks(self, seq_len: int) -> list[PlannedBlock]:
        cfg, names = self.outline.cfg, block_names(self.outline)
        groups = {id(weights): _groups(weights, self.degrees.expert) for weights in self.outline.blocks}
        return [
            PlannedBlock(
                name=name,
                sparse=not cfg.is_dense(index),
                positions=seq_len - max(0, index + 1 - cfg.n_layers),
                linear=cfg.is_linear(index),
                masked=takes_mask(cfg, index, seq_len),
                weights=groups[id(self.outline.blocks[index])],
            )
            for index, name in enumerate(names)
        ]


def block_names(outline: Outline) -> list[str]:
    """List the names of the blocks, or of the multi-token-prediction modules around them."""
    cfg = outline.cfg
    return [f"layers.{index}" for index in range(cfg.n_layers)] + [f"mtp.{index}" for index in range(cfg.mtp.depth)]


def _units(outline: Outline, precision: PrecisionConfig, degrees: MeshDegrees) -> Iterator[Unit]:
    # The root stays gathered after the forward pass, since the backward pass begins with it.
    apart = [] if outline.cfg.tie_embeddings else [weight for weight in outline.root if weight.of_embedding]
    yield unit_of("", [weight for weight in outline.root if weight not in apart], precision, degrees, gathers=1)
    if apart:
        yield unit_of(EMBEDDING, apart, precision, degrees, gathers=1)  # the backward pass does not read it
    in_fp8 = outline.gathered_in_fp8(precision)
    gathers = 2 if degrees.gather == Gather.each_pass else 1
    made: dict[tuple[int, frozenset[str]], list[Unit]] = {}
    for name, weights in zip(block_names(outline), outline.blocks, strict=True):
        block = name
        if name.startswith("mtp."):
            yield unit_of(name, outline.mtp, precision, degrees, gathers, _names(name, outline.mtp, in_fp8))
            block = f"{name}.block"
        key = id(weights), _names(block, weights, in_fp8)
        if key not in made:
            made[key] = list(_block_units(weights, precision, degrees, gathers, key[1]))
        for unit in made[key]:
            yield replace(unit, name=f"{block}.{unit.name}" if unit.name else block)


def _names(module: str, weights: Sequence[Weight], chosen: Collection[str]) -> frozenset[str]:
    """Collect the names, in their module, of weights whose full names are chosen."""
    return frozenset(weight.name for weight in weights if chosen and f"{module}.{weight.name}" in chosen)


def _block_units(
    weights: Sequence[Weight], precision: PrecisionConfig, degrees: MeshDegrees, gathers: int, in_fp8: Collection[str]
) -> Iterator[Unit]:
    """Yield the units of a block, named by their modules in it; the block's own has no name."""
    groups: dict[str, list[Weight]] = {"": []}
    for weight in weights:
        module = weight.wide_module if precision.compute == Compute.bf16 else None
        if degrees.expert > 1 and weight.of_experts:
            module = EXPERTS
        groups.setdefault(module or "", []).append(weight)
    for module, members in groups.items():
        yield unit_of(module, members, precision, degrees, gathers, in_fp8)


def _groups(weights: Sequence[Weight], expert_ranks: int) -> dict[str, int]:
    """Count the elements that train of each group."""
    found = dict.fromkeys((stages.EXPERTS, stages.FFN, stages.ATTENTION), 0)
    for weight in weights:
        group = stages.EXPERTS if weight.of_experts else stages.FFN if "ffn" in weight.name else stages.ATTENTION
        found[group] += weight.numel // (expert_ranks if weight.of_experts else 1) if weight.trained else 0
    return found
