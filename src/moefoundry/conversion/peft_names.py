"""Names and shapes that adapters have in peft's files.

An adapter of a linear layer is two matrices under the layer's name, ``lora_A.weight`` [R, I] and ``lora_B.weight``
[O, R]. Experts are one of two kinds:

    separate   each expert is three linear layers: models of transformers 4
    fused      all experts are two parameters, gate and up in one: models of transformers 5. peft has an adapter of such
               a parameter (``target_parameters``) as one matrix A [E * R, I], expert by expert, and one matrix
               B [O, R * E], rank by rank. Gate and up have A's of their own here, so their fused adapter has rank 2 R,
               and B consists of two blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from moefoundry.config import ModelConfig, UserError
from moefoundry.conversion.families.family import Family, Piece
from moefoundry.conversion.fused_experts import EXPERT, ROW_PART

PREFIX = "base_model.model."
MERGE = "merge the adapters instead: --merge, or moefoundry convert merge"


class ExpertKind(StrEnum):
    """Experts of the model that adapters are loaded into."""

    fused = "fused"
    separate = "separate"


@dataclass(frozen=True)
class Slot:
    """A place of an adapter in peft's files.

    Attributes:
        module: Name of the module that holds the adapter, with peft's prefix left out.
        target: Name of the parameter, or of the module, that is adapted.
        weights: Our weights that it adapts, with their rows above each other.
        expert: Index of the expert, where each is a layer of its own.
        stacked: True for all experts in one.
    """

    module: str
    target: str
    weights: tuple[str, ...]
    expert: int | None = None
    stacked: bool = False

    @property
    def keys(self) -> tuple[str, str]:
        """Names of A and B in the file."""
        return f"{PREFIX}{self.module}.lora_A.weight", f"{PREFIX}{self.module}.lora_B.weight"

    @property
    def magnitude_key(self) -> str:
        """Name of DoRA's magnitudes in the file."""
        return f"{PREFIX}{self.module}.lora_magnitude_vector"


def slots(family: Family, cfg: ModelConfig, kind: ExpertKind, weights: Iterable[str]) -> list[Slot]:
    """List where the adapters of ``weights`` are in the files of a family's model.

    Raises:
        UserError: The family has one of the weights as a part of another, or transposed.
    """
    wanted = set(weights)
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for piece in family.pieces(cfg):
        if piece.name in wanted:
            pieces[piece.name].append(piece)
    found: list[Slot] = []
    fused: dict[str, list[str]] = {}
    for name, parts in pieces.items():
        for piece in parts:
            _check(piece, family)
            if piece.expert is None:
                module = _loaded_name(piece, family, kind).removesuffix(".weight")
                found.append(Slot(module, module, (name,)))
            elif kind == ExpertKind.separate:
                module = piece.hf_name.removesuffix(".weight")
                found.append(Slot(module, module, (name,), piece.expert))
        if kind == ExpertKind.fused and parts[0].expert is not None:
            fused.setdefault(_fused_target(parts[0], family), []).append(name)
    return found + list(_stacked(fused))


def _stacked(fused: dict[str, list[str]]) -> Iterator[Slot]:
    """Name the modules of fused adapters: peft wraps the first parameter of a module inside the second."""
    targets: dict[str, list[str]] = defaultdict(list)
    for target in fused:
        targets[target.rpartition(".")[0]].append(target)
    for module, own in targets.items():
        inside = sorted(own, key=lambda target: not target.endswith("gate_up_proj"))
        for depth, target in enumerate(inside):
            wrapped = ".base_layer" * (len(inside) - 1 - depth)
            yield Slot(f"{module}{wrapped}", target, tuple(fused[target]), stacked=True)


def _loaded_name(piece: Piece, family: Family, kind: ExpertKind) -> str:
    """Name a tensor as a model has it that has loaded the published one: peft's names are those of its modules."""
    name = piece.hf_name
    for part, other in family.names_in_memory.items():
        if kind == ExpertKind.fused and part.startswith("."):  # a module of a block, in transformers 5
            name = name.replace(part, other)
    return name


def _fused_target(piece: Piece, family: Family) -> str:
    match = EXPERT.fullmatch(_loaded_name(piece, family, ExpertKind.fused))
    assert match is not None, "checked"
    return f"{match[1]}.experts.{ROW_PART[piece.name.rpartition('.')[2]][0]}"


def _check(piece: Piece, family: Family) -> None:
    in_part = piece.rows is not None or piece.our_rows is not None or piece.transposed
    if in_part or (piece.expert is not None and not EXPERT.fullmatch(piece.hf_name)):
        raise UserError(
            f"{family.name} has {piece.name} as a part of {piece.hf_name}, which peft cannot adapt alone; " + MERGE
        )


def stack_to_peft(pairs: list[tuple[Tensor, Tensor]], before: int, after: int) -> tuple[Tensor, Tensor]:
    """Make peft's A [E * R', I] and B [O', R' * E] of the adapters of parameters that are fused, R' their ranks' sum.

    Args:
        pairs: A [E, R, I] and B [E, O, R] of each of them that has an adapter.
        before: Rows of the parameter above theirs, which have no adapter.
        after: Rows below theirs.
    """
    a = torch.cat([a for a, _ in pairs], dim=1)
    blocks = [torch.block_diag(*each) for each in zip(*(b.unbind() for _, b in pairs), strict=True)]
    b = torch.nn.functional.pad(torch.stack(blocks), (0, 0, before, after))
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)


def stack_from_peft(a: Tensor, b: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Undo the order of :func:`stack_to_peft`: A [E, R', I] and B [E, O', R']."""
    return a.unflatten(0, (num_experts, -1)), b.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
