"""Files that transformers 5 saves, and whether it computes the same with ours; as transformers 4 must."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moefoundry.conversion.convert import export_hf, import_hf, load_model
from moefoundry.conversion.families import FAMILIES
from moefoundry.evaluation.generation import complete, greedy
from tests.conversion.families.models import CASES
from tests.conversion.hf import assert_same_tensors, family_config, write_hf, write_tokenizer
from tests.conversion.transformers5 import NEW_TOKENS, PROMPT, ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.skipif(
        "MOEFOUNDRY_TRANSFORMERS5" not in os.environ,
        reason="MOEFOUNDRY_TRANSFORMERS5 does not name a directory that transformers 5 is installed in",
    ),
]
ROOT = Path(__file__).parents[2]
ABSOLUTE = 3e-5  # of logits of about 1, as between transformers 4 and here
cases = pytest.mark.parametrize(("family", "variant"), CASES, ids=["-".join(case) for case in CASES])


@dataclass(frozen=True)
class Peer:
    """Directories, and what transformers 5 computes with each."""

    path: Path
    results: dict[str, dict[str, Any]]


def run_peer(action: str, directory: Path) -> Peer:
    path = os.pathsep.join([os.environ["MOEFOUNDRY_TRANSFORMERS5"], str(ROOT), *sys.path])
    command = [sys.executable, "-m", "tests.conversion.transformers5", action, str(directory)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True)
    return Peer(directory, torch.load(directory / "results.pt"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    """What it saves."""
    return run_peer("save", tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def exported(saved: Peer, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    """The same, imported and exported, and loaded by it."""
    directory, checkpoints = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("checkpoints")
    for family, variant in CASES:
        name = f"{family}-{variant}"
        import_hf(saved.path / name, checkpoints / name)
        export_hf(checkpoints / name, directory / name, family)
    return run_peer("load", directory)


@torch.no_grad()
def difference(logits: Tensor, expected: Tensor) -> float:
    assert expected.std() > 0.1, "there is something to compare"
    return (logits - expected).abs().max().item()


@cases
@torch.no_grad()
def test_what_it_saves_is_imported(saved: Peer, tmp_path: Path, family: str, variant: str) -> None:
    """And computes the same, verified by the transformers of this environment."""
    name = f"{family}-{variant}"
    import_hf(saved.path / name, tmp_path / "checkpoint", tolerance=1e-4)
    model, expected = load_model(tmp_path / "checkpoint"), saved.results[name]
    found = difference(model(ids()), expected["logits"])
    print(f"{name}: logits differ by {found:.1e}")
    assert found < ABSOLUTE
    assert greedy(model, ids()[0, :6], NEW_TOKENS).tolist() == expected["tokens"].tolist()


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"])
def test_experts_that_it_saves_fused_are_split_exactly(saved: Peer, tmp_path: Path, family: str) -> None:
    for form in ("", "-fused"):
        import_hf(saved.path / f"{family}-plain{form}", tmp_path / f"imported{form}", tolerance=1e-4)
        export_hf(tmp_path / f"imported{form}", tmp_path / f"exported{form}", family)
    assert_same_tensors(tmp_path / "exported-fused", saved.path / f"{family}-plain")


@cases
@torch.no_grad()
def test_it_loads_what_is_exported(saved: Peer, exported: Peer, family: str, variant: str) -> None:
    """Bit for bit the same tensors, all of which it knows, and the same logits in either version."""
    name = f"{family}-{variant}"
    assert_same_tensors(exported.path / name, saved.path / name)
    result, expected = exported.results[name], saved.results[name]
    assert result["odd"] == {}
    assert torch.equal(result["logits"], expected["logits"])
    assert torch.equal(result["tokens"], expected["tokens"])
    if variant != "moonlight":  # whose queries are not compressed: transformers 4.51 builds no such model
        older = AutoModelForCausalLM.from_pretrained(exported.path / name, attn_implementation="eager").eval()
        assert difference(older(ids()).logits, expected["logits"]) < ABSOLUTE


def test_it_writes_the_text_that_is_written_here(tmp_path: Path) -> None:
    """As users call it; and the tokenizers that it saves go out in a form that either version reads."""
    expected, tokenizer = {}, write_tokenizer(tmp_path / "tokenizer")
    for family in FAMILIES:
        hf = write_hf(tmp_path / f"{family}-hf", family, replace(family_config(family), vocab_size=270))
        import_hf(hf, tmp_path / f"{family}-checkpoint")
        export_hf(tmp_path / f"{family}-checkpoint", tmp_path / "out" / family, family, tokenizer=tokenizer)
        expected[family] = complete(load_model(tmp_path / f"{family}-checkpoint"), tokenizer, PROMPT, NEW_TOKENS)
    peer = run_peer("write", tmp_path / "out")
    assert {family: result["text"] for family, result in peer.results.items()} == expected
    saved = tmp_path / "out/mixtral/tokenizer5"
    assert "TokenizersBackend" in (saved / "tokenizer_config.json").read_text()
    export_hf(tmp_path / "mixtral-checkpoint", tmp_path / "again", tokenizer=saved)
    older = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    older_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    inputs = older_tokenizer(PROMPT, return_tensors="pt")
    tokens = older.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert older_tokenizer.decode(tokens[0]) == expected["mixtral"]
