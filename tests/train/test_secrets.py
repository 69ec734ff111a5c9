"""Row 24: a secret that was pasted into a recipe, an override or the environment is nowhere in what a run writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.config import ConfigError, dump_recipe, flatten, load_recipe
from moefoundry.config.spec import REDACTED, redact
from tests.conftest import QUICKSTART
from tests.distributed import captured_output, run_distributed

Overrides = Callable[..., list[str]]
HEX = "0123456789abcdef" * 2
SECRETS = {
    "environment": "local" + HEX + "abcdefab",
    "hugging face": "hf_" + "abcdefghijKLMNOPQRST1234567890abcd",
    "openai": "sk-" + "proj-abcdefghijklmnopqrstuvwxyz123456",
    "aws": "AKIA" + "ABCDEFGHIJKLMNOP",
    "github": "ghp_" + "abcdefghijklmnopqrstuvwxyz0123456789",
    "wandb": HEX + "01234567",
    "password": "correct-horse",
}


def train_with_secrets(arguments: list[str]) -> tuple[int, str, str]:
    from moefoundry.cli.main import main

    os.environ |= {"WANDB_MODE": "offline", "WANDB_API_KEY": SECRETS["environment"]}
    sys.argv = ["scripts/train.py", *arguments]
    with captured_output() as texts:
        status = main(["train", *arguments])
    return status, *texts


def test_row24_nothing_that_a_run_writes_has_a_secret(tiny_overrides: Overrides, tmp_path: Path) -> None:
    """Every file of the run directory is searched, trackers' included, and what was printed."""
    recipe = tmp_path / "recipe.yaml"
    pasted = f"{SECRETS['hugging face']} https://me:{SECRETS['password']}@host {SECRETS['aws']} {SECRETS['github']}"
    recipe.write_text(f"callbacks:\n  report: {{prompt: '{pasted}', max_new_tokens: 2}}\n")
    arguments = [str(recipe), *tiny_overrides(tmp_path / "run", "max_duration=2ba", "eval_loader=null")]
    arguments.remove("callbacks.report=null")
    arguments += [
        f"loggers.wandb={{tags: [{SECRETS['openai']}, {SECRETS['wandb']}]}}",
        "loggers.tensorboard={}",
    ]
    ((status, out, err),) = run_distributed(train_with_secrets, 1, arguments)
    assert status == 0
    found = {"standard output": out.encode(), "standard error": err.encode()}
    found |= {str(path): path.read_bytes() for path in tmp_path.rglob("run/**/*") if path.is_file()}
    for name, secret in SECRETS.items():
        where = [place for place, content in found.items() if secret.encode() in content]
        assert where == [], f"{name}: {where}"
    assert any(place.endswith(".wandb") for place in found)
    assert REDACTED.encode() in found[str(tmp_path / "run" / "config.yaml")]
    assert REDACTED in out, "in the command to go on with"


@pytest.mark.parametrize("name", [name for name in SECRETS if name not in ("environment", "password", "wandb")])
def test_row24_tokens_are_redacted_in_any_key(name: str) -> None:
    secret = SECRETS[name]
    recipe = load_recipe(QUICKSTART, [f"loggers.wandb.group=before {secret} after"])
    assert flatten(recipe)["loggers.wandb.group"] == f"before {REDACTED} after"
    assert secret not in dump_recipe(recipe)
    assert recipe.loggers.wandb is not None
    assert recipe.loggers.wandb.group == f"before {secret} after", "the run itself gets what was asked for"
    with pytest.raises(ConfigError) as error:
        load_recipe(QUICKSTART, [f"seed={secret}", secret])
    assert secret not in str(error.value)


def test_row24_ordinary_values_stay() -> None:
    commit = SECRETS["wandb"]
    for text in (commit, "s3://bucket/path", "https://host:8080/path", "risk-free", "hf_model", "task-" + "x" * 30):
        assert redact(text, "run_name") == text
    assert redact(commit, "loggers.wandb.tags") == REDACTED


def test_row24_a_run_with_a_redacted_recipe_is_its_own(tmp_path: Path) -> None:
    from moefoundry.checkpoint.run_dir import check_run_dir, claim_run_dir

    overrides = [f"run_dir={tmp_path}", f"train_loader.dataset.remote=https://me:{SECRETS['password']}@host/path"]
    recipe = load_recipe(QUICKSTART, overrides)
    claim_run_dir(recipe)
    assert SECRETS["password"] not in (tmp_path / "config.yaml").read_text()
    assert check_run_dir(recipe) == tmp_path
