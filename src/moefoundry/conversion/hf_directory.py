"""Hugging Face directories: config, family and tensors, checked against each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moefoundry.config import ModelConfig, UserError
from moefoundry.conversion.families import Family, family_of
from moefoundry.conversion.fused_experts import SplitExperts
from moefoundry.conversion.safetensors_io import SafetensorsReader
from moefoundry.conversion.tensor_map import TensorMap
from moefoundry.data.json_files import read_json
from moefoundry.data.tokenizer_files import CONFIG


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
    declared = family.read_config({key: value for key, value in config.items() if key != "quantization_config"})
    stored = SafetensorsReader(path, block, fp8_as or torch.bfloat16)
    cfg, notes = _with_the_prediction_modules_there(declared, stored.specs)
    tensors = SplitExperts(stored, family, cfg)
    names = TensorMap(family, cfg)
    names.check_theirs(tensors.specs, path)
    names.check_copies(tensors, path)
    return HfDirectory(path, config, family, cfg, tensors, names, notes)


def _with_the_prediction_modules_there(cfg: ModelConfig, tensors: Iterable[str]) -> tuple[ModelConfig, tuple[str, ...]]:
    """Set the depth of multi-token prediction to the files'; transformers drops these tensors and keeps the number."""
    there = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    depth = max((i + 1 for i in range(cfg.mtp.depth) if str(cfg.n_layers + i) in there), default=0)
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
        UserError: The directory or the file is missing, or it is no JSON object.
    """
    if not path.is_dir():
        download = f"huggingface-cli download ORGANIZATION/{path.name} --local-dir {path}"
        raise UserError(f"{path}: no such directory; a model is downloaded first: {download}")
    return read_json(path / CONFIG)


def fp8_block(config: dict[str, Any], path: Path) -> tuple[int, int]:
    """Return rows and columns of an FP8 block; DeepSeek's where no weight is in FP8.

    Raises:
        UserError: Weights are quantized in another way.
    """
    quantization = config.get("quantization_config") or {"quant_method": "fp8", "weight_block_size": [128, 128]}
    match quantization:
        case {"quant_method": "mxfp4"}:
            return 128, 128
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]}:
            return rows, columns
    raise UserError(
        f"{path / CONFIG}: only FP8 weights in blocks and MXFP4 can be read, not quantization_config {quantization}"
    )
