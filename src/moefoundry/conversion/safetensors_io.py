"""Directories of safetensors, as Hugging Face publishes them: read lazily, written tensor by tensor.

    model.safetensors                        or, in shards,
    model-00001-of-00002.safetensors ...     and model.safetensors.index.json: {"weight_map": {tensor: file}}
    model.fp16.safetensors, model.safetensors.index.fp16.json    the same in a variant; read where it is the only one

Files are mapped, so reading a slice costs its pages. They are written in one pass: the header, which says where each
tensor is, needs shapes and dtypes alone. DeepSeek's block-scaled FP8 tensors are read as their products, and so are
gpt-oss's in MXFP4 (``mxfp4.py``) and packed INT4 tensors (``packed_int4.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.out_of_core import progress
from moefoundry.config import UserError
from moefoundry.config.errors import first_few
from moefoundry.conversion import mxfp4, packed_int4
from moefoundry.data.json_files import refuse_lfs_pointer

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SCALE_SUFFIX = "_scale_inv"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class SafetensorsReader:
    """Tensors of a directory, mapped into memory.

    Block-scaled FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3): ``w`` is float8_e4m3fn [O, I] and ``w_scale_inv`` has
    the factor of each block of 128 x 128, or smaller at the edges. ``w`` is then read as the product, and its scale is
    not listed.

    Args:
        directory: Directory with model.safetensors, or an index and the shards that it names.
        fp8_block: Rows and columns of an FP8 block.
        fp8_as: dtype in which FP8, MXFP4 and INT4 tensors are read; DeepSeek's own conversion makes them BF16.

    Attributes:
        specs: Shapes and dtypes by name.

    Raises:
        UserError: There are no safetensors, or they are incomplete, damaged, or outside the directory.
    """

    def __init__(
        self, directory: Path, fp8_block: tuple[int, int] = (128, 128), fp8_as: torch.dtype = torch.bfloat16
    ) -> None:
        self._block = fp8_block
        self._fp8_as = fp8_as
        self._int4: set[str] = set()
        self._mxfp4: set[str] = set()
        self._files: dict[str, Any] = {}
        self.specs: dict[str, TensorSpec] = {}
        weight_map, single = _weight_map(directory)
        missing = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
        if missing:
            raise UserError(f"{directory}: shards of the index are missing: {first_few(missing)}")
        for file in sorted(set(weight_map.values())) or [single]:
            self._open(directory / file)
        absent = [name for name in weight_map if name not in self.specs]
        if absent:
            raise UserError(f"{directory}: tensors of the index are missing: {first_few(absent)}")
        self._scales: dict[str, str] = {}
        self._scales = self._take_scales(directory)
        self._int4, problems = packed_int4.take_int4(self.specs, self.read, fp8_as)
        if problems:
            raise UserError(f"{directory}: INT4 tensors that cannot be read:\n  " + first_few(problems, "\n  "))
        self._mxfp4 = mxfp4.take_packed(self.specs, fp8_as, directory)

    def read(self, name: str, *ranges: tuple[int, int]) -> Tensor:
        """Read a tensor, or the part in ``ranges`` of its leading dims; it may be a view of the mapped file."""
        if name in self._int4:
            ends = (packed_int4.PACKED, packed_int4.SCALE)
            packed, scale = (self._files[name + end].get_slice(name + end) for end in ends)
            shape = self.specs[name].shape
            return packed_int4.unpacked(packed, scale, (shape[0], shape[1]), *ranges).to(self._fp8_as)
        box = tuple(slice(*limits) for limits in ranges)
        if name in self._mxfp4:
            experts, ends = box[0] if box else slice(None), (mxfp4.BLOCKS, mxfp4.SCALES)
            parts = (self._files[name + end].get_slice(name + end)[experts] for end in ends)
            return mxfp4.dequantize(*parts)[slice(None), *box[1:]].to(self._fp8_as)
        values: Tensor = self._files[name].get_slice(name)[box] if box else self._files[name].get_tensor(name)
        if name not in self._scales:
            return values
        limits = [*ranges, *((0, size) for size in self.specs[name].shape[len(ranges) :])]
        rows, columns = (torch.arange(*limit) // block for limit, block in zip(limits, self._block, strict=True))
        scale = self._files[self._scales[name]].get_tensor(self._scales[name]).float()
        return (values.float() * scale[rows][:, columns]).to(self._fp8_as)

    def _open(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                view = file.get_slice(name)
                if name in self.specs:
                    raise UserError(f"{path}: {name} is in another shard, too")
                if view.get_dtype() not in _DTYPES:
                    raise UserError(f"{path}: {name} has the dtype {view.get_dtype()}, which is not supported")
                self.specs[name] = TensorSpec(tuple(view.get_shape()), _DTYPES[view.get_dtype()])
                self._files[name] = file
        except (SafetensorError, OSError) as error:
            refuse_lfs_pointer(path)
            raise UserError(f"{path}: unreadable safetensors: {error}") from error

    def _take_scales(self, directory: Path) -> dict[str, str]:
        """Map each FP8 tensor to its scale, which leaves ``specs``."""
        scales, problems = {}, []
        for name, (shape, dtype) in list(self.specs.items()):
            if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
                continue
            scale = self.specs.pop(name + SCALE_SUFFIX, None)
            blocks = tuple(-(-size // block) for size, block in zip(shape, self._block, strict=False))
            fits = scale is not None and scale.shape == blocks and scale.dtype.is_floating_point
            if dtype != torch.float8_e4m3fn or len(shape) != 2 or not fits:
                has = "no" if scale is None else f"a {scale.dtype} {scale.shape}"
                problems.append(f"{name} ({dtype} {shape}) has {has} {SCALE_SUFFIX}; {blocks} is needed")
            scales[name] = name + SCALE_SUFFIX
            self.specs[name] = TensorSpec(shape, self._fp8_as)
        if problems:
            raise UserError(f"{directory}: FP8 tensors that cannot be read:\n  " + first_few(problems, "\n  "))
        return scales


def _weight_map(directory: Path) -> tuple[dict[str, str], str]:
    """Read the file of each tensor from the index; or name the file that holds all, beside an empty map."""
    index, single = _named_as_variants(directory)
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = {PurePath(file) for file in weight_map.values()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            refuse_lfs_pointer(index)
            raise UserError(f"{index}: unreadable index: {error!r}") from error
        if not weight_map:
            raise UserError(f"{index}: unreadable index: it names no tensors")
        outside = sorted(str(name) for name in names if name.is_absolute() or ".." in name.parts)
        if outside:
            raise UserError(f"{index}: files outside the directory are refused: {first_few(outside)}")
        return weight_map, SINGLE_FILE
    if single.is_file():
        return {}, single.name
    if pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern)):
        raise UserError(
            f"{directory}: holds pickled weights ({pickles[0]}), which could run any code and are never read; "
            "convert them to safetensors where you trust them"
        )
    raise UserError(f"{directory}: no {SINGLE_FILE} and no {INDEX_FILE}")


def _named_as_variants(directory: Path) -> tuple[Path, Path]:
    """Find the index and the single file, which may have a variant's name if nothing has the plain one.

    Raises:
        UserError: There are several variants.
    """
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if index.is_file() or single.is_file():
        return index, single
    variants = [*directory.glob("model.safetensors.index.*.json"), *directory.glob("model.*.safetensors")]
    if len(variants) > 1:
        names = first_few(sorted(path.name for path in variants))
        raise UserError(f"{directory}: several variants of the weights: {names}; leave one of them there")
    (found,) = variants or [single]
    return (found, single) if found.suffix == ".json" else (index, found)


def write_safetensors(
    directory: Path, specs: Mapping[str, TensorSpec], blocks: Callable[[str], Iterable[Tensor]], max_shard_bytes: int
) -> None:
    """Write tensors into an existing directory, in one file or in shards with an index.

    Args:
        directory: Directory to write to.
        specs: Every tensor, in the order of the shards.
        blocks: Name -> the tensor's values, cut into rows; asked for one by one.
        max_shard_bytes: A shard is larger only if it holds a single tensor.
    """
    shards = _divide(specs, max_shard_bytes)
    if len(shards) == 1:
        write_file(directory / SINGLE_FILE, specs, blocks)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(directory / file, shard, blocks)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _divide(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    return shards


def write_file(path: Path, specs: Mapping[str, TensorSpec], blocks: Callable[[str], Iterable[Tensor]]) -> None:
    """Write one safetensors file.

    Raises:
        ValueError: The blocks of a tensor are not its values.
    """
    ordered = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        shape, dtype = specs[name]
        begin, end = end, end + specs[name].nbytes
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file, progress(specs) as bar:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            written = 0
            for content in _contents(name, specs[name].dtype, blocks(name)):
                written += file.write(content)
                bar.update(len(content))
            if written != specs[name].nbytes:
                raise ValueError(f"{name}: {written} bytes for {specs[name]}")


def _contents(name: str, dtype: torch.dtype, blocks: Iterable[Tensor]) -> Iterator[memoryview]:
    for values in blocks:
        if values.dtype != dtype:
            raise ValueError(f"{name}: a block of {values.dtype}, not {dtype}")
        yield values.contiguous().reshape(-1).view(torch.uint8).numpy().data
