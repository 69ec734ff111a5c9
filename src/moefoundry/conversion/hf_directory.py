"""A Hugging Face directory as a conversion reads it: config, family and tensors, checked against each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moefoundry.config import ModelConfig
from moefoundry.conversion.families import Family, family_of
from moefoundry.conversion.fused_experts import SplitExperts
from moefoundry.conversion.hf_config import fp8_block, read_hf_config
from moefoundry.conversion.safetensors_io import SafetensorsReader
from moefoundry.conversion.tensor_map import TensorMap


@dataclass(frozen=True)
class HfDirectory:
    """A Hugging Face directory that is whole.

    Attributes:
        path: Where.
        config: Its config.json.
        family, cfg: What the config means.
        tensors: One for each expert, however the files have them.
        names: Which of them are which of ours.
        notes: What a reader of the files would not expect, in sentences.
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
        """Tokens a sequence, where the config says."""
        return self.family.max_seq_len(self.config)


def open_hf(path: Path, fp8_as: torch.dtype | None = None) -> HfDirectory:
    """Read the config and check every tensor; no values are read but those that must be copies of others.

    Args:
        path: Holds config.json and safetensors.
        fp8_as: What FP8 tensors are read as; None is BF16.

    Raises:
        UserError: The config means a model that is not here, or tensors are missing, too many or misshapen, or the
            weights are pickled, or quantized other than in FP8 blocks.
    """
    config = read_hf_config(path)
    block = fp8_block(config, path)
    family = family_of(config)
    declared = family.read_config({key: value for key, value in config.items() if key != "quantization_config"})
    stored = SafetensorsReader(path, block, fp8_as or torch.bfloat16)
    cfg, notes = _with_the_prediction_modules_there(declared, stored.specs)
    tensors = SplitExperts(stored, family.pieces(cfg))
    names = TensorMap(family, cfg)
    names.check_theirs(tensors.specs, path)
    names.check_copies(tensors, path)
    return HfDirectory(path, config, family, cfg, tensors, names, notes)


def _with_the_prediction_modules_there(cfg: ModelConfig, tensors: Iterable[str]) -> tuple[ModelConfig, tuple[str, ...]]:
    """Transformers keeps the number of modules that predict further tokens in the config, and drops their tensors."""
    there = {name.split(".")[2] for name in tensors if name.startswith("model.layers.")}
    depth = max((i + 1 for i in range(cfg.mtp.depth) if str(cfg.n_layers + i) in there), default=0)
    if depth == cfg.mtp.depth:
        return cfg, ()
    note = (
        f"config.json declares {cfg.mtp.depth} module(s) of multi-token prediction and the files hold {depth}: "
        f"read with mtp.depth {depth}"
    )
    return replace(cfg, mtp=replace(cfg.mtp, depth=depth)), (note,)
