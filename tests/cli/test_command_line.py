"""The command line as a whole: spellings old and new, words that look like options, JSON, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from moefoundry.cli import convert
from moefoundry.cli.main import COMMANDS, commands, main
from moefoundry.data.options import PACKED_LENGTH, PrepareOptions
from tests.conftest import QUICKSTART


def parsed(arguments: list[str]) -> dict[str, object]:
    """Parse a command line without running its command; return the values of the command's parameters."""
    context = commands.make_context("moefoundry", list(arguments))
    while isinstance(context.command, click.Group):
        name, command, rest = context.command.resolve_command(context, context._protected_args + context.args)
        assert command is not None
        context = command.make_context(name, rest, parent=context)
    return context.params


@pytest.mark.parametrize(
    ("now", "before"),
    [
        ("generate runs/a --prompt x", "generate --checkpoint runs/a --prompt x"),
        ("convert import A -o B", "convert import --hf A --output B"),
        ("convert import A -o B --dtype bf16", "convert import --output B --dtype=bf16 --hf=A"),
        ("convert export A -o B", "convert export --checkpoint A --hf B"),
        ("convert consolidate A -o B", "convert consolidate --checkpoint A --output B"),
        (
            "convert upcycle A -o B --num-experts 4 --top-k 2",
            "convert upcycle --hf A --output B --num-experts 4 --top-k 2",
        ),
        ("checkpoint delete . --batch 4", "checkpoint delete . --step 4"),
        ("prepare A B", "prepare A -o B"),
        ("prepare A -o B", "prepare A --output B"),
    ],
)
def test_earlier_spellings_mean_the_same_and_are_hidden(
    now: str, before: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parsed(now.split()) == parsed(before.split())
    words = now.split()[: 2 if now.startswith(("convert", "checkpoint")) else 1]
    assert main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert not any(f"{former} " in shown for former in ("--hf", "--checkpoint", "--step"))


@pytest.mark.parametrize(
    ("words", "passed_on"),
    [
        (["r.yaml", "a=1", "--world-size", "2", "b=2"], ["r.yaml", "a=1", "b=2"]),
        (["a=-1", "b=x = y z", "c="], ["a=-1", "b=x = y z", "c="]),
        (["--a", "1", "b=2"], ["--a", "1", "b=2"]),
        (["--a=1", "r.yaml"], ["--a=1", "r.yaml"]),
        (["-path=3", "-1"], ["-path=3", "-1"]),
        (["--", "-h.yaml", "--world-size=3"], ["-h.yaml", "--world-size=3"]),
        (["./-h.yaml"], ["./-h.yaml"]),
        ([], []),
    ],
)
def test_overrides_keep_their_order_and_text(words: list[str], passed_on: list[str]) -> None:
    assert parsed(["validate", *words])["arguments"] == passed_on
    assert parsed(["plan", "--world-size=8", *words])["arguments"] == passed_on


def test_a_recipe_may_be_named_like_an_option(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-h.yaml").write_text(Path(__file__).parents[2].joinpath("configs/quickstart.yaml").read_text())
    assert main(["validate", "./-h.yaml", "callbacks.report.prompt=a = b"]) == 0
    assert capsys.readouterr().out.startswith("OK quickstart: ")
    assert main(["validate", "optimizer.lr=-1"]) == 2
    assert "optimizer.lr: got -1" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--shwo", "r.yaml"], ["r.yaml", "seed=3", "--shwo"]])
def test_a_misspelt_option_is_the_one_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *words]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: --shwo: no such option; did you mean --show?"


@pytest.mark.parametrize("command", [*COMMANDS, "convert import", "checkpoint list"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), flag]) == 0
    out, err = capsys.readouterr()
    assert (out.startswith(f"Usage: moefoundry {command} "), err) == (True, "")
    assert "None" not in out


def test_the_help_of_prepare_has_the_defaults_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("max_seq_len", "vocab_size", "text_key", "bad_bytes", "max_loss", "val_fraction", "seed"):
        default = PrepareOptions.__dataclass_fields__[name].default
        default = PACKED_LENGTH if name == "max_seq_len" else getattr(default, "value", default)
        assert f"(default {default})" in shown.split(f" --{name.replace('_', '-')} ")[1].split(" --")[0], name


def test_errors_of_the_library_name_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    source = [str(tmp_path / "a.txt"), str(tmp_path / "out")]
    assert main(["prepare", str(tmp_path), source[1], "--glob", "/etc/*"]) == 2
    assert capsys.readouterr().err.startswith("error: --glob '/etc/*': not a pattern")
    for options, message in [
        (["--max-seq-len", "1"], "--max-seq-len 1: at least 2"),
        (["--vocab-size", "300", "--max-vocab", "299"], "--vocab-size 300 exceeds --max-vocab 299"),
        (["--workers", "0"], "--workers: '0' is not a positive integer"),
        (["--part", "1/2", "--ray", "auto"], "--part 1/2: not with --ray, which prepares all parts"),
        (["--vocab-size=300", "--max-seq-len=9999"], "needs --max-seq-len 9999; add text"),
        (["--max-tokens", "9"], "--max-tokens 9: of instructions or preferences, and these are text; leave it out"),
        (["--too-long", "drop"], "--too-long drop: of instructions or preferences, and these are text; leave it out"),
        (["--target-responses", "last"], "--target-responses last: of instructions, and these are text; leave it out"),
        (["--target-prompts", "all"], "--target-prompts all: of instructions, and these are text; leave it out"),
        (["--target-prompts", "none", "--preferences"], "--target-prompts none: of instructions, and these are pref"),
        (["--text-key", "text", "--instructions"], "--text-key text: of text, and these are instructions; leave it"),
        (["--vocab-size", "4096", "--tokenizer", "t"], "--vocab-size 4096: not with --tokenizer, whose vocabulary is"),
        (["--too-long", "drop", "--instructions"], "--too-long drop: needs --max-tokens"),
        (["--preferences", "--instructions"], "--instructions and --preferences: give one of them"),
    ]:
        assert main(["prepare", *source, *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["prepare", *source, "--vocab-size=300", "--max-seq-len=16"]) == 0
    assert main(["prepare", *source, "--vocab-size=301", "--max-seq-len=16"]) == 2
    assert capsys.readouterr().err.endswith("; or --overwrite\n")


def test_what_is_data_is_one_json_object_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str) -> dict:
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = printed("validate", str(QUICKSTART), "model.moe.top_k=4", "train_loader.dataset.local=nowhere")
    assert found["recipe"]["model.moe.top_k"] == 4
    assert found["origins"]["model.moe.top_k"] == "override"
    assert found["origins"]["model.d_model"] == str(QUICKSTART)
    assert found["origins"]["format_version"] == "default"
    assert found["recipe"].keys() == found["origins"].keys()
    assert found["notes"][0].startswith("note: train_loader.dataset.local: nowhere: no such directory")
    (tmp_path / "a.txt").write_text("some text\n" * 500)
    prepare = ["prepare", str(tmp_path / "a.txt"), str(tmp_path / "out"), "--vocab-size=300", "--max-seq-len=16"]
    first, second = printed(*prepare), printed(*prepare)
    assert first == second | {"up_to_date": False}
    assert first["corpus"]["splits"]["train"]["samples"] > 0
    assert main(["validate", "--print", "--json"]) == 2
    assert capsys.readouterr().out == ""


def complete(*words: str, shell: str = "bash") -> list[str]:
    """What a shell is offered for the last word."""
    environment = os.environ | {
        "_MOEFOUNDRY_COMPLETE": f"{shell}_complete",
        "COMP_WORDS": " ".join(["moefoundry", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "moefoundry"], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


def test_completion() -> None:
    assert complete("ch") == ["plain,checkpoint"]
    kinds = ["consolidate", "export", "import", "merge", "upcycle"]
    assert complete("convert", "") == [f"plain,{kind}" for kind in kinds]
    assert "plain,--max-new-tokens" in complete("generate", "--m")
    assert "plain,--checkpoint" not in complete("generate", "--c")
    assert complete("validate", "model.moe.top_k") == ["plain,model.moe.top_k="]
    assert complete("validate", "save_async") == [f"plain,save_async={value}" for value in ("", "true", "false")]
    assert complete("validate", "save_keep_best") == ["plain,save_keep_best=", "plain,save_keep_best=null"]
    assert "plain,precision.compute=bf16" in complete("validate", "precision.compute=b")
    assert complete("validate", "configs/") == ["file,configs/"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_script(shell: str) -> None:
    environment = os.environ | {"_MOEFOUNDRY_COMPLETE": f"{shell}_source"}
    command = [sys.executable, "-m", "moefoundry"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if "bash" in done.stderr.lower():
        pytest.skip(f"completion of {shell}: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert f"_MOEFOUNDRY_COMPLETE={shell}_complete" in done.stdout


def test_conversions_of_text() -> None:
    assert convert._size("1.5KB") == 1500
    assert convert._layers("0,2,4-6") == {0, 2, 4, 5, 6}
