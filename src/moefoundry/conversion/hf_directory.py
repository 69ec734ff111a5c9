"""Hugging Face directories: config, family and tensors, checked against each other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.config import ModelConfig, UserError
from moefoundry.conversion.families import Family, family_of
from moefoundry.conversion.fused_experts import SplitExperts
from moefoundry.conversion.safetensors_io import SafetensorsReader
from moefoundry.conversion.starting_recipe import Size
from moefoundry.conversion.tensor_map import TensorMap
from moefoundry.data.json_files import read_json
from moefoundry.data.tokenizer_files import CONFIG

DEEPSEEK_BLOCK = (128, 128)
TOO_LARGE = 4  # times the elements of the files; up to there the tensors that are missing are named


@dataclass(frozen=True)
class HfDirectory:
    """Hugging Face directory that is whole.

    Attributes:
        path: The directory.
        config: Content of config.json.
        family, cfg: Family and model that the config declares.
        tensors: Its tensors, one for each expert, however the files have them.
        names: Map between these and our tensors.
        notes: Sentences about what a reader of the files would not expect.
    """

    path: Path
    config: dict[str, Any]
    family: Family
    cfg: ModelConfig
    tensors: SplitExperts
    names: TensorMap
    notes: tuple[str, ...] = ()

    @property
    def max_seq_len(self) -> int | None:
        """Tokens of a sequence; None where the config does not say."""
        return self.family.max_seq_len(self.config)


def open_hf(path: Path, fp8_as: torch.dtype | None = None) -> HfDirectory:
    """Read the config and check every tensor; no values are read but those that must be copies of others.

    Args:
        path: Directory with config.json and safetensors.
        fp8_as: dtype in which FP8 and MXFP4 tensors are read; None is BF16.

    Raises:
        UserError: The config means a model not known here, or tensors are missing, too many or misshapen, or the
            weights are pickled, or quantized other than in FP8 blocks or MXFP4.
    """
    config = read_hf_config(path)
    block = fp8_block(config, path)
    family = family_of(config)
    declared = family.model_of(config)
    stored = SafetensorsReader(path, block, fp8_as or torch.bfloat16)
    _check_size(declared, stored.specs, path)
    cfg, notes = _with_the_prediction_modules_there(family, declared, stored.specs)
    tensors = SplitExperts(stored, family, cfg)
    notes += _without_what_is_left_out(family, cfg, tensors)
    names = TensorMap(family, cfg)
    names.check_theirs(tensors.specs, path)
    names.check_copies(tensors, path)
    return HfDirectory(path, config, family, cfg, tensors, names, notes)


def _check_size(cfg: ModelConfig, specs: Mapping[str, TensorSpec], path: Path) -> None:
    """Refuse a model that the files are by far too small for, before its parts are listed.

    Raises:
        UserError: They are.
    """
    declared, stored = Size.of(cfg).total, sum(math.prod(spec.shape) for spec in specs.values())
    if declared > TOO_LARGE * stored:
        raise UserError(
            f"{path}: {CONFIG} declares a model of {declared:,} parameters, and the files hold {stored:,}; one of them "
            "is of another model"
        )


def _without_what_is_left_out(family: Family, cfg: ModelConfig, tensors: SplitExperts) -> tuple[str, ...]:
    """Drop the tensors of parts that the family leaves out, and say so of each part that is there."""
    notes = []
    for beginning, part in family.left_out(cfg).items():
        dropped = {name for name in tensors.specs if name.startswith(beginning)}
        tensors.specs = {name: spec for name, spec in tensors.specs.items() if name not in dropped}
        if dropped:
            notes.append(f"{part} is left out: {len(dropped)} tensors {beginning}* are not read")
    return tuple(notes)


def _with_the_prediction_modules_there(
    family: Family, cfg: ModelConfig, tensors: Iterable[str]
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Set the depth of multi-token prediction to the files'; transformers drops these tensors and keeps the number."""
    depth = family.prediction_depth(cfg, tensors)
    if depth == cfg.mtp.depth:
        return cfg, ()
    note = (
        f"config.json declares {cfg.mtp.depth} module(s) of multi-token prediction and the files hold {depth}: "
        f"read with mtp.depth {depth}"
    )
    return replace(cfg, mtp=replace(cfg.mtp, depth=depth)), (note,)


def read_hf_config(path: Path) -> dict[str, Any]:
    """Read ``config.json`` of a directory.

    Raises:
        UserError: The directory or the file is missing, or it is no JSON object; or ``path`` is a file.
    """
    if path.is_file():
        raise UserError(f"{path}: is a file; name the directory that holds {CONFIG}: {path.parent}")
    if not path.is_dir():
        download = f"huggingface-cli download ORGANIZATION/{path.name} --local-dir {path}"
        raise UserError(f"{path}: no such directory; a model is downloaded first: {download}")
    return read_json(path / CONFIG)


def fp8_block(config: dict[str, Any], path: Path) -> tuple[int, int]:
    """Return rows and columns of an FP8 block; DeepSeek's where no weight is quantized in such blocks.

    Raises:
        UserError: Weights are quantized in another way than in FP8 blocks, or packed as INT4.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return DEEPSEEK_BLOCK
    match quantization:
        case {"quant_method": "mxfp4"}:
            return DEEPSEEK_BLOCK
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if min(rows, columns) > 0:
            return rows, columns
        case {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": dict(groups)}:
            if all(_is_int4(group) for group in groups.values()):
                return DEEPSEEK_BLOCK
    known = "FP8 weights in blocks, MXFP4, and INT4 weights of compressed-tensors (pack-quantized, symmetric)"
    raise UserError(f"{path / CONFIG}: {known} can be read, not quantization_config {_kind(quantization)}")


def _kind(quantization: object) -> str:
    """Show what tells one quantization from another, and not its lists of layers."""
    if not isinstance(quantization, dict):
        return repr(quantization)
    shown: dict[str, Any] = {key: value for key, value in quantization.items() if isinstance(value, str | int | float)}
    shown |= {key: quantization[key] for key in ("weight_block_size",) if key in quantization}
    groups = quantization.get("config_groups")
    odd = [group for group in groups.values() if not _is_int4(group)] if isinstance(groups, dict) else []
    if odd and isinstance(odd[0], dict):
        shown |= {key: odd[0].get(key) for key in ("weights", "input_activations")}
    return json.dumps(shown)


def _is_int4(group: object) -> bool:
    """Tell if a group of compressed-tensors' config is of symmetric INT4 weights, in the order of their columns."""
    whole = group if isinstance(group, dict) else {}
    weights = whole.get("weights")
    if not isinstance(weights, dict) or weights.get("actorder") or whole.get("input_activations"):
        return False
    return (weights.get("num_bits"), weights.get("type"), weights.get("symmetric")) == (4, "int", True)
