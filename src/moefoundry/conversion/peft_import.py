"""Adapters from peft's files: a weights-only checkpoint of adapters on top of a base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from moefoundry.adapters import apply_lora
from moefoundry.adapters.merge import adapted_weights
from moefoundry.checkpoint.base import Base, whole_base
from moefoundry.checkpoint.format import TensorSpec
from moefoundry.checkpoint.manifest import BASE, WEIGHTS_ONLY
from moefoundry.checkpoint.out_of_core import ShardValues, write_shards
from moefoundry.checkpoint.weights import PREFIX, named_checkpoint, read_model_config
from moefoundry.config import LoraConfig, ModelConfig, Recipe, UserError, flatten
from moefoundry.config.errors import first_few
from moefoundry.config.schema_lora import LORA_GROUPS
from moefoundry.config.versions import VERSION_KEY
from moefoundry.conversion.convert import Summary, exported_as
from moefoundry.conversion.peft import CONFIG_FILE, TENSORS_FILE
from moefoundry.conversion.peft_names import ExpertKind, Slot, slots, stack_from_peft
from moefoundry.conversion.peft_settings import PeftSettings, read_settings
from moefoundry.data.staging import staged
from moefoundry.model.transformer import meta_model


@dataclass(frozen=True)
class _Factors:
    """An adapter of one of our weights, or of one expert of it, with the scale that it was trained with."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def over(self, factor: float) -> _Factors:
        """Give the adapter of the weight divided by a factor."""
        magnitude = None if self.magnitude is None else self.magnitude / factor
        return _Factors(self.a, self.b / factor, self.scale, magnitude)


def import_peft(directory: Path, base: Path, output: Path, family_name: str | None = None) -> Summary:
    """Write a weights-only checkpoint of the adapters in a directory of peft's.

    Args:
        directory: Directory with adapter_config.json and adapter_model.safetensors.
        base: Checkpoint of the weights that they were trained on, or the run that holds it.
        output: Checkpoint directory to make.
        family_name: ``model_type`` of the model that they were trained in; None is that which the base is
            exported as.

    Raises:
        UserError: The files are no adapters of LoRA, or of something that cannot have one here (named), or ``output``
            exists.
    """
    settings = read_settings(directory / CONFIG_FILE)
    tensors = _read(directory / TENSORS_FILE)
    under = named_checkpoint(base)
    cfg, frozen = read_model_config(under), whole_base(under)
    family, same = exported_as(family_name, cfg)
    model = meta_model(cfg)
    apply_lora(model, LoraConfig())
    weights = {id(weight): name for name, weight in model.named_parameters()}
    adaptable = [weights[id(weight)] for weight, _ in adapted_weights(model)]
    fused = [weight for weight in adaptable if ".experts." not in weight] + _fused(adaptable, settings)
    places = [
        *slots(family, same.cfg, ExpertKind.separate, adaptable),
        *slots(family, same.cfg, ExpertKind.fused, fused),
    ]
    read = _factors(places, tensors, settings, cfg, directory)
    found = {(weight, expert): each.over(same.factor(weight)) for (weight, expert), each in read.items()}
    lora = _config(found, settings)
    values = dict(_values(found, lora, cfg))
    specs = {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in values.items()}
    size = sum(spec.nbytes for spec in specs.values())
    with staged(output, size) as staging:
        staging.mkdir()
        write_adapters(staging, cfg, lora, values, frozen)
    return Summary(output, len(specs), size)


def write_adapters(staging: Path, cfg: ModelConfig, lora: LoraConfig, values: Mapping[str, Tensor], base: Base) -> None:
    """Write a weights-only checkpoint of adapters; names are those of ``MoETransformer``."""
    kept = ("model.", "lora.", VERSION_KEY)
    recipe = {key: value for key, value in flatten(Recipe(model=cfg, lora=lora)).items() if key.startswith(kept)}
    specs = {PREFIX + name: TensorSpec(tuple(value.shape), value.dtype) for name, value in values.items()}
    shards = (ShardValues(PREFIX + name, (0,) * value.dim(), value) for name, value in values.items())
    write_shards(staging, specs, shards, {WEIGHTS_ONLY: True, "recipe": recipe, BASE: base.document()})


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: unreadable safetensors: {error}") from error


def _fused(adaptable: list[str], settings: PeftSettings) -> list[str]:
    """List our weights that adapters of fused parameters are on."""
    names = [str(name).rpartition(".")[2] for name in settings.target_parameters]
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    wanted = tuple(f".experts.{part}" for name in names for part in parts.get(name, ()))
    return [weight for weight in adaptable if weight.endswith(wanted)] if wanted else []


def _factors(
    places: list[Slot], tensors: dict[str, Tensor], settings: PeftSettings, cfg: ModelConfig, directory: Path
) -> dict[tuple[str, int | None], _Factors]:
    """Map our weights, and experts of theirs, to their adapters."""
    found: dict[tuple[str, int | None], _Factors] = {}
    left = dict(tensors)
    for slot in places:
        if not all(key in left for key in slot.keys):
            continue
        a, b = (left.pop(key) for key in slot.keys)
        try:
            found |= _of_slot(slot, a, b, left.pop(slot.magnitude_key, None), settings, cfg)
        except (RuntimeError, TypeError, IndexError, ZeroDivisionError):  # of a shape that no rank has
            raise UserError(f"{directory}: {slot.keys[0]} {tuple(a.shape)} does not fit {slot.target}") from None
    if left:
        raise UserError(f"{directory}: no place in the model for {first_few(sorted(left))}")
    if not found:
        raise UserError(f"{directory}: there are no adapters")
    return found


def _of_slot(
    slot: Slot, a: Tensor, b: Tensor, magnitude: Tensor | None, settings: PeftSettings, cfg: ModelConfig
) -> dict[tuple[str, int | None], _Factors]:
    a, b = a.float(), b.float()
    if not slot.stacked:
        scale = settings.scale(slot.target, len(a))
        return {(slot.weights[0], slot.expert): _Factors(a, b, scale, magnitude)}
    a, b = stack_from_peft(a, b, cfg.moe.num_experts)
    scale, height = settings.scale(slot.target, a.shape[1]), b.shape[1] // len(slot.weights)
    found: dict[tuple[str, int | None], _Factors] = {}
    for index, weight in enumerate(slot.weights):
        rows = b[:, index * height : (index + 1) * height]
        used = rows.abs().amax(dim=(0, 1)) > 0  # [R']: where gate and up have A's of their own, half of them each
        half = len(used) // len(slot.weights)
        own = slice(index * half, (index + 1) * half)
        alone = len(slot.weights) > 1 and not used[: own.start].any() and not used[own.stop :].any()
        part = own if alone else slice(None)
        for expert in range(cfg.moe.num_experts):
            found[weight, expert] = _Factors(a[expert, part], rows[expert, :, part], scale)
    return found


def _config(found: Mapping[tuple[str, int | None], _Factors], settings: PeftSettings) -> LoraConfig:
    """Make the config of the adapters: one rank and one scale; smaller ranks are filled up with zeros."""
    rank = max(len(factors.a) for factors in found.values())
    scale = next(iter(found.values())).scale
    return LoraConfig(
        rank=rank,
        alpha=scale * (math.sqrt(rank) if settings.use_rslora else rank),
        targets=sorted({_target(weight) for weight, _ in found}),
        dropout=float(settings.dropout),
        use_rslora=settings.use_rslora,
        dora=settings.use_dora,
    )


def _target(weight: str) -> str:
    """Name the target of a recipe that a weight belongs to."""
    *above, name = weight.removesuffix(".weight").split(".")
    if above[-1] == "ffn":
        return f"dense.{name}"
    assert above[-1] in LORA_GROUPS, weight
    return f"{above[-1]}.{name}"


def _values(
    found: Mapping[tuple[str, int | None], _Factors], lora: LoraConfig, cfg: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the adapters; weights without one in the files, of a layer, get one of zeros."""
    model = meta_model(cfg)
    apply_lora(model, lora)
    scale = next(adapted_weights(model)).adapter.scale
    weights = {id(weight): name for name, weight in model.named_parameters()}
    modules = {id(module): name for name, module in model.named_modules()}
    for weight, adapter in adapted_weights(model):
        name, module = weights[id(weight)], modules[id(adapter)]
        a, b = torch.zeros(adapter.a.shape), torch.zeros(adapter.b.shape)
        experts = [None] if weight.dim() == 2 else list(range(len(a)))
        for expert in experts:
            factors = found.get((name, expert))
            if factors is None:
                if lora.dora and expert is None:
                    raise UserError(f"{name} has no adapter, and others of its kind have DoRA's magnitudes")
                continue
            own = slice(None) if expert is None else expert
            shapes = (lora.rank, *a[own].shape[1:]), (*b[own].shape[:1], lora.rank)
            if factors.b.shape[-1:] != factors.a.shape[:1]:
                ranks = f"{tuple(factors.a.shape)} and {tuple(factors.b.shape)}"
                raise UserError(f"{name}: the factors of an adapter have different ranks: {ranks}")
            a[own] = _widened(factors.a, shapes[0], 0, name)
            b[own] = _widened(factors.b * (factors.scale / scale), shapes[1], 1, name)
            if factors.magnitude is not None:
                yield f"{module}.magnitude.weight", factors.magnitude.float()
        yield f"{module}.a", a
        yield f"{module}.b", b


def _widened(factor: Tensor, shape: tuple[int, ...], ranks: int, name: str) -> Tensor:
    """Fill up the ranks of a factor, its dim ``ranks``, with zeros.

    Raises:
        UserError: Its other dim is not that of the weight, or it has more ranks.
    """
    if factor.dim() != 2 or factor.shape[1 - ranks] != shape[1 - ranks] or factor.shape[ranks] > shape[ranks]:
        raise UserError(f"{name}: an adapter of the shape {tuple(factor.shape)} does not fit {shape}")
    more = shape[ranks] - factor.shape[ranks]
    return pad(factor, (0, more) if ranks else (0, 0, 0, more))
