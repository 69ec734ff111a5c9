"""Adapters to and from peft's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

Transformers with peft loads what is exported, on top of the base's export: ``PeftModel.from_pretrained(model, path)``.
Names and shapes are in ``peft_names.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from moefoundry.checkpoint.store import using
from moefoundry.checkpoint.weights import Weights, named_checkpoint, read_lora_config, read_model_config
from moefoundry.config import LoraConfig, ModelConfig, UserError
from moefoundry.conversion.adapted import Adapters
from moefoundry.conversion.convert import Summary, chosen_family
from moefoundry.conversion.families import Family
from moefoundry.conversion.peft_names import ExpertKind, Slot, slots, stack_to_peft
from moefoundry.data.json_files import write_json
from moefoundry.data.staging import staged
from moefoundry.model.transformer import meta_model

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
FFN_LAYERS = ("gate_proj", "up_proj", "down_proj")
"""Layers that peft takes for experts in any model with experts of transformers 5; it finds them as parameters."""


def export_peft(
    checkpoint: Path,
    output: Path,
    family_name: str | None = None,
    kind: ExpertKind = ExpertKind.fused,
    weights: Weights = Weights.trained,
) -> Summary:
    """Write adapters as peft saves them.

    Args:
        checkpoint: A checkpoint of adapters, or the run that holds it.
        output: Directory to make.
        family_name: ``model_type`` of the model that they are loaded into; None is the first that fits the base.
        kind: Experts of that model: ``fused`` in transformers 5, ``separate`` in transformers 4.
        weights: Values to take.

    Raises:
        UserError: There are no adapters, peft has no such adapters (with the reason), a tensor or the average is
            missing, or ``output`` exists.
    """
    directory = named_checkpoint(checkpoint)
    lora, cfg = read_lora_config(directory), read_model_config(directory)
    if lora is None:
        raise UserError(f"{directory} has whole weights, and no adapters")
    if lora.train_router:
        raise UserError(
            f"{directory}: its routers have been trained, which peft's files do not hold; merge the adapters"
        )
    family = chosen_family(family_name, cfg)
    adapters = Adapters(directory, lora, meta_model(cfg), weights)
    places = slots(family, cfg, kind, adapters.names)
    chosen = _Targets.of(places, family, cfg, kind)
    if lora.dora and chosen.parameters:
        named = ", ".join(chosen.parameters)
        raise UserError(f"{directory}: peft has no DoRA where {named} have adapters; merge the adapters instead")
    with using(directory):
        tensors = {key: value.contiguous() for slot in places for key, value in _tensors(slot, adapters, cfg)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    with staged(output, size) as staging:
        staging.mkdir()
        save_file(tensors, staging / TENSORS_FILE, {"format": "pt"})
        write_json(staging / CONFIG_FILE, _config(lora, places, chosen))
    return Summary(output, len(tensors), size)


@dataclass(frozen=True)
class _Targets:
    """Names in ``adapter_config.json``, each the shortest end that means no other module or parameter."""

    modules: list[str]
    parameters: list[str]

    @classmethod
    def of(cls, places: list[Slot], family: Family, cfg: ModelConfig, kind: ExpertKind) -> _Targets:
        hf_names = {piece.hf_name for piece in family.pieces(cfg)}
        has_experts = any(".experts." in name for name in hf_names)
        modules, parameters = set(), set()
        for slot in places:
            by_parameter = kind == ExpertKind.fused and has_experts and slot.target.endswith(FFN_LAYERS)
            if slot.stacked:
                parameters.add(slot.target)
            elif by_parameter:
                parameters.add(f"{slot.target}.weight")
            else:
                modules.add(slot.target)
        others = {name.rpartition(".")[0] for name in hf_names}
        fused = {slot.target for slot in places if slot.stacked}
        return cls(_shortest(modules, others - modules), _shortest(parameters, (hf_names | fused) - parameters))


def _shortest(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """Cut names to ends, whole between dots, that no other name has."""
    ends = {end for other in others for end in _ends(other)}
    return sorted({next(end for end in _ends(name) if end not in ends) for name in names})


def _ends(name: str) -> list[str]:
    """List the ends of a name, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[first:]) for first in reversed(range(len(parts)))]


def _config(lora: LoraConfig, places: list[Slot], chosen: _Targets) -> dict[str, Any]:
    fused = {slot.target.rpartition(".")[2]: len(slot.weights) for slot in places if len(slot.weights) > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0 if chosen.parameters else lora.dropout,  # peft refuses it beside parameters
        "use_rslora": lora.use_rslora,
        "use_dora": lora.dora,
        "target_modules": chosen.modules,
        "target_parameters": chosen.parameters or None,
        "rank_pattern": {name: count * lora.rank for name, count in fused.items()},
        "alpha_pattern": {
            name: lora.alpha * (math.sqrt(count) if lora.use_rslora else count) for name, count in fused.items()
        },
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _tensors(slot: Slot, adapters: Adapters, cfg: ModelConfig) -> list[tuple[str, Tensor]]:
    """Read the tensors of a slot, by their names in the file."""
    stored, first = adapters.stored, adapters.names[slot.weights[0]]
    if not slot.stacked:
        expert = [] if slot.expert is None else [(slot.expert, slot.expert + 1)]
        pair = [stored.read(f"{first}.{factor}", *expert) for factor in ("a", "b")]
        found = [(key, value if slot.expert is None else value[0]) for key, value in zip(slot.keys, pair, strict=True)]
        magnitude = f"{first}.magnitude.weight"
        return found + ([(slot.magnitude_key, stored.read(magnitude))] if magnitude in stored.specs else [])
    modules = [adapters.names[weight] for weight in slot.weights]
    pairs = [(stored.read(f"{module}.a"), stored.read(f"{module}.b")) for module in modules]
    missing = cfg.moe.expert_hidden_size if slot.target.endswith("gate_up_proj") and len(pairs) == 1 else 0
    before = missing if slot.weights[0].endswith("up_proj") else 0
    return list(zip(slot.keys, stack_to_peft(pairs, before, missing - before), strict=True))
