"""Reader of peft's ``adapter_config.json`` that passes over no key in silence.

A key is read, or must have the one value whose adapters are computed here, or is listed as one that changes nothing.
Any other is an error: peft has many kinds of adapters with the tensors of LoRA that compute something else.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefoundry.config import UserError
from moefoundry.conversion.families.keys import Keys
from moefoundry.data.json_files import read_json

INERT = frozenset(
    {
        *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "runtime_config", "megatron_core", "merge_weights"),
        *("r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("qalora_group_size", "ensure_weight_tying"),
    }
)
"""About files and training; said again by the tensors; details of an initialization that ``init_lora_weights`` names;
details of what another key turns on, or of layers that no adapter can be on here."""

PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "lora_bias": False,
    "layer_replication": None,
    "megatron_config": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}
"""Keys with the values that adapters here have."""

INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Initial values that leave the base as it is. With all others, the adapters belong to a base that peft changes."""

DEFAULTS = {
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "alpha_pattern": {},
    "target_parameters": [],
}
"""Values of peft's for the keys that are read."""

ADVICE = (
    "merge such adapters in peft (merge_and_unload) and import the whole model; those of PiSSA, CorDA, OLoRA and "
    "LoRA-GA peft also saves for the unchanged base (path_initial_model_for_weight_conversion). If a key changes "
    "nothing that the adapters compute, set it to null"
)


@dataclass(frozen=True)
class PeftSettings:
    """Settings of adapters, beside what their tensors say.

    Attributes:
        alpha: Numerator of the scale.
        alphas: That of targets, by patterns of their names.
        dropout: Share of the inputs that training drops.
        use_rslora: Divide by the square root of the rank, and not by the rank.
        use_dora: There are magnitudes.
        target_parameters: Names of the parameters that are adapted, beside modules.
    """

    alpha: float
    alphas: Mapping[str, float]
    dropout: float
    use_rslora: bool
    use_dora: bool
    target_parameters: list[str]

    def scale(self, target: str, rank: int) -> float:
        """Compute what peft multiplies the adapter of a target by."""
        matches = (alpha for key, alpha in self.alphas.items() if re.match(rf"(.*\.)?({key})$", target))
        return next(matches, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def read_settings(path: Path) -> PeftSettings:
    """Read the settings of adapters.

    Raises:
        UserError: The file is unreadable, or of other adapters than LoRA's.
        ConfigError: Names every key whose value cannot be had here.
    """
    stated = {key: value for key, value in read_json(path).items() if value is not None}
    if stated.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {stated.get('peft_type')}, and not LORA")
    keys = Keys(stated, DEFAULTS, str(path), inert=INERT, advice=ADVICE)
    for key, value in PLAIN.items():
        keys.only(key, value)
    keys.take("init_lora_weights", ", ".join(map(str, INITIALIZATIONS)).lower(), _leaves_the_base)
    settings = PeftSettings(
        alpha=keys.take("lora_alpha", "a number above 0", lambda value: _is_number(value) and value > 0),
        alphas=keys.take("alpha_pattern", "patterns with numbers", _are_patterns),
        dropout=keys.take("lora_dropout", "a number from 0 to less than 1", lambda v: _is_number(v) and v < 1),
        use_rslora=keys.flag("use_rslora"),
        use_dora=keys.flag("use_dora"),
        target_parameters=keys.take("target_parameters", "a list of names", lambda value: isinstance(value, list)),
    )
    keys.finish()
    return settings


def _leaves_the_base(initialization: Any) -> bool:
    return isinstance(initialization, bool | str) and initialization in INITIALIZATIONS


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _are_patterns(value: Any) -> bool:
    try:
        return isinstance(value, dict) and all(re.compile(key) and _is_number(each) for key, each in value.items())
    except re.error:
        return False
