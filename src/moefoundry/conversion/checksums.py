"""Checksums of the tensors that went into a conversion and of those that come out of what it has written.

What was written is read again and mapped back, so a tensor that was dropped, doubled or cut has another checksum, or
none. Both sides are read a range of rows at a time.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.out_of_core import StoredTensors, row_ranges
from moefoundry.checkpoint.weights import PREFIX
from moefoundry.config import ModelConfig, UserError
from moefoundry.config.errors import first_few
from moefoundry.conversion.families.family import Family
from moefoundry.conversion.fused_experts import SplitExperts
from moefoundry.conversion.hf_directory import HfDirectory
from moefoundry.conversion.safetensors_io import SafetensorsReader
from moefoundry.conversion.tensor_map import Dtype, Source, TensorMap


@dataclass(frozen=True)
class Checksums:
    """Checksums of a conversion, equal on both sides.

    Attributes:
        values: SHA-256 by tensor, or by expert of a stacked tensor, in the dtype that is stored.
    """

    values: dict[str, str]

    def __str__(self) -> str:
        experts = sum(".experts." in name for name in self.values)
        biases = sum(name.rpartition(".")[2].endswith("bias") for name in self.values)
        return (
            f"{len(self.values)} checksums of what went in and what came out are equal, {experts} of experts and "
            f"{biases} of biases among them"
        )


def checksums_of_import(source: HfDirectory, specs: Mapping[str, TensorSpec], checkpoint: Path) -> Checksums:
    """Compare the tensors of a Hugging Face directory with those that an export of ``checkpoint`` would have.

    Args:
        source: The directory.
        specs: Shapes and dtypes of the checkpoint's tensors.
        checkpoint: What was written.

    Raises:
        UserError: Some differ; the message names them.
    """
    written, names = StoredTensors(checkpoint, PREFIX), source.names
    wide = names.their_specs(specs, Dtype.keep)

    def of_source(name: str) -> Iterator[Tensor]:
        return (values.to(wide[name].dtype) for values in _rows(source.tensors, name))

    stored = {name: spec for name, spec in wide.items() if name in source.tensors.specs.keys() - names.unused.keys()}
    went_in = {name: _digest(of_source(name)) for name in stored}
    came_out = {name: _digest(names.their_blocks(name, written, spec)) for name, spec in stored.items()}
    return _equal(went_in, came_out, checkpoint)


def checksums_of_export(
    ours: Source, family: Family, cfg: ModelConfig, specs: Mapping[str, TensorSpec], hf: Path
) -> Checksums:
    """Compare the tensors of a checkpoint with those that an import of ``hf`` would have.

    Args:
        ours: Tensors of the checkpoint.
        family: Family of the directory.
        cfg: The model that it holds.
        specs: Shapes and dtypes of the directory's tensors.
        hf: What was written.

    Raises:
        UserError: Some differ; the message names them.
    """
    names = TensorMap(family, cfg)
    wide = names.our_specs(specs, Dtype.keep)
    went_in: dict[str, str] = {}
    for name, spec in wide.items():
        if name not in ours.specs or (cfg.tie_embeddings and name == "lm_head.weight"):
            continue
        for expert in range(spec.shape[0]) if _is_stacked(name) else [None]:
            rows = _rows(ours, name, expert)
            went_in[_key(name, expert)] = _digest(values.to(spec.dtype) for values in rows)
    hashes: dict[str, _RowsInOrder] = defaultdict(_RowsInOrder)
    for block in names.our_blocks(SplitExperts(SafetensorsReader(hf), family, cfg), wide):
        if _is_stacked(block.name):
            expert, *offsets = block.offsets
            hashes[_key(block.name, expert)].add(offsets, block.values[0])
        else:
            hashes[block.name].add(block.offsets, block.values)
    came_out = {name: each.hash.hexdigest() for name, each in hashes.items()}
    return _equal(went_in, {name: came_out.get(name, "") for name in went_in}, hf)


class _RowsInOrder:
    """Checksum of a tensor whose rows may come in any order; those that come too early are kept until their turn."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._row = 0
        self._early: dict[int, Tensor] = {}

    def add(self, offsets: Sequence[int], values: Tensor) -> None:
        """Take consecutive whole rows, of which ``offsets`` has the place of the first."""
        first = offsets[0] if offsets else 0
        self._early[first] = values if first == self._row else values.clone()
        while (rows := self._early.pop(self._row, None)) is not None:
            self.hash.update(_bytes(rows))
            self._row += len(rows) if rows.dim() else 1


def _equal(went_in: dict[str, str], came_out: dict[str, str], where: Path) -> Checksums:
    if different := [name for name in went_in if went_in[name] != came_out[name]]:
        raise UserError(f"{where}: tensors that are not what went in:\n  " + first_few(different, "\n  "))
    return Checksums(went_in)


def _is_stacked(name: str) -> bool:
    return ".experts." in name


def _key(name: str, expert: int | None) -> str:
    return name if expert is None else f"{name}[{expert}]"


def _rows(source: Source, name: str, expert: int | None = None) -> Iterator[Tensor]:
    """Read a tensor, or an expert of a stacked one, a range of rows at a time."""
    shape, dtype = source.specs[name]
    first = [] if expert is None else [(expert, expert + 1)]
    spec = TensorSpec(shape[len(first) :], dtype)
    if not spec.shape:
        yield source.read(name, *first)
        return
    for rows in row_ranges(spec):
        yield source.read(name, *first, rows)


def _digest(blocks: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for values in blocks:
        found.update(_bytes(values))
    return found.hexdigest()


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data
