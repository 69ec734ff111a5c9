"""Adapters to and from peft's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

Transformers with peft loads what is exported, on top of the base's export: ``PeftModel.from_pretrained(model, path)``.
Where that export has weights times a power of two (``families/equivalents.py``), so have their adapters. Names and
shapes are in ``peft_names.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moefoundry.checkpoint.base import base_at
from moefoundry.checkpoint.manifest import read_state
from moefoundry.checkpoint.out_of_core import StoredTensors
from moefoundry.checkpoint.store import using
from moefoundry.checkpoint.weights import (
    PREFIX,
    Weights,
    load_model,
    named_checkpoint,
    read_lora_config,
    read_model_config,
)
from moefoundry.config import LoraConfig, ModelConfig, UserError
from moefoundry.config.errors import first_few
from moefoundry.conversion.adapted import Adapters
from moefoundry.conversion.convert import DEFAULT_MAX_SEQ_LEN, SHARD_BYTES, Summary, exported_as, say_changes
from moefoundry.conversion.equivalent_tensors import EquivalentTensors
from moefoundry.conversion.families import Family
from moefoundry.conversion.families.equivalents import Equivalent
from moefoundry.conversion.parity import fits_twice, verify_outputs
from moefoundry.conversion.peft_names import MERGE, ExpertKind, Slot, slots, stack_to_peft
from moefoundry.conversion.reference import Reading
from moefoundry.conversion.safetensors_io import write_safetensors
from moefoundry.conversion.tensor_map import Dtype, TensorMap
from moefoundry.data.json_files import write_json
from moefoundry.data.staging import staged
from moefoundry.data.tokenizer_files import CONFIG as HF_CONFIG
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
    tolerance: float | None = None,
    base: str | None = None,
) -> Summary:
    """Write adapters as peft saves them.

    Args:
        checkpoint: A checkpoint of adapters, or the run that holds it.
        output: Directory to make.
        family_name: ``model_type`` of the model that they are loaded into; None is that which the base is exported as.
        kind: Experts of that model: ``fused`` in transformers 5, ``separate`` in transformers 4.
        weights: Values to take.
        tolerance: Largest difference of logits that is accepted, of peft's model from ours; None compares none.
        base: Where the base is now; None is where it was. It is read where something is compared with it.

    Raises:
        UserError: There are no adapters, peft or the family has no such adapters (with the reason), a tensor or the
            average is missing, ``output`` exists, or logits differ, or cannot be compared.
    """
    directory = named_checkpoint(checkpoint)
    lora, cfg = read_lora_config(directory), read_model_config(directory)
    if lora is None:
        raise UserError(f"{directory} has whole weights, and no adapters")
    if lora.train_router:
        raise UserError(f"{directory}: its routers have been trained, which peft's files do not hold; {MERGE}")
    if tolerance is not None and find_spec("peft") is None:
        raise UserError(
            "peft, which is to load the adapters, is not installed: pip install 'moefoundry[peft]'; "
            "or verify the merged model: --merge"
        )
    family, same = _family(family_name, cfg)
    adapters = Adapters(directory, lora, meta_model(cfg), weights)
    _check_buffers(directory, adapters, base)
    places = slots(family, same.cfg, kind, adapters.names)
    chosen = _Targets.of(places, family, same.cfg, kind)
    if lora.dora and chosen.parameters:
        named = ", ".join(chosen.parameters)
        raise UserError(f"{directory}: peft has no DoRA where {named} have adapters; {MERGE}")
    say_changes(family, same)
    with using(directory):
        tensors = {key: value.contiguous() for slot in places for key, value in _tensors(slot, adapters, same)}
    size = sum(tensor.nbytes for tensor in tensors.values())
    with staged(output, size) as staging:
        staging.mkdir()
        save_file(tensors, staging / TENSORS_FILE, {"format": "pt"})
        write_json(staging / CONFIG_FILE, _config(lora, places, chosen))
        parity = None
        if tolerance is not None:
            with _exported_base(directory, base, staging, family, same) as hf:
                reading = Reading(adapters=staging, major=chosen.major)
                parity = verify_outputs(hf, load_model(directory, weights, base_place=base), tolerance, reading)
    return Summary(output, len(tensors), size, parity=parity)


def _family(name: str | None, cfg: ModelConfig) -> tuple[Family, Equivalent]:
    """Find the family as :func:`exported_as` does; where there is none, say what can be done with the adapters."""
    try:
        return exported_as(name, cfg)
    except UserError as error:
        if name is not None:
            raise
        raise UserError(f"{error}\nadapters of such a model stay here; moefoundry convert merge merges them") from error


def _check_buffers(directory: Path, adapters: Adapters, base: str | None) -> None:
    """Check that buffers which training moves, such as expert biases, are the base's, as peft's files hold none.

    Raises:
        UserError: Some are not, or the base is not to be had.
    """
    if not adapters.beside:
        return
    with using(directory), base_at(directory, base) as frozen:
        assert frozen is not None, "there are adapters"
        theirs = StoredTensors(frozen, PREFIX)
        moved = [
            name for name in sorted(adapters.beside) if not torch.equal(adapters.stored.read(name), theirs.read(name))
        ]
    if moved:
        raise UserError(f"{directory}: {first_few(moved)} have moved, which peft's files do not hold; {MERGE}")


@contextmanager
def _exported_base(
    directory: Path, base: str | None, staging: Path, family: Family, same: Equivalent
) -> Iterator[Path]:
    """Write the base as a Hugging Face directory, for as long as it is needed."""
    max_seq_len = read_state(directory)["recipe"].get("max_seq_len", DEFAULT_MAX_SEQ_LEN)
    names = TensorMap(family, same.cfg)
    with base_at(directory, base) as frozen, TemporaryDirectory(dir=staging) as there:
        assert frozen is not None, "there are adapters"
        ours = EquivalentTensors(StoredTensors(frozen, PREFIX), same)
        if not fits_twice(ours):
            raise UserError(f"{directory}: peft needs memory for the whole model twice; verify with --merge, by block")
        specs = names.their_specs(ours.specs, Dtype.keep)
        write_safetensors(
            Path(there), specs, lambda name: names.their_blocks(name, ours, specs[name]), max_shard_bytes=SHARD_BYTES
        )
        write_json(Path(there) / HF_CONFIG, family.write_config(same.cfg, max_seq_len))
        yield Path(there)


@dataclass(frozen=True)
class _Targets:
    """Names in ``adapter_config.json``, each the shortest end that means no other module or parameter.

    Attributes:
        modules: Those of modules.
        parameters: Those of parameters.
        major: Version of transformers that has these; None is either.
    """

    modules: list[str]
    parameters: list[str]
    major: int | None

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
        of_ffns = has_experts and any(name.endswith(FFN_LAYERS) for name in modules)
        return cls(
            _shortest(modules, others - modules),
            _shortest(parameters, (hf_names | fused) - parameters),
            5 if parameters else 4 if of_ffns else None,
        )


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


def _tensors(slot: Slot, adapters: Adapters, same: Equivalent) -> list[tuple[str, Tensor]]:
    """Read the tensors of a slot, by their names in the file; B, and the magnitudes, are multiplied as their weight."""
    stored, first = adapters.stored, adapters.names[slot.weights[0]]
    if not slot.stacked:
        expert = [] if slot.expert is None else [(slot.expert, slot.expert + 1)]
        factor = same.factor(slot.weights[0])
        pair = [stored.read(f"{first}.a", *expert), stored.read(f"{first}.b", *expert) * factor]
        found = [(key, value if slot.expert is None else value[0]) for key, value in zip(slot.keys, pair, strict=True)]
        magnitude = f"{first}.magnitude.weight"
        return found + ([(slot.magnitude_key, stored.read(magnitude) * factor)] if magnitude in stored.specs else [])
    modules = {weight: adapters.names[weight] for weight in slot.weights}
    pairs = [(stored.read(f"{name}.a"), stored.read(f"{name}.b") * same.factor(of)) for of, name in modules.items()]
    missing = same.cfg.moe.expert_hidden_size if slot.target.endswith("gate_up_proj") and len(pairs) == 1 else 0
    before = missing if slot.weights[0].endswith("up_proj") else 0
    return list(zip(slot.keys, stack_to_peft(pairs, before, missing - before), strict=True))
