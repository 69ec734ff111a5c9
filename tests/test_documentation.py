"""The pages' commands name things that exist, and their recipes are valid."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from moefoundry.cli.main import COMMANDS, main
from moefoundry.config import load_recipe, split_arguments
from tests.cli.test_command_line import parsed
from tests.conftest import QUICKSTART

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md")]
)


LLM_FOUNDRYS = "llm_foundry.md"
"""The page with recipes of another schema."""


def blocks(language: str) -> list[tuple[str, str]]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(page.name, text) for page in PAGES for text in pattern.findall(page.read_text())]


def commands() -> list[tuple[str, list[str]]]:
    lines = [(page, line) for page, text in blocks("bash") for line in text.replace("\\\n", " ").splitlines()]
    return [(page, shlex.split(line, comments=True)) for page, line in lines if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_recipes_in_the_pages_are_valid(tmp_path: Path) -> None:
    recipes = blocks("yaml")
    assert recipes
    for page, text in recipes:
        if page == LLM_FOUNDRYS:
            experts = yaml.safe_load(text)["model"]["ffn_config"]
            assert experts.pop("ffn_type") == "moefoundry_moe"
            load_recipe(QUICKSTART, [f"model.moe={json.dumps(experts)}"])
            continue
        name = re.match(r"# (\S+\.yaml)\n", text)  # of one that the next may extend
        path = tmp_path / (name[1] if name else "recipe.yaml")
        text = text.replace("configs/quickstart.yaml", str(QUICKSTART))
        path.write_text(text if name or "extends:" in text else f"extends: {QUICKSTART}\n{text}")  # or a part of one
        load_recipe(path)
        assert yaml.safe_load(text)


def test_commands_of_the_command_line_exist() -> None:
    """And their arguments can be read; ``checkpoint`` looks for the run that it is given."""
    used = [words[1:] for _, words in commands() if words[0] == "moefoundry" and "[" not in "".join(words)]
    assert {words[0] for words in used} | {"train"} == set(COMMANDS)
    for words in used:
        if words[0] != "checkpoint":
            parsed(words)


def test_overrides_in_the_pages_are_valid() -> None:
    checked = 0
    for page, words in commands():
        if page == LLM_FOUNDRYS:
            continue
        if "scripts/train.py" in words:
            arguments = words[words.index("scripts/train.py") + 1 :]
        elif words[:2] == ["moefoundry", "validate"]:
            arguments = [word for word in words[2:] if "=" in word or word.endswith(".yaml")]
        else:
            continue
        recipe, overrides = split_arguments(arguments)
        known = recipe is not None and (ROOT / recipe).exists()
        load_recipe(ROOT / recipe if known else QUICKSTART, overrides)
        checked += 1
    assert checked >= 3, "the pages show how to launch"


def test_preparations_in_the_pages_succeed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each as it is written, on a file of text, and with a tokenizer that a former one has made."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} words in a line of text, {number * 7919 % 1000}\n" for number in range(1500)))
    prepare = [words for _, words in commands() if words[:2] == ["moefoundry", "prepare"]]
    tokenizer = str(tmp_path / "0" / "tokenizer")
    options = [words[4:] for words in prepare if "[" not in "".join(words)]
    for words in options:
        if "--tokenizer" in words:
            words[words.index("--tokenizer") + 1] = tokenizer
    shown = list(dict.fromkeys(map(tuple, options)))  # the same in several pages is one
    assert len(shown) >= 2
    assert tokenizer not in shown[0]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(f'{{"prompt": "{number} and ", "response": "{number}"}}\n' for number in range(200)))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(chats.read_text().replace('"response"', '"rejected": "", "chosen"').replace('"", ', '"no", '))
    for number, words in enumerate(shown):
        source = chats if "--instructions" in words else pairs if "--preferences" in words else text
        assert main(["prepare", str(source), str(tmp_path / f"{number}"), *words]) == 0
        assert " 0 samples" not in capsys.readouterr().out


@pytest.mark.parametrize("devices", [8, 512])
def test_the_mesh_for_some_devices_is_the_one_that_the_command_prints(
    devices: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the commands after it have its overrides; the same recipes are in docs/hardware.md."""
    (section,) = re.findall(
        rf"^## A mesh for {devices} H100\n(.*?)^## ", (ROOT / "docs/howto.md").read_text(), re.DOTALL | re.MULTILINE
    )
    search, *others = re.findall(
        r"^```bash\nmoefoundry (.*?)```", section.replace("\\\n", " "), re.DOTALL | re.MULTILINE
    )
    (printed,) = re.findall(r"\n\n```\n(.*?)```", section, re.DOTALL)
    assert main(search.split()) == 0
    out = capsys.readouterr().out
    assert all(part.strip("\n") in out for part in printed.split("...")), out
    overrides = re.search(r"^1: (.*)$", printed, re.MULTILINE)[1].split()
    for command in "".join(others).splitlines():
        assert [word for word in command.split() if "=" in word] == overrides


def test_make_targets_in_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for _, words in commands():
        if words[0] == "make" and len(words) > 1:
            assert f"\n{words[1]}:" in makefile, words[1]
