"""Row 24: a secret that was pasted into a recipe, an override or the environment is nowhere in what a run writes, and
not in the title of its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moefoundry.config import ConfigError, dump_recipe, flatten, load_recipe, redact_argument
from moefoundry.config.secrets import REDACTED, redact
from tests.conftest import QUICKSTART
from tests.distributed import captured_output, run_distributed
from tests.test_extending import install

FAKES = Path(__file__).parent / "fakes"
TRACKER = """
from dataclasses import dataclass
from composer.loggers import LoggerDestination
from moefoundry.config import key
from moefoundry.registry import Part

@dataclass
class Config:
    api_token: str = key("", "Of the service.")
    options: object = key(None, "Others.")

def logger(cfg, run_dir, entry):
    assert cfg.api_token and cfg.options["password"], "it gets what was asked for"
    return LoggerDestination()

part = Part(Config, logger)
"""
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
    "token of a tracker": "battery-staple",
    "password of a tracker": "horse-battery",
}


def train_with_secrets(site: Path, arguments: list[str]) -> tuple[int, str, str, str]:
    from moefoundry.cli.main import main

    sys.path[:0] = [str(FAKES), str(site)]
    os.environ |= {"WANDB_MODE": "offline", "COMET_START_ONLINE": "false"}
    os.environ |= {"WANDB_API_KEY": SECRETS["environment"], "COMET_API_KEY": SECRETS["environment"]}
    sys.argv = ["scripts/train.py", *arguments]
    with captured_output() as texts:
        status = main(["train", *arguments])
    return status, *texts, " ".join(sys.argv)


def test_row24_nothing_that_a_run_writes_has_a_secret(tiny_overrides: Overrides, tmp_path: Path) -> None:
    """Every file of the run directory is searched, trackers' included, and what was printed."""
    recipe = tmp_path / "recipe.yaml"
    pasted = f"{SECRETS['hugging face']} https://me:{SECRETS['password']}@host {SECRETS['aws']} {SECRETS['github']}"
    recipe.write_text(
        f"callbacks:\n  report: {{prompt: '{pasted}', max_new_tokens: 2}}\n"
        f"loggers:\n  mine: {{options: {{password: {SECRETS['password of a tracker']}}}}}\n"
    )
    install(tmp_path / "site", "mine", {"moefoundry.loggers": {"mine": "mine:part"}}, {"mine.py": TRACKER})
    arguments = [str(recipe), *tiny_overrides(tmp_path / "run", "max_duration=2ba", "eval_loader=null")]
    arguments.remove("callbacks.report=null")
    arguments += [
        f"loggers.wandb={{tags: [{SECRETS['openai']}, {SECRETS['wandb']}]}}",
        "loggers={tensorboard: {}, mlflow: {}, file_logger: {}}",
        f"loggers.comet.tags=[{SECRETS['openai']}, {SECRETS['wandb']}]",
        f"loggers.mine={{api_token: {SECRETS['token of a tracker']}}}",
    ]
    ((status, out, err, argv),) = run_distributed(train_with_secrets, 1, tmp_path / "site", arguments)
    assert status == 0, err
    found = {"standard output": out.encode(), "standard error": err.encode(), "sys.argv": argv.encode()}
    found |= {str(path): path.read_bytes() for path in tmp_path.rglob("run/**/*") if path.is_file()}
    for name, secret in SECRETS.items():
        where = [place for place, content in found.items() if secret.encode() in content]
        assert where == [], f"{name}: {where}"
    for place in (".wandb", "events.out", "mlruns", "comet", "log.txt", "checkpoints", "config.yaml", "metrics.jsonl"):
        assert any(place in path for path in found), place
    assert REDACTED.encode() in found[str(tmp_path / "run" / "config.yaml")]
    assert REDACTED in out, "in the command to go on with"


@pytest.mark.parametrize("name", ["hugging face", "openai", "aws", "github"])
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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("loggers.neptune_logger.api_token=planted", "loggers.neptune_logger.api_token=(secret)"),
        ("loggers={x: {a: 1, api_key: planted}}", "loggers={x: {a: 1, api_key: (secret)}}"),
        ("""Experiment(api_key='plan ted', name="x")""", """Experiment(api_key=(secret), name="x")"""),
        ("""{"hf_token": "planted", "password": null}""", """{"hf_token": (secret), "password": null}"""),
        ("model.api_key: unknown key", "model.api_key: unknown key"),
        ("eos_token=</s> max_new_tokens=4 text_key=body", "eos_token=</s> max_new_tokens=4 text_key=body"),
    ],
)
def test_row24_values_of_keys_that_are_named_like_secrets_are_hidden(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert "planted" not in redact_argument(text)


def test_row24_the_title_of_a_process_has_no_secret(tmp_path: Path) -> None:
    """What every user of a machine reads in ``/proc/PID/cmdline``; the environment there stays as it is."""
    program = tmp_path / "train.py"
    program.write_text(
        "import sys\nfrom moefoundry.cli.main import main\nmain(['validate', *sys.argv[1:]])\n"
        "print(open('/proc/self/cmdline').read(), sys.argv, sys.orig_argv, sep='\\n')\n"
        "assert 'PLACE=here' in open('/proc/self/environ').read()\n"
    )
    words = [str(QUICKSTART), "loggers.wandb.api_key=planted", f"loggers.wandb.group={SECRETS['github']}", "seed=3"]
    environment = os.environ | {"PLACE": "here"}
    done = subprocess.run(
        [sys.executable, program, *words], capture_output=True, text=True, env=environment, check=True
    )
    title, argv, whole = done.stdout.splitlines()
    for text in (title, argv, whole, done.stderr):
        assert "planted" not in text
        assert SECRETS["github"] not in text
    for text in (title, argv, whole):
        assert "loggers.wandb.api_key=(secret)" in text
        assert "seed=3" in text
