"""The commands of "Moving in an afternoon", one after the other, where LLM Foundry is imported already."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from tests.distributed import captured_output
from tests.llm_foundry import recipes
from tests.migration.recipes import GLU, ROPE, exact_mpt

PAGE = Path(__file__).parents[2] / "docs/llm_foundry.md"
TORCH_GLU = recipes.TORCH_DMOE | {"ffn_act_fn": GLU["ffn_act_fn"]}


class Moved(NamedTuple):
    """Result of the commands: their standard error by their first three words, and a difference of logits."""

    failures: dict[str, str]
    logits_difference: float
    report: str


def exact() -> dict[str, Any]:
    """An MPT with experts of torch that can be expressed here."""
    return exact_mpt(ffn_config=TORCH_GLU, attn_config=dict(ROPE), n_layers=2)


def commands() -> list[list[str]]:
    """The page's commands."""
    section = PAGE.read_text().split("## Moving in an afternoon")[1]
    found = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return [shlex.split(line, comments=True)[1:] for line in found[1].splitlines()]


def lay_out(directory: Path, corpus: Path) -> None:
    """Put down what a team has: recipe, tokenizer and documents."""
    changes: dict[str, Any] = {"run_name": None, "eval_loader": None, "device_train_microbatch_size": 2}
    recipes.write(directory, recipes.recipe(exact(), corpus, **changes), "mpt-moe.yaml")
    shutil.copytree(corpus / "tokenizer", directory / "tokenizer")
    lines = [{"text": " ".join(f"{n * k % 97} words of document {n}" for k in range(40))} for n in range(60)]
    (directory / "documents.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def walk(directory: Path) -> Moved:
    """Run the commands in a directory."""
    from moefoundry.cli.main import main

    os.chdir(directory)
    failures, report = {}, ""
    for words in commands():
        with captured_output() as texts:
            status = main(words)
        if status:
            failures[" ".join(words[:3])] = texts[1]
        if words[0] == "migrate":
            report = texts[0]
    return Moved(failures, logits_difference(next(Path("checkpoints").glob("ep*.pt")), Path("weights")), report)


def logits_difference(file: Path, imported: Path) -> float:
    """Largest difference between the logits of LLM Foundry's model with a file's weights, and of ours, imported."""
    import torch
    from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM

    from moefoundry.checkpoint.weights import load_model
    from moefoundry.migration.composer_checkpoint import open_foreign

    found = open_foreign(file)
    assert found.config is not None
    theirs = MPTForCausalLM(MPTConfig(**found.config)).eval()
    theirs.load_state_dict({name: found.tensors.read(name) for name in found.tensors.specs})
    ids = torch.randint(0, 384, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((theirs(ids).logits - load_model(imported)(ids)).abs().max())
