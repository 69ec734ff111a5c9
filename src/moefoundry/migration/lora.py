"""LoRA of peft and axolotl: names of the adapted weights."""

from __future__ import annotations

from typing import Any

from moefoundry.migration.draft import Draft

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "v1": "up_proj"}
FFN = ("gate_proj", "up_proj", "down_proj")
FUSED = {"Wqkv": ATTENTION[:3], "qkv_proj": ATTENTION[:3], "out_proj": ATTENTION[3:]}
KEYS = {"r": "rank", "alpha": "alpha", "lora_alpha": "alpha", "dropout": "dropout", "lora_dropout": "dropout"}


def move_lora(draft: Draft, prefix: str) -> None:
    """Move rank, alpha, dropout and targets.

    Args:
        draft: The recipe.
        prefix: What the keys begin with: ``lora_`` (axolotl), or the section of peft's keys with a dot.
    """
    for name, own in KEYS.items():
        if draft.value(path := f"{prefix}{name}") is not None:
            value = draft.old[path]
            draft.put(f"lora.{own}", value if own == "rank" else float(value), path)
    targets = f"{prefix}target_modules"
    names: Any = draft.value(targets)
    if isinstance(names, list):
        dense = draft.new.get("model.n_dense_layers", 0) == draft.new.get("model.n_layers")
        own_names, unknown = our_targets([str(name) for name in names], "dense" if dense else "experts")
        draft.put("lora.targets", own_names, targets, f"not adapted: {', '.join(unknown)}" if unknown else "")
    elif names is not None:
        draft.drop(targets, "lora.targets says which; by default all")
    for path in (f"{prefix}target_linear", f"{prefix}fan_in_fan_out"):
        draft.silence(path) if draft.value(path) in (None, False) else draft.drop(path, "lora.targets: by default all")


def our_targets(names: list[str], ffn: str = "experts") -> tuple[list[str], list[str]]:
    """Name the weights that peft's module names mean: those here, and those there that have no equal.

    Args:
        names: Names of modules, of which the last part counts.
        ffn: Group of the FFN's weights: ``experts`` or ``dense``.
    """
    found: list[str] = []
    unknown = []
    for name in names:
        leaf = name.rpartition(".")[2]
        if leaf in ATTENTION or leaf in FUSED:
            found += [f"attention.{each}" for each in FUSED.get(leaf, (leaf,))]
        elif leaf in FFN or leaf in EXPERTS:
            found.append(f"{ffn}.{EXPERTS.get(leaf, leaf)}")
        else:
            unknown.append(name)
    return list(dict.fromkeys(found)), unknown
