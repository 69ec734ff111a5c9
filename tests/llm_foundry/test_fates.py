"""The fate of every key of LLM Foundry's train YAML, in the code and in the page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moefoundry.checkpoint.manifest import Origin, commit
from moefoundry.checkpoint.store import CheckpointStore
from moefoundry.checkpoint.weights import named_checkpoint
from moefoundry.config.spec import every_key
from moefoundry.llm_foundry.fates import FATES, table
from moefoundry.llm_foundry.keys import TRAIN_KEYS

PAGE = Path(__file__).parents[2] / "docs/llm_foundry.md"


def test_every_key_has_a_fate() -> None:
    assert FATES.keys() == TRAIN_KEYS.keys()
    for name, fate in FATES.items():
        assert fate.ours or fate.text, name
        assert all(key in every_key() for key in fate.ours.split(", ") if fate.ours), name


def test_the_page_has_the_table() -> None:
    """``python -m moefoundry.llm_foundry.fates`` prints it."""
    assert table() in PAGE.read_text()


def test_what_the_fates_name_is_there(tmp_path: Path) -> None:
    """No file that no run writes, and no target that the Makefile lacks."""
    store, text = CheckpointStore(tmp_path / "checkpoints"), table()
    directory = store.begin(100)
    (directory / "state.json").write_text("{}")
    commit(directory, Origin(100), {})
    store.publish(100)
    assert set(re.findall(r"`run_dir/checkpoints/(.+?)`", text)) == {path.name for path in store.root.iterdir()}
    assert named_checkpoint(tmp_path) == store.path(100)
    targets = re.findall(r"^([\w-]+):", (PAGE.parents[1] / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([\w-]+)", text)) <= set(targets)


@pytest.mark.slow  # imports LLM Foundry
def test_the_keys_are_those_of_llm_foundrys_config() -> None:
    from dataclasses import fields

    from llmfoundry.command_utils.train import TrainConfig

    assert {field.name for field in fields(TrainConfig)} == FATES.keys()
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    said = {"precision": "amp_bf16", "console_log_interval": "1ba", "progress_bar": False}
    said |= {"save_num_checkpoints_to_keep": -1, "eval_interval": 1, "eval_first": False, "eval_subset_num_batches": -1}
    assert {name: defaults[name] for name in said} == said, "those that a migration takes for absent keys"
