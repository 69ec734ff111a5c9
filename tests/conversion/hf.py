"""Hugging Face directories with random weights, of every family, to convert."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moefoundry.checkpoint.format import TensorSpec
from moefoundry.config import ModelConfig, MtpConfig
from moefoundry.conversion.families import FAMILIES
from moefoundry.conversion.safetensors_io import SafetensorsReader
from moefoundry.conversion.tensor_map import Dtype, TensorMap
from moefoundry.data.tokenizer import train_tokenizer
from moefoundry.model.transformer import meta_model
from tests.conversion.families.models import OLDER, VARIANTS, add_prediction_module, their_tensors, transformers_model

FP8_BLOCK = 128


def family_config(family: str, variant: str = "plain", mtp_depth: int = 0) -> ModelConfig:
    return replace(VARIANTS[family][variant], mtp=MtpConfig(depth=mtp_depth))


def family_tensors(family: str, cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors as they are published: buffers in fp32, whatever the parameters; modules that predict further tokens
    with their copies of embedding and head. Where this environment's transformers has no
    such model, they have the shapes of our map, which the newer transformers is compared with elsewhere."""
    if family not in OLDER:
        names = TensorMap(FAMILIES[family], cfg)
        specs = names.their_specs(
            {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in meta_model(cfg).state_dict().items()}, Dtype.keep
        )
        draw = torch.Generator().manual_seed(0)
        return {
            name: (0.2 * torch.randn(spec.shape, generator=draw) + ("norm" in name and len(spec.shape) == 1)).to(
                torch.float32 if name.endswith("e_score_correction_bias") else dtype
            )
            for name, spec in specs.items()
        }
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
    unused = {name: shape for name, shape in FAMILIES[family].unused_tensors(cfg).items() if 0 not in shape}
    return tensors | copied | {name: torch.zeros(shape, dtype=dtype) for name, shape in unused.items()}


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


def change_config(directory: Path, **changes: object) -> Path:
    """The directory, with other values in its config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def write_version_5(directory: Path, family: str, cfg: ModelConfig) -> Path:
    """A directory as transformers 5 has models in memory: its config, and experts fused."""
    write_hf(directory, family, cfg)
    tensors = contents(directory)
    save_file(fused(tensors), directory / "model.safetensors", {"format": "pt"})
    config = as_version_5({"rope_scaling": None, **json.loads((directory / "config.json").read_text())})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def as_version_5(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` as transformers 5.24 saves it."""
    generic = {
        "return_dict": True,
        "output_attentions": False,
        "is_encoder_decoder": False,
        "chunk_size_feed_forward": 0,
    }
    generic |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": None, "_name_or_path": ""}
    new = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"dtype": config["torch_dtype"], "transformers_version": "5.24.0", "use_cache": True}
    rope = config.get("rope_scaling") or {"rope_type": "default"}
    new["rope_parameters"] = {**rope, "rope_theta": config["rope_theta"]}
    if config["model_type"] == "qwen3_moe":
        new["num_local_experts"] = new.pop("num_experts")
        del new["max_window_layers"]
    if config["model_type"] == "deepseek_v3":
        new |= {"rope_interleave": True, "head_dim": new["qk_rope_head_dim"], "attention_bias": False}
        new["qk_head_dim"] = new["qk_nope_head_dim"] + new["qk_rope_head_dim"]
        for key in ("scoring_func", "topk_method", "moe_layer_freq"):
            del new[key]
    if config["model_type"] == "dbrx":
        new["num_key_value_heads"] = config["attn_config"]["kv_n_heads"]
        new["attn_config"] = config["attn_config"] | generic | {"attn_pdrop": 0.0, "dtype": None, "model_type": ""}
        new["ffn_config"] = config["ffn_config"] | generic | {"hidden_size": config["d_model"], "moe_loss_weight": 0.01}
    return new


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a family as the models of transformers 5 have them: experts in one, [E, 2F, D] and [E, D, F]."""
    parts: dict[str, dict[tuple[int, str], Tensor]] = defaultdict(dict)
    found = {}
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for name, tensor in tensors.items():
        there = name.replace("block_sparse_moe", "mlp")
        if match := re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", there):
            parts[match[1]][int(match[2]), names.get(match[3], match[3])] = tensor
        else:
            found[there] = tensor
    for module, weights in parts.items():
        experts = range(1 + max(expert for expert, _ in weights))
        halves = [torch.cat([weights[e, "gate_proj"], weights[e, "up_proj"]]) for e in experts]
        found[f"{module}.gate_up_proj"] = torch.stack(halves)
        found[f"{module}.down_proj"] = torch.stack([weights[e, "down_proj"] for e in experts])
    return found


def write_tokenizer(directory: Path) -> Path:
    """What ``moefoundry prepare`` writes."""
    train_tokenizer(["def first(value):\n    return value\n"] * 4, vocab_size=270).save(directory)
    return directory


def contents(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory of safetensors."""
    reader = SafetensorsReader(directory)
    return {name: reader.read(name) for name in reader.specs}


def assert_same_tensors(directory: Path, other: Path, but: Collection[str] = ()) -> None:
    """The same names, dtypes, shapes and values, to the last bit; values of ``but`` may differ, and tensors without
    elements may be there or not."""
    ours, theirs = (
        {name: tensor for name, tensor in contents(path).items() if tensor.numel()} for path in (directory, other)
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert name in but or torch.equal(tensor, theirs[name]), name


def packed_mxfp4(experts: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Blocks and scales of random weights [E, I, O] of about 1."""
    draw = torch.Generator().manual_seed(0)
    shape = (experts, outputs, inputs // 32)
    blocks = torch.randint(0, 256, (*shape, 16), generator=draw, dtype=torch.uint8)
    return blocks, torch.randint(122, 126, shape, generator=draw, dtype=torch.uint8)


def write_mxfp4(directory: Path, cfg: ModelConfig) -> Path:
    """A directory of gpt-oss as it is published: experts in MXFP4, all else in BF16."""
    family, experts = "gpt_oss", cfg.moe.num_experts
    packed: dict[str, Tensor | None] = {}
    for layer in range(cfg.n_layers):
        widths = {"gate_up_proj": (2 * cfg.moe.expert_hidden_size, cfg.d_model)}
        widths["down_proj"] = cfg.d_model, cfg.moe.expert_hidden_size
        for name, (outputs, inputs) in widths.items():
            whole = f"model.layers.{layer}.mlp.experts.{name}"
            blocks, scales = packed_mxfp4(experts, outputs, inputs)
            packed |= {whole: None, f"{whole}_blocks": blocks, f"{whole}_scales": scales}
    write_hf(directory, family, cfg, torch.bfloat16, **packed)
    return change_config(directory, quantization_config={"quant_method": "mxfp4"})


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


def to_int4(weight: Tensor, group: int) -> tuple[dict[str, Tensor], Tensor]:
    """The three tensors that compressed-tensors makes of a weight [O, I], by the ends of their names; and what they
    stand for."""
    groups = weight.float().unflatten(1, (-1, group))
    scale = (groups.abs().amax(dim=2) / 7.5).bfloat16()
    values = (groups / scale.float().unsqueeze(2)).round().clamp(-8, 7)
    nibbles = torch.nn.functional.pad(values.flatten(1) + 8, (0, -weight.shape[1] % 8)).long().unflatten(1, (-1, 8))
    packed = sum(nibbles[..., i] << 4 * i for i in range(8))
    parts = {"_packed": packed.to(torch.int32), "_scale": scale, "_shape": torch.tensor(weight.shape)}  # type: ignore[union-attr]
    return parts, (values * scale.float().unsqueeze(2)).flatten(1)


def from_fp8(values: Tensor, scales: Tensor) -> Tensor:
    """What they stand for, in fp32, block by block."""
    result = torch.empty(values.shape)
    for r, row in enumerate(scales):
        for c, scale in enumerate(row):
            block = (slice(r * FP8_BLOCK, (r + 1) * FP8_BLOCK), slice(c * FP8_BLOCK, (c + 1) * FP8_BLOCK))
            result[block] = values[block].float() * scale
    return result
