"""Map between our tensors and those of a family, made of the family's pieces.

Both directions yield one block at a time, cut into rows where it is large, so a conversion needs memory for a block and
not for a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from functools import reduce
from typing import Protocol, cast

import torch
from torch import Tensor

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.out_of_core import ShardValues, row_ranges
from moefoundry.config import ModelConfig, UserError
from moefoundry.config.errors import first_few
from moefoundry.conversion.families.family import Piece
from moefoundry.model.transformer import meta_model

ROTARY = ("rotary_emb.inv_freq", "rotary_embedding.inv_freq")
NAMED = 4  # tensors of each kind of error


class Dtype(StrEnum):
    """Type that parameters are stored as; ``keep`` leaves them as they are. Buffers never change."""

    fp32 = "fp32"
    bf16 = "bf16"
    keep = "keep"

    @property
    def torch(self) -> torch.dtype | None:
        """The dtype of torch; None for ``keep``."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(self.value)


class Source(Protocol):
    """Tensors that are read by ranges of their leading dims."""

    specs: dict[str, TensorSpec]

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor: ...


class Pieces(Protocol):
    """The tensors of another project's model, in pieces of ours; ``Family`` explains the methods."""

    def pieces(self, cfg: ModelConfig) -> Iterator[Piece]: ...

    def copies(self, cfg: ModelConfig) -> dict[str, str]: ...

    def unused_tensors(self, cfg: ModelConfig) -> dict[str, tuple[int, ...]]: ...


class TensorMap:
    """Our tensors and a family's, for one model.

    Attributes:
        shapes: Shapes of our tensors, by name in ``MoETransformer.state_dict()``.
        their_shapes: Shapes of the family's.
        copies: Tensors of the family that repeat another: name -> the other's.
        unused: Tensors of the family for parts that the model lacks: name -> shape.
    """

    def __init__(self, family: Pieces, cfg: ModelConfig) -> None:
        model = meta_model(cfg)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._buffers = {name for name, _ in model.named_buffers()}
        self.copies = family.copies(cfg)
        self.unused = family.unused_tensors(cfg)
        self._ours: dict[str, list[Piece]] = defaultdict(list)
        self._theirs: dict[str, list[Piece]] = defaultdict(list)
        for piece in family.pieces(cfg):
            self._ours[piece.name].append(piece)
            self._theirs[piece.hf_name].append(piece)
        if cfg.tie_embeddings:
            self._ours["lm_head.weight"] = [
                replace(piece, name="lm_head.weight") for piece in self._ours["embed_tokens.weight"]
            ]
        for pieces in self._theirs.values():
            pieces.sort(key=lambda piece: (piece.part or 0, piece.rows or (0, 0), piece.columns or (0, 0)))
        self.their_shapes = {name: self._their_shape(pieces) for name, pieces in self._theirs.items()}

    def _block_shape(self, piece: Piece) -> tuple[int, ...]:
        """Return the shape of our block, without the expert's dim."""
        shape = self.shapes[piece.name][piece.expert is not None :]
        return shape if piece.our_rows is None else (piece.our_rows[1] - piece.our_rows[0], *shape[1:])

    def _their_shape(self, pieces: list[Piece]) -> tuple[int, ...]:
        shapes = [self._block_shape(piece)[:: -1 if piece.transposed else 1] for piece in pieces]
        parts = 1 + max(piece.part or 0 for piece in pieces)
        if pieces[0].columns is not None:
            whole = *shapes[0][:-1], shapes[0][-1] * pieces[0].columns[1]
            return whole if pieces[0].part is None else (parts, *whole)
        if pieces[0].part is not None:
            rows = sum(shape[0] for piece, shape in zip(pieces, shapes, strict=True) if piece.part == 0)
            return (parts, rows, *shapes[0][1:])
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    # -------------------------------------------------------------------------------------------------- theirs to ours

    def check_theirs(self, specs: Mapping[str, TensorSpec], where: object) -> None:
        """Check that a family's checkpoint is whole.

        Raises:
            UserError: Names tensors that are missing, or have another shape, or belong to no such model, or are of
                integers.
        """
        copied = {name: self.their_shapes[original] for name, original in self.copies.items() if name in specs}
        known = {
            name: spec
            for name, spec in specs.items()
            if name not in self.unused and not name.endswith(ROTARY)  # older transformers stored these
        }
        check_tensors(known, self.their_shapes | copied, where)
        integers = [f"{name}: {spec.dtype}" for name, spec in known.items() if not spec.dtype.is_floating_point]
        if integers:
            raise UserError(f"{where}: weights must be floating-point numbers, not {first_few(integers)}")

    def check_copies(self, theirs: Source, where: object) -> None:
        """Check that tensors which must repeat others do.

        Raises:
            UserError: Names those that differ; the model would not be the same without them.
        """
        different = [
            f"{name} differs from {original}"
            for name, original in self.copies.items()
            if name in theirs.specs and not _equal(theirs, name, original)
        ]
        if different:
            raise UserError(f"{where}: tensors that must be copies are not:\n  " + first_few(different, "\n  "))

    def our_specs(self, theirs: Mapping[str, TensorSpec], dtype: Dtype) -> dict[str, TensorSpec]:
        """Return shapes and dtypes of our tensors, as :meth:`our_blocks` makes them."""
        return {
            name: TensorSpec(shape, self._dtype(name, (theirs[piece.hf_name] for piece in self._ours[name]), dtype))
            for name, shape in self.shapes.items()
        }

    def our_blocks(self, theirs: Source, specs: Mapping[str, TensorSpec]) -> Iterator[ShardValues]:
        """Yield the values of our tensors, tensor by tensor."""
        for name, spec in specs.items():
            for piece in self._ours[name]:
                for row, values in self._pieces_from(theirs, piece, spec):
                    row += piece.our_rows[0] if piece.our_rows else 0
                    offsets = (row, *(0 for _ in values.shape[1:])) if values.dim() else ()
                    if piece.expert is not None:
                        offsets, values = (piece.expert, *offsets), values.unsqueeze(0)
                    yield ShardValues(name, offsets, values.to(spec.dtype))

    def _pieces_from(self, theirs: Source, piece: Piece, spec: TensorSpec) -> Iterator[tuple[int, Tensor]]:
        shape = self._block_shape(piece)
        if piece.transposed or piece.columns or not shape:
            part = [] if piece.part is None else [(piece.part, piece.part + 1)]
            block = theirs.read(piece.hf_name, *part, *([piece.rows] if piece.rows else []))
            yield 0, piece.of_their_block(block[0] if part else block).contiguous()
            return
        first = piece.rows[0] if piece.rows else 0
        for start, stop in row_ranges(TensorSpec(shape, spec.dtype)):
            rows = first + start, first + stop
            if piece.part is None:
                yield start, theirs.read(piece.hf_name, rows)
            else:
                yield start, theirs.read(piece.hf_name, (piece.part, piece.part + 1), rows)[0]

    # -------------------------------------------------------------------------------------------------- ours to theirs

    def their_specs(self, ours: Mapping[str, TensorSpec], dtype: Dtype) -> dict[str, TensorSpec]:
        """Return shapes and dtypes of the family's tensors, as :meth:`their_blocks` makes them.

        Copies are among them, but for a tied head's, which transformers makes itself. Tensors without elements are not:
        transformers warns of that, and vLLM takes no such file.
        """
        specs = {}
        for name, shape in self.their_shapes.items():
            sources = [piece.name for piece in self._theirs[name]]
            specs[name] = TensorSpec(shape, self._dtype(sources[0], (ours[source] for source in sources), dtype))
        copies = {name: specs[other] for name, other in self.copies.items() if name != "lm_head.weight"}
        dtype_of_unused = next(iter(specs.values())).dtype
        unused = {name: TensorSpec(shape, dtype_of_unused) for name, shape in self.unused.items() if 0 not in shape}
        return specs | copies | unused

    def their_blocks(self, name: str, ours: Source, spec: TensorSpec) -> Iterator[Tensor]:
        """Yield the values of one tensor of the family, cut into rows."""
        if name in self.unused:
            yield torch.zeros(spec.shape, dtype=spec.dtype)
        pieces = self._theirs.get(self.copies.get(name, name), [])
        if pieces and pieces[0].columns is not None:
            yield from self._columns_in_turn(pieces, ours, spec)
            return
        for piece in pieces:
            shape = self._block_shape(piece)
            expert = [] if piece.expert is None else [(piece.expert, piece.expert + 1)]
            if piece.transposed or not shape:
                yield self._block_from(ours, piece, spec)
                continue
            first = piece.our_rows[0] if piece.our_rows else 0
            for start, stop in row_ranges(TensorSpec(shape, spec.dtype)):
                rows = first + start, first + stop
                yield ours.read(piece.name, *expert, rows).view(-1, *shape[1:]).to(spec.dtype)

    def _block_from(self, ours: Source, piece: Piece, spec: TensorSpec) -> Tensor:
        """Read the whole block of a piece, in their orientation."""
        expert = [] if piece.expert is None else [(piece.expert, piece.expert + 1)]
        block = ours.read(piece.name, *expert).view(self._block_shape(piece)).to(spec.dtype)
        return block.T if piece.transposed else block

    def _columns_in_turn(self, pieces: list[Piece], ours: Source, spec: TensorSpec) -> Iterator[Tensor]:
        """Yield the rows of a tensor whose columns come from several pieces in turn."""
        step = cast(tuple[int, int], pieces[0].columns)[1]
        for start in range(0, len(pieces), step):
            blocks = [self._block_from(ours, piece, spec) for piece in pieces[start : start + step]]
            yield torch.stack(blocks, dim=-1).flatten(-2)

    def _dtype(self, name: str, sources: Iterable[TensorSpec], dtype: Dtype) -> torch.dtype:
        stored = reduce(torch.promote_types, (spec.dtype for spec in sources))
        return stored if name in self._buffers else dtype.torch or stored


def check_tensors(specs: Mapping[str, TensorSpec], shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Check that tensors are those of a model.

    Raises:
        UserError: Names some of those that are missing, have another shape, or are not expected, and says how many more
            there are of each kind.
    """
    kinds = {
        "missing": [name for name in shapes if name not in specs],
        "of another shape": [
            f"{name}: has shape {specs[name].shape}, not {shape}"
            for name, shape in shapes.items()
            if name in specs and specs[name].shape != shape
        ],
        "not expected": [name for name in specs if name not in shapes],
    }
    lines = []
    for kind, names in kinds.items():
        lines += [name if ": " in name else f"{name}: {kind}" for name in names[:NAMED]]
        lines += [f"... and {len(names) - NAMED} more {kind}"] if len(names) > NAMED else []
    if lines:
        raise UserError(f"{where} does not hold the tensors of its model:\n  " + "\n  ".join(lines))


def _equal(source: Source, name: str, other: str) -> bool:
    if source.specs[name] != source.specs[other]:
        return False
    return all(
        torch.equal(source.read(name, rows), source.read(other, rows)) for rows in row_ranges(source.specs[name])
    )
