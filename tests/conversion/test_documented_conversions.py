"""The conversions that the pages show run, in the order of the pages, on tiny models under the names of large ones."""

from dataclasses import replace
from pathlib import Path

import pytest

from moefoundry.cli.main import main
from moefoundry.conversion.convert import import_hf
from tests.conversion.hf import family_config, write_hf
from tests.test_documentation import blocks, commands

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
PUBLISHED = {"Mixtral-8x7B": "mixtral", "Qwen3-0.6B-Base": "qwen3", "Qwen3-30B-A3B": "qwen3_moe"}
TRAINED = {"runs/tiny/olmoe-1b-7b": "olmoe", "runs/quickstart": "deepseek_v3"}


def test_documented_conversions_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [
        words[2:]
        for page, words in commands()
        if words[:2] == ["moefoundry", "convert"] and "--ema" not in words and page in ("README.md", "conversion.md")
    ]
    assert {words[0] for words in shown} == {"import", "export", "consolidate", "upcycle"}
    monkeypatch.chdir(tmp_path)
    for name, family in (PUBLISHED | TRAINED).items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        cfg = family_config(family)
        cfg = replace(cfg, moe=replace(cfg.moe, expert_hidden_size=24))  # rows of 16 bytes in BF16
        hf = write_hf(Path(name if name in PUBLISHED else f"{family}-hf"), family, cfg)
        if name in TRAINED:
            import_hf(hf, Path(name))
    for words in shown:
        assert main(["convert", *words]) == 0, words
    for page, code in blocks("python"):
        if page == "conversion.md" and "import moefoundry" in code:
            exec(compile(code, page, "exec"), {})
