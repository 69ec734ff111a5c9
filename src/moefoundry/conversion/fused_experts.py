"""Experts that transformers 5 has fused into one tensor, read as one tensor for each.

    experts.gate_up_proj  [E, 2F, D]   experts.{e}.gate_proj.weight [F, D] above experts.{e}.up_proj.weight [F, D]
    experts.down_proj     [E, D, F]    experts.{e}.down_proj.weight [D, F]

Its models have them so in memory, and may be saved so; some have other names then (``Family.names_in_memory``).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.config import ModelConfig, UserError
from moefoundry.conversion.families.family import Family, Piece
from moefoundry.conversion.safetensors_io import SafetensorsReader

EXPERT = re.compile(r"(.+)\.experts\.\d+\.\w+\.weight")
ROW_PART = {"gate_proj": ("gate_up_proj", 0, 2), "up_proj": ("gate_up_proj", 1, 2), "down_proj": ("down_proj", 0, 1)}


class _Part(NamedTuple):
    """Rows ``first`` to ``first + rows`` of one expert of a fused tensor."""

    fused: str
    expert: int
    first: int
    rows: int


class SplitExperts:
    """Tensors of a directory, with fused experts as one tensor for each.

    Args:
        tensors: Tensors of the files.
        family, cfg: Family and model, which say the names of the experts.

    Attributes:
        specs: Shapes and dtypes by name.

    Raises:
        UserError: A fused tensor does not hold as many experts as the model has.
    """

    def __init__(self, tensors: SafetensorsReader, family: Family, cfg: ModelConfig) -> None:
        self._tensors = tensors
        self._parts: dict[str, _Part] = {}
        self._renamed: dict[str, str] = {}
        self._in_memory = family.names_in_memory
        for piece in family.pieces(cfg):
            if piece.hf_name in tensors.specs:
                continue
            if other := next((name for name in self._others(piece.hf_name) if name in tensors.specs), ""):
                self._renamed[piece.hf_name] = other
            elif piece.expert is not None and (match := EXPERT.fullmatch(piece.hf_name)):
                self._find(piece, piece.expert, match[1], cfg.moe.num_experts)
        taken = {part.fused for part in self._parts.values()} | set(self._renamed.values())
        self.specs = {name: spec for name, spec in tensors.specs.items() if name not in taken}
        self.specs |= {name: tensors.specs[there] for name, there in self._renamed.items()}
        for name, part in self._parts.items():
            _, _, columns = tensors.specs[part.fused].shape
            self.specs[name] = TensorSpec((part.rows, columns), tensors.specs[part.fused].dtype)

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """Read a tensor, or the part in ``ranges`` of its leading dims; it may be a view of the mapped file."""
        if name not in self._parts:
            return self._tensors.read(self._renamed.get(name, name), *ranges)
        fused, expert, first, rows = self._parts[name]
        start, stop = ranges[0] if ranges else (0, rows)
        return self._tensors.read(fused, (expert, expert + 1), (first + start, first + stop), *ranges[1:])[0]

    def _others(self, name: str) -> list[str]:
        """Other names that a tensor or module may have."""
        return [name.replace(part, other) for part, other in self._in_memory.items() if part in name]

    def _find(self, piece: Piece, expert: int, module: str, num_experts: int) -> None:
        """Note the place of an expert's weight, if a fused tensor has it."""
        fused_name, part, parts = ROW_PART[piece.name.rpartition(".")[2]]
        stored = self._tensors.specs
        for there in (f"{module}.experts", *self._others(f"{module}.experts")):
            spec = stored.get(f"{there}.{fused_name}")
            if spec is None or len(spec.shape) != 3:
                continue
            _check_shape(f"{there}.{fused_name}", spec.shape, num_experts)
            rows = spec.shape[1] // parts
            self._parts[piece.hf_name] = _Part(f"{there}.{fused_name}", expert, part * rows, rows)


def _check_shape(fused: str, shape: tuple[int, ...], num_experts: int) -> None:
    if shape[0] != num_experts:
        raise UserError(f"{fused}: has shape {shape}, and the model has {num_experts} experts a layer")
    if fused.endswith("gate_up_proj") and shape[1] % 2:
        raise UserError(f"{fused}: has shape {shape}, and holds two matrices of equally many rows")
