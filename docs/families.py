"""Write the table of families into ``docs/families.md``. Repeat with ``make docs``.

Its figures are measured: each variant that the tests have, in fp32, on the weights that the transformers of today drew.
"""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the tests' tiny models

from moefoundry.config import GqaConfig, MlaConfig, ModelConfig, MtpConfig  # noqa: E402
from moefoundry.config.spec import is_architecture  # noqa: E402
from moefoundry.conversion.convert import load_hf  # noqa: E402
from moefoundry.conversion.families import FAMILIES  # noqa: E402
from tests.conversion.families.models import CASES, OLDER, VARIANTS  # noqa: E402
from tests.conversion.oracle import run_peer, write_cases  # noqa: E402
from tests.conversion.transformers5 import sample  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- begin: python docs/families.py -->\n", "<!-- end -->\n"
SIZES = re.compile(
    r"(vocab_size|d_model|n_layers|n_dense_layers|ffn_hidden_size|init|balance|name|rope_theta|.*(n_heads|_dim|_rank))"
)
EACH = re.compile(
    r"attention\.(kind|n_kv_heads)|init\.|norm\.eps|moe\.(num_experts|top_k|expert_hidden_size|backend|balance)"
)
OFF_BY_DEFAULT = ("yarn", "llama3_rope", "longrope", "linear_attention")


def keys_of(family: str) -> list[str]:
    """Keys of the recipe that a variant of the family has set, sizes left out."""
    found: dict[str, None] = {}
    for cfg in VARIANTS[family].values():
        kind = type(cfg.attention)
        default = leaves(ModelConfig(attention=GqaConfig() if kind is GqaConfig else MlaConfig()))
        for key, value in leaves(cfg).items():
            if (
                default.get(key) != value
                and is_architecture(f"model.{key}")
                and not SIZES.fullmatch(key.rpartition(".")[2])
                and not EACH.match(key)
            ):
                found[key] = None
    if not FAMILIES[family].fits(with_mtp(next(iter(VARIANTS[family].values())))):
        found["mtp.depth"] = None
    if isinstance(next(iter(VARIANTS[family].values())).attention, MlaConfig):
        found = {"attention.kind": None, **found}
    return list(found)


def with_mtp(cfg: ModelConfig) -> ModelConfig:
    return replace(cfg, mtp=MtpConfig(depth=1))


def leaves(cfg: ModelConfig) -> dict[str, object]:
    found: dict[str, object] = {}

    def walk(value: object, path: str) -> None:
        if isinstance(value, dict) and not path.endswith(OFF_BY_DEFAULT):
            for key, child in value.items():
                walk(child, f"{path}.{key}" if path else key)
        else:
            found[path] = value

    walk(asdict(cfg), "")
    return found


@torch.no_grad()
def differences(cache: Path) -> dict[str, float]:
    """Largest difference of logits of each family's variants."""
    with TemporaryDirectory() as directory:
        write_cases(Path(directory))
        peer = run_peer("compute", Path(directory), cache)
    found = dict.fromkeys(VARIANTS, 0.0)
    for family, variant in CASES:
        name = f"{family}-{variant}"
        logits = load_hf(peer.path / name)(sample())
        found[family] = max(found[family], (logits - peer.results[name]["logits"]).abs().max().item())
    return found


def table(figures: dict[str, float]) -> str:
    """Write the table; a family without a figure has a dash."""
    newer = re.search(r"transformers==(\S+)", (ROOT / "requirements-oracle.lock").read_text())
    assert newer is not None
    rows = [
        "| family | for example | keys of `model` that it has | compared with | logits | not there |",
        "|---|---|---|---|---|---|",
    ]
    for name, family in FAMILIES.items():
        if name not in VARIANTS:
            continue
        versions = f"{version('transformers')}, {newer[1]}" if name in OLDER else newer[1]
        keys = ", ".join(f"`{key}`" for key in keys_of(name))
        figure = f"{figures[name]:.0e}" if name in figures else "-"
        absent = vars(type(family)).get("absent", "")
        rows.append(f"| `{name}` | {family.published[0]} | {keys} | {versions} | {figure} | {absent} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    cache = ROOT / ".pytest_cache" / "d" / "oracle"
    cache.mkdir(parents=True, exist_ok=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + table(differences(cache)) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
