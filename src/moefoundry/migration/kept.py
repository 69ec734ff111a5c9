"""Recipes that stay LLM Foundry's, because the model cannot be expressed here; its own trainer runs them."""

from __future__ import annotations

import copy
from typing import Any

import yaml

from moefoundry.config.layers import leaves_of
from moefoundry.config.secrets import REDACTED
from moefoundry.llm_foundry.fit import Machine, fitted
from moefoundry.llm_foundry.keys import REQUIRED, TRAIN_KEYS
from moefoundry.llm_foundry.recipe import FoundryRecipe, without_secrets
from moefoundry.migration.draft import SECRET
from moefoundry.migration.mpt import EXPERTS, OF_THE_MACHINE, OURS, Mpt, flat
from moefoundry.migration.report import Fate, Line, Migration, header

KIND = "LLM Foundry"
UNKNOWN = "no key of LLM Foundry's train recipes, which refuses it; variables stand under `variables`"
FFN = "model.ffn_config"
COPIED = {
    "moe_num_experts": "num_experts",
    "moe_top_k": "top_k",
    "moe_jitter_eps": "router.input_jitter",
    "moe_normalize_expert_weights": "router.normalize_topk",
    "moe_loss_weight": "balance.aux_loss_weight",
}
"""Keys of LLM Foundry's and MegaBlocks' experts, and of ours."""


def keep(recipe: FoundryRecipe, tree: dict[str, Any], reasons: dict[str, str], mpt: Mpt | None = None) -> Migration:
    """Keep a recipe as LLM Foundry's, with the changes that today's torch needs, and our experts in place of others.

    Args:
        recipe: The recipe, interpolations as they were written.
        tree: Its keys, interpolations resolved.
        reasons: Key -> the reason why the model cannot be expressed here.
        mpt: The model, if it is an MPT.
    """
    new, notes = fitted(recipe, Machine(cuda=True, flash_attn=True))
    whys = dict(note.split(": ", 1) for note in notes)
    whys = {key: text.rpartition(": ")[2] for key, text in whys.items()}
    whys["fsdp_config.state_dict_type"] = "FSDP1's default; FSDP2's is sharded"
    found = Migration(recipe.path, f"{KIND} ({tree['model']['name']})", f"{KIND}, which `moefoundry train` runs")
    found.notes += [f"{key}: {reason}" for key, reason in reasons.items()]
    for name in [name for name in new if name not in TRAIN_KEYS]:
        whys[name] = UNKNOWN
        new = _moved_to_variables(new, name)
    if mpt is not None and mpt.ffn_type in EXPERTS:
        whys |= _swap(new, mpt, found)
    elif mpt is not None and not mpt.has_experts:
        found.notes.append(
            f"the FFN stays {mpt.ffn_type}; ffn_type {OURS} would make it a mixture: docs/llm_foundry.md"
        )
    _hide_secrets(new, found)
    found.lines = _lines(recipe.tree, new, whys)
    found.to_fill_in |= {name: "LLM Foundry needs it" for name in REQUIRED if tree.get(name) is None}
    first = f"From {found.source}; it stays a recipe of LLM Foundry. Run it with `moefoundry train`."
    found.text = header(first, found) + yaml.safe_dump(new, sort_keys=False, allow_unicode=True, width=120)
    return found


def _moved_to_variables(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """Take an unknown key out; if others refer to it, it becomes a variable."""
    others = {key: value for key, value in tree.items() if key != name}
    old, new = f"${{{name}}}", f"${{variables.{name}}}"
    if old not in str(others):
        return others
    others = _replaced(others, old, new)
    return others | {"variables": (others.get("variables") or {}) | {name: tree[name]}}


def _replaced(value: Any, old: str, new: str) -> Any:
    """Replace a text in every string below a plain value."""
    if isinstance(value, dict):
        return {name: _replaced(child, old, new) for name, child in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return value.replace(old, new) if isinstance(value, str) else value


def _swap(new: dict[str, Any], mpt: Mpt, found: Migration) -> dict[str, str]:
    """Put our experts in the place of others; return the reasons by key."""
    old = mpt.ffn
    weight = float(old.get("moe_loss_weight", 0.1)) if mpt.ffn_type != "torch_dmoe" else 0.0
    experts: dict[str, Any] = {"ffn_type": OURS}
    if old.get("ffn_hidden_size"):
        experts["ffn_hidden_size"] = old["ffn_hidden_size"]
    experts |= {"num_experts": old.get("moe_num_experts", 1), "top_k": old.get("moe_top_k", 1)}
    router: dict[str, Any] = {"normalize_topk": bool(old.get("moe_normalize_expert_weights"))}
    if old.get("moe_jitter_eps"):
        router["input_jitter"] = float(old["moe_jitter_eps"])
    balance = {"aux_loss_weight": weight, "aux_loss_scope": "micro_batch", "z_loss_weight": 0.0}
    new["model"]["ffn_config"] = experts | {"router": router, "balance": balance}
    kept = "a mean over layers, as MegaBlocks has it"
    of_ours = "what MegaBlocks does, where the default of our experts is another"
    reasons = {f"{FFN}.{name}": of_ours for name in flat(experts) | flat({"router": router, "balance": balance})}
    reasons |= {f"{FFN}.{name}": OF_THE_MACHINE.get(name, f"ffn_type {OURS} has no such key") for name in flat(old)}
    reasons |= {f"{FFN}.ffn_type": "experts of this project", f"{FFN}.balance.aux_loss_weight": kept}
    if "ffn_config.mlp_type" in mpt.reasons or "ffn_config.ffn_act_fn" in mpt.reasons:
        found.notes.append(
            "the experts now compute something else, a SwiGLU of three matrices of the same width: half as many "
            "weights more; model.expansion_ratio times 2/3 has as many as before"
        )
    return reasons


def _hide_secrets(new: dict[str, Any], found: Migration) -> None:
    hidden = without_secrets(copy.deepcopy(new))
    for path, value in leaves_of(hidden).items():
        if REDACTED in str(value):
            found.to_fill_in[".".join(path)] = SECRET
            mapping = new
            for name in path[:-1]:
                mapping = mapping[name]
            mapping[path[-1]] = None


def _lines(before: dict[str, Any], after: dict[str, Any], whys: dict[str, str]) -> list[Line]:
    """Account for every leaf of both recipes."""
    renamed = {f"{FFN}.{name}": f"{FFN}.{own}" for name, own in COPIED.items()}
    renamed |= {name: f"variables.{name}" for name in before if name not in TRAIN_KEYS}
    old, new = ({".".join(path): value for path, value in leaves_of(tree).items()} for tree in (before, after))
    lines = []
    for path, value in old.items():
        why = next((whys[key] for key in _above(path) if key in whys), "")
        if (own := renamed.get(path)) in new:
            lines.append(Line(Fate.renamed, path, str(own), value, new[str(own)], why or whys.get(str(own), "")))
        elif path not in new:
            lines.append(Line(Fate.dropped, path, "", value, None, why))
        else:
            fate = Fate.same if new[path] == value else Fate.changed
            lines.append(Line(fate, path, path, value, new[path], why if fate is Fate.changed else ""))
    said = {*old, *renamed.values()}
    return lines + [
        Line(Fate.default, "", path, None, new[path], whys.get(path, "")) for path in new if path not in said
    ]


def _above(path: str) -> list[str]:
    names = path.split(".")
    return [".".join(names[:end]) for end in range(len(names), 0, -1)]
