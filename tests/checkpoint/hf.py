"""Hugging Face directories with random weights, of every family, to convert."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from moefoundry.checkpoint.safetensors_io import SafetensorsReader
from moefoundry.config import ModelConfig, MtpConfig
from moefoundry.data.tokenizer import train_tokenizer
from moefoundry.model.families import FAMILIES
from tests.model.families.models import VARIANTS, add_prediction_module, their_tensors, transformers_model

FP8_BLOCK = 128


def family_config(family: str, variant: str = "plain", mtp_depth: int = 0) -> ModelConfig:
    return replace(VARIANTS[family][variant], mtp=MtpConfig(depth=mtp_depth))


def family_tensors(family: str, cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors as they are published: buffers in fp32, whatever the parameters; modules that predict further tokens
    with their copies of embedding and head; and those without elements."""
    model = transformers_model(family, cfg)
    for _ in range(cfg.mtp.depth):
        add_prediction_module(model)
    buffers = {name for name, _ in model.named_buffers()}
    tensors = {
        name: tensor.detach().clone() if name in buffers else tensor.detach().to(dtype, copy=True)
        for name, tensor in their_tensors(model).items()
    }
    copies = FAMILIES[family].copies(cfg)
    copied = {name: tensors[original].clone() for name, original in copies.items() if name != "lm_head.weight"}
    empty = {name: torch.empty(shape, dtype=dtype) for name, shape in FAMILIES[family].empty_tensors(cfg).items()}
    return tensors | copied | empty


def write_hf(
    directory: Path, family: str, cfg: ModelConfig, dtype: torch.dtype = torch.float32, **changed: Tensor | None
) -> Path:
    """A directory that holds such a model, with one file; ``changed`` replaces tensors, None leaves one out."""
    directory.mkdir()
    tensors = {**family_tensors(family, cfg, dtype), **changed}
    save_file(
        {name: t for name, t in tensors.items() if t is not None}, directory / "model.safetensors", {"format": "pt"}
    )
    config = FAMILIES[family].write_config(cfg, max_seq_len=64, torch_dtype=str(dtype).removeprefix("torch."))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_tokenizer(directory: Path) -> Path:
    """What ``moefoundry prepare`` writes."""
    train_tokenizer(["def first(value):\n    return value\n"] * 4, vocab_size=270).save(directory)
    return directory


def contents(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory of safetensors."""
    reader = SafetensorsReader(directory)
    return {name: reader.read(name) for name in reader.specs}


def assert_same_tensors(directory: Path, other: Path) -> None:
    """The same names, dtypes, shapes and values, to the last bit."""
    ours, theirs = contents(directory), contents(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [O, I] in float8_e4m3fn, and the fp32 factor of each block of 128 x 128."""
    rows, columns = (-(-size // FP8_BLOCK) for size in weight.shape)
    values, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            block = (slice(r * FP8_BLOCK, (r + 1) * FP8_BLOCK), slice(c * FP8_BLOCK, (c + 1) * FP8_BLOCK))
            scales[r, c] = weight[block].float().abs().max() / torch.finfo(torch.float8_e4m3fn).max
            values[block] = (weight[block].float() / scales[r, c]).to(torch.float8_e4m3fn)
    return values, scales


def from_fp8(values: Tensor, scales: Tensor) -> Tensor:
    """What they stand for, in fp32, block by block."""
    result = torch.empty(values.shape)
    for r, row in enumerate(scales):
        for c, scale in enumerate(row):
            block = (slice(r * FP8_BLOCK, (r + 1) * FP8_BLOCK), slice(c * FP8_BLOCK, (c + 1) * FP8_BLOCK))
            result[block] = values[block].float() * scale
    return result
