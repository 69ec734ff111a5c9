"""Recipes as people get them wrong, and right: one or two changes to a small recipe that trains.

A mutation changes a key of the resolved recipe: its name, its type, its value, its unit, or whether it is there. Values
are drawn near the ends of what the schema says, and beyond; sizes of a model stay small, since what a machine can hold
is nothing that a rule decides.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from hypothesis import strategies as st

from moefoundry.config.spec import Spec, every_key, plain

INTEGERS = [-1, 0, 1, 2, 3, 4, 5, 8, 16, 33, 64, 384]
EXTREMES = [-(2**31), 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 10**30]
FLOATS = [
    *(-1.0, -1e-30, 0.0, 1e-60, 1e-37, 1e-8, 0.1, 0.5, 0.999, 1.0, 1.5, 2, 100.0, 1e6, 1e30, 1e39, 10**400),
    *(math.inf, math.nan),
]
TIMES = [
    *("1ba", "2ba", "7ba", "0ba", "1ep", "2ep", "100tok", "512tok", "8sp", "100sp", "0.5dur", "1dur", "1.5dur", "0dur"),
    *("10", "3 ba", "3sec", "-1ba", "1e3ba", "1.5ba", "ba", "3it", "1h", "", "99999999999999999999ba", "1BA", "3ba\n"),
]
TEXTS = [
    *("", " ", "x", "..", ".", "../x", "a/b", "a b", "\N{PILE OF POO}", "\0", "#1", "-x", "~", "~nosuchuser/x", "null"),
    *("x" * 256, "x/" * 2000, "file://", "s3:/x", "https://", "${seed}", "${nowhere}", "${", "???", "1", "\ud800"),
    *("md5", "xxh64", "sha1", "train", "val", "test", "loss/train/lm", "lm_head", "layers.0", "layers.99"),
]
FOREIGN: list[Any] = [1, -1, 0.5, True, False, "x", "4", "1e-3", "true", [], [1], ["x"], {}, {"x": 1}, [None], [[1]]]
SLOW = ("n_layers", "depth", "max_new_tokens", "num_workers")  # each unit of these costs time in every test
SIZES = (
    *("vocab_size", "d_model", "n_layers", "ffn_hidden_size", "n_heads", "n_kv_heads", "head_dim", "q_lora_rank"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "num_experts", "expert_hidden_size"),
    *("num_shared_experts", "depth", "num_workers", "max_new_tokens", "device_eval_batch_size"),
)


@dataclass(frozen=True)
class Mutation:
    """A changed recipe.

    Attributes:
        tree: All of it, as dicts, lists and scalars.
        keys: Paths of what was changed, by the old name and the new.
    """

    tree: dict[str, Any]
    keys: tuple[str, ...]


@st.composite
def mutations(draw: st.DrawFn, tree: dict[str, Any]) -> Mutation:
    """One change of the recipe ``tree``, or two."""
    tree, keys = copy.deepcopy(tree), []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        path = draw(st.sampled_from(list(_paths(tree))))
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        change = draw(st.sampled_from([_value, _value, _value, _value, _foreign, _rename, _drop, _null, _strange_key]))
        keys += [path, *change(draw, node, name, path)]
    return Mutation(tree, tuple(keys))


def _paths(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Of the keys that the schema knows, as far as the tree has them."""
    found = []
    for name, value in tree.items():
        if f"{prefix}{name}" in every_key():
            found.append(f"{prefix}{name}")
            found += _paths(value, f"{prefix}{name}.") if isinstance(value, dict) else []
    return found


def _value(draw: st.DrawFn, node: dict[str, Any], name: str, path: str) -> list[str]:
    """A value that the type allows, whether or not the range does."""
    spec = every_key()[path]
    if spec.is_mapping:
        node[name] = draw(_mappings(spec, node[name]))
    elif spec.item:
        longer = st.lists(_scalars(spec, spec.item), max_size=3)
        as_long = st.lists(_scalars(spec, spec.item), min_size=spec.length or 1, max_size=spec.length or 1)
        node[name] = draw(longer | as_long)
    else:
        node[name] = draw(_scalars(spec, spec.kind))
    return []


def _scalars(spec: Spec, kind: Any) -> st.SearchStrategy[Any]:
    values: list[Any]
    if kind is bool:
        values = [True, False]
    elif kind is int:
        values = [n for n in INTEGERS if n <= 4] if spec.name in SLOW else list(INTEGERS)
        values += [n for n in EXTREMES if n < 0 or n >= 2**63] if spec.name in SIZES else EXTREMES
        values += [int(end) + step for end in spec.bounds.values() for step in (-1, 0, 1)]
    elif kind is float:
        values = FLOATS + [end + step for end in spec.bounds.values() for step in (-0.25, 0, 0.25)]
    elif issubclass(kind, StrEnum):
        values = [*map(str, kind), *(str(member).upper() for member in kind), f"{next(iter(kind))}x", ""]
    elif spec.pattern and "ba" in spec.pattern:
        values = TIMES
    else:
        values = TEXTS + [plain(value) for value in spec.available or ()]
    return st.sampled_from(values)


def _mappings(spec: Spec, value: Any) -> st.SearchStrategy[Any]:
    if not spec.variants:
        return st.sampled_from([{}, value, None])
    common = {name: value[name] for name in ("n_heads", "t_warmup") if name in (value or {})}
    kinds = [{spec.tag: tag, **common} for tag in [*spec.variants, "other", 3]]
    small = {"kind": "mla", "n_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    return st.sampled_from([*kinds, {**small, "v_head_dim": 8}] if spec.tag == "kind" else kinds)


def _foreign(draw: st.DrawFn, node: dict[str, Any], name: str, path: str) -> list[str]:
    node[name] = draw(st.sampled_from(FOREIGN))
    return []


def _rename(draw: st.DrawFn, node: dict[str, Any], name: str, path: str) -> list[str]:
    """A typo: a letter is lost, doubled, swapped, written in capitals, or of a word of another tool."""
    at = draw(st.integers(0, len(name) - 1))
    typos = [
        name[:at] + name[at + 1 :],
        name[:at] + name[at] + name[at:],
        name.upper(),
        f"{name}s",
        name.replace("_", ""),
    ]
    typos += [name[:at] + name[at + 1 : at + 2] + name[at] + name[at + 2 :], name.replace("_", "-"), f"max_{name}"]
    typo = draw(st.sampled_from([word for word in typos if word and word not in node] or [f"{name}_"]))
    node[typo] = node.pop(name)
    return [path.removesuffix(name) + typo]


def _drop(draw: st.DrawFn, node: dict[str, Any], name: str, path: str) -> list[str]:
    del node[name]  # the default takes its place
    return []


def _null(draw: st.DrawFn, node: dict[str, Any], name: str, path: str) -> list[str]:
    node[name] = None
    return []


def _strange_key(draw: st.DrawFn, node: dict[str, Any], name: str, path: str) -> list[str]:
    """A key that stands beside another, where it does not belong."""
    other = draw(st.sampled_from([key.rpartition(".")[2] for key in every_key()]))
    node.setdefault(other, draw(st.sampled_from(FOREIGN)))
    return [path.removesuffix(name) + other]
