"""Changes of a recipe of LLM Foundry that its own trainer needs on today's torch and on this machine, with a note each.

The rest of the recipe stays as it is. ``docs/llm_foundry.md`` has the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moefoundry.config.errors import ConfigError, Problem
from moefoundry.config.spec import show_leaf
from moefoundry.llm_foundry.keys import FSDP2_KEYS
from moefoundry.llm_foundry.recipe import FoundryRecipe, without_secrets

NO_FLASH = "flash-attn is not installed"
ON_CPU = "there is no CUDA device"
NO_FSDP1 = "FSDP2 takes the place of FSDP1, and has no such choice"


@dataclass(frozen=True)
class Machine:
    """The facts that decide what must change.

    Attributes:
        cuda: There is a CUDA device.
        flash_attn: The package ``flash_attn`` is installed.
    """

    cuda: bool
    flash_attn: bool


@dataclass
class _Changes:
    """A recipe that is being changed.

    Attributes:
        tree: The recipe.
        notes: One line for each change.
    """

    tree: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def put(self, path: str, value: Any, reason: str, default: Any = None) -> None:
        """Set the value of a key that is there, or whose default is another; note it."""
        *sections, name = path.split(".")
        mapping = self.tree
        for section in sections:
            mapping = mapping.setdefault(section, {})
        if (old := mapping.get(name, default)) != value:
            self.notes.append(f"{path}: {_shown(path, old)} becomes {_shown(path, value)}: {reason}")
            mapping[name] = value

    def drop(self, section: str, name: str, reason: str) -> None:
        """Remove a key; note it."""
        value = self.tree[section].pop(name)
        self.notes.append(f"{section}.{name}: {_shown(name, value)} is dropped: {reason}")


def _shown(path: str, value: Any) -> str:
    name = path.rpartition(".")[2]
    hidden = without_secrets({name: value})[name]
    return str(hidden) if isinstance(hidden, dict) and hidden else show_leaf(hidden)


def fitted(recipe: FoundryRecipe, machine: Machine) -> tuple[dict[str, Any], list[str]]:
    """Change a recipe so that LLM Foundry runs it here.

    Returns:
        The changed copy, and a note for each key that was changed or dropped.

    Raises:
        ConfigError: It needs what this machine has not.
    """
    changes = _Changes(copy.deepcopy(recipe.tree))
    model = changes.tree["model"]
    experts = (model.get("ffn_config") or {}).get("moe_world_size") or 1
    if experts != 1 and not machine.cuda:
        problem = Problem(
            "model.ffn_config.moe_world_size", f"{experts}: expert parallelism of MegaBlocks needs CUDA", "1"
        )
        raise ConfigError([problem], recipe.path)
    if not changes.tree.get("code_paths"):
        changes.tree.pop("code_paths", None)  # LLM Foundry cannot read an empty one
    if not machine.cuda:
        _fit_cpu(changes)
    if not machine.flash_attn:
        _FLASH.get(model["name"], lambda changes: None)(changes)
    _fit_fsdp(changes)
    for path in _loaders(changes.tree):
        _fit_loader(changes, path)
    return changes.tree, changes.notes


def _fit_cpu(changes: _Changes) -> None:
    changes.put("precision", "fp32", f"Composer trains in fp32 where {ON_CPU}", default="amp_bf16")
    if changes.tree["model"].get("init_device") in ("meta", "mixed"):
        changes.put("model.init_device", "cpu", f"Composer leaves meta for CUDA alone, and {ON_CPU}")
    if changes.tree["device_train_microbatch_size"] == "auto":
        changes.put("device_train_microbatch_size", 1, f"auto waits for a GPU to run out of memory, and {ON_CPU}")


def _fit_mpt(changes: _Changes) -> None:
    model = changes.tree["model"]
    attention = model.get("attn_config") or {}
    if attention.get("attn_impl", "flash") == "flash":
        changes.put("model.attn_config.attn_impl", "torch", NO_FLASH, default="flash")
    if attention.get("rope") and attention.get("rope_impl", "dail") == "dail":
        changes.put("model.attn_config.rope_impl", "hf", NO_FLASH, default="dail")
    if model.get("loss_fn", "fused_crossentropy") == "fused_crossentropy":
        changes.put("model.loss_fn", "torch_crossentropy", NO_FLASH, default="fused_crossentropy")


def _fit_hf(changes: _Changes) -> None:
    model = changes.tree["model"]
    if model.get("use_flash_attention_2"):
        changes.put("model.use_flash_attention_2", False, NO_FLASH)
    if model.get("attn_implementation") == "flash_attention_2":
        changes.put("model.attn_implementation", "sdpa", NO_FLASH)


_FLASH: dict[str, Callable[[_Changes], None]] = {"mpt_causal_lm": _fit_mpt, "hf_causal_lm": _fit_hf}


def _fit_fsdp(changes: _Changes) -> None:
    config = changes.tree.get("fsdp_config")
    if config is None:
        return
    strategy = str(config.get("sharding_strategy") or "FULL_SHARD")
    if strategy == "NO_SHARD":
        changes.put("fsdp_config", None, "sharding_strategy NO_SHARD is plain data parallelism: DDP")
        return
    for name in sorted(config.keys() - FSDP2_KEYS):
        reason = NO_FSDP1
        if name == "sharding_strategy":
            reason = _sharding(changes, strategy)
        elif name == "activation_checkpointing_reentrant":
            reason = "FSDP2 checkpoints without reentrance"
        changes.drop("fsdp_config", name, reason)
    if "state_dict_type" not in config:
        config["state_dict_type"] = "full"  # FSDP1's default, by which LLM Foundry names its files; FSDP2's is sharded


def _sharding(changes: _Changes, strategy: str) -> str:
    if strategy in ("SHARD_GRAD_OP", "_HYBRID_SHARD_ZERO2"):
        changes.put("fsdp_config.reshard_after_forward", False, f"the same as sharding_strategy {strategy}", True)
    if "HYBRID" in strategy:
        return "FSDP2 shards over all ranks"
    return "fsdp_config.reshard_after_forward says it in FSDP2"


def _loaders(tree: dict[str, Any]) -> Iterator[str]:
    if isinstance(tree.get("train_loader"), dict):
        yield "train_loader"
    if isinstance(loaders := tree.get("eval_loader"), list):
        yield from (f"eval_loader[{index}]" for index in range(len(loaders)))
    elif isinstance(loaders, dict):
        yield "eval_loader"


def _fit_loader(changes: _Changes, path: str) -> None:
    """Without worker processes, torch refuses the two options that are about them, of which both have defaults."""
    name, _, index = path.rstrip("]").partition("[")
    loader = changes.tree[name][int(index)] if index else changes.tree[name]
    if loader.get("num_workers", 1) != 0:
        return
    own = _Changes({path: loader})
    own.put(f"{path}.prefetch_factor", None, "there are no workers", default=2)
    own.put(f"{path}.persistent_workers", False, "there are no workers", default=True)
    changes.notes += own.notes
